//! Attention against the score matrix written out in f64.

use candle_core::DType;

use super::*;
use crate::ops::testing::{Case, check, check_threads, close, f64s, var};

struct Sizes {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    d: usize,
}

impl Sizes {
    /// Softmax of the scores of query `i` of head `h` of row `b`; masked ones are zero.
    fn weights(&self, q: &[f64], k: &[f64], mask: &Mask, (b, h, i): (usize, usize, usize)) -> Vec<f64> {
        let w = self.heads * self.d;
        let length = mask.key_lengths.as_ref().map_or(self.keys, |l| l[b]);
        let seen = if mask.causal { length.min(i + 1) } else { length };
        let dot = |j: usize| -> f64 {
            let (q, k) = (&q[(b * self.queries + i) * w + h * self.d..], &k[(b * self.keys + j) * w + h * self.d..]);
            (0..self.d).map(|c| q[c] * k[c]).sum::<f64>() / (self.d as f64).sqrt()
        };
        let scores: Vec<f64> = (0..seen).map(dot).collect();
        let max = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
        let mut p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
        p.resize(self.keys, 0.0);
        p
    }

    fn each(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let (heads, queries) = (self.heads, self.queries);
        (0..self.batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..queries).map(move |i| (b, h, i))))
    }

    fn forward(&self, v: &[Vec<f64>], mask: &Mask) -> Vec<f64> {
        let w = self.heads * self.d;
        let mut y = vec![0.0; self.batch * self.queries * w];
        for (b, h, i) in self.each() {
            for (j, p) in self.weights(&v[0], &v[1], mask, (b, h, i)).iter().enumerate() {
                for c in 0..self.d {
                    y[(b * self.queries + i) * w + h * self.d + c] +=
                        p * v[2][(b * self.keys + j) * w + h * self.d + c];
                }
            }
        }
        y
    }

    fn backward(&self, v: &[Vec<f64>], dy: &[f64], mask: &Mask) -> [Vec<f64>; 3] {
        let w = self.heads * self.d;
        let [mut dq, mut dk, mut dv] = [0, 1, 2].map(|i| vec![0.0; v[i].len()]);
        let root = (self.d as f64).sqrt();
        for (b, h, i) in self.each() {
            let p = self.weights(&v[0], &v[1], mask, (b, h, i));
            let q_at = (b * self.queries + i) * w + h * self.d;
            let k_at = |j: usize| (b * self.keys + j) * w + h * self.d;
            let dot = |j: usize| -> f64 { (0..self.d).map(|c| dy[q_at + c] * v[2][k_at(j) + c]).sum() };
            let dp: Vec<f64> = (0..self.keys).map(dot).collect();
            let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for j in 0..self.keys {
                let ds = p[j] * (dp[j] - mean) / root;
                for c in 0..self.d {
                    dq[q_at + c] += ds * v[1][k_at(j) + c];
                    dk[k_at(j) + c] += ds * v[0][q_at + c];
                    dv[k_at(j) + c] += p[j] * dy[q_at + c];
                }
            }
        }
        [dq, dk, dv]
    }

    fn shapes(&self) -> [[usize; 3]; 2] {
        [[self.batch, self.queries, self.heads * self.d], [self.batch, self.keys, self.heads * self.d]]
    }

    fn case(&self, mask: &Mask, test: fn(&Case)) {
        let [q, k] = &self.shapes();
        let op = |x: &[Tensor], _: &[_]| attention(&x[0], &x[1], &x[2], self.heads, mask);
        test(&Case { inputs: &[q, k, k], weights: &[], op: &op, reference: &|v| self.forward(v, mask) });
    }

    /// Many blocks, against the written-out gradients.
    fn large(&self, mask: &Mask, dtype: DType, tolerance: f64) {
        let [qs, ks] = self.shapes();
        let (q, k, v, dy) =
            (var(1, &qs[..], dtype), var(2, &ks[..], dtype), var(3, &ks[..], dtype), var(4, &qs[..], dtype));
        let y = attention(&q, &k, &v, self.heads, mask).unwrap();
        let grads = (&y * dy.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        let values = [f64s(&q), f64s(&k), f64s(&v)];
        close(&f64s(&y), &self.forward(&values, mask), tolerance, "y");
        let want = self.backward(&values, &f64s(&dy), mask);
        for (var, want) in [&q, &k, &v].into_iter().zip(&want) {
            close(&f64s(grads.get(var).unwrap()), want, tolerance, "gradient");
        }
    }
}

fn masks(batch: usize, keys: usize) -> Vec<Mask> {
    let lengths: Vec<usize> = (0..batch).map(|b| keys - b % keys).collect();
    vec![
        Mask::default(),
        Mask { causal: true, key_lengths: None },
        Mask { causal: false, key_lengths: Some(lengths.clone()) },
        Mask { causal: true, key_lengths: Some(lengths) },
    ]
}

#[test]
fn few_tokens_follow_the_formula_and_its_differences() {
    for mask in masks(2, 3) {
        Sizes { batch: 2, queries: 7, keys: 3, heads: 2, d: 5 }.case(&mask, check);
    }
    Sizes { batch: 1, queries: 5, keys: 5, heads: 1, d: 4 }.case(&Mask::default(), check);
    Sizes { batch: 1, queries: 2, keys: 3, heads: 1, d: 17 }.case(&Mask::default(), check);
}

#[test]
fn many_blocks_follow_the_written_out_gradients() {
    for mask in masks(2, 77) {
        Sizes { batch: 2, queries: 81, keys: 77, heads: 2, d: 40 }.large(&mask, DType::F32, 2e-6);
        Sizes { batch: 2, queries: 81, keys: 77, heads: 2, d: 40 }.large(&mask, DType::BF16, 6e-3);
    }
    for mask in masks(1, 333) {
        Sizes { batch: 1, queries: 333, keys: 333, heads: 1, d: 20 }.large(&mask, DType::F32, 2e-6);
    }
    Sizes { batch: 1, queries: 100, keys: 200, heads: 1, d: 512 }.large(&Mask::default(), DType::F32, 2e-6);
    Sizes { batch: 1, queries: 64, keys: 192, heads: 3, d: 64 }.large(&Mask::default(), DType::F16, 1e-3);
}

#[test]
fn the_bits_do_not_depend_on_threads() {
    let mask = Mask { causal: true, key_lengths: None };
    Sizes { batch: 1, queries: 300, keys: 300, heads: 2, d: 24 }.case(&mask, check_threads);
    Sizes { batch: 2, queries: 150, keys: 77, heads: 3, d: 40 }.case(&Mask::default(), check_threads);
}

#[test]
fn a_rows_result_does_not_depend_on_the_other_rows() {
    let [q, k, v] = [1, 2, 3].map(|seed| var(seed, (3, 90, 48), DType::F32));
    let mask = Mask { causal: false, key_lengths: Some(vec![90, 13, 77]) };
    let all = attention(&q, &k, &v, 2, &mask).unwrap();
    let row = |t: &Tensor| t.narrow(0, 1, 1).unwrap();
    let mask = Mask { causal: false, key_lengths: Some(vec![13]) };
    let alone = attention(&row(&q), &row(&k), &row(&v), 2, &mask).unwrap();
    assert_eq!(f64s(&row(&all)), f64s(&alone));
}

#[test]
fn one_tensor_may_be_query_key_and_value() {
    let sizes = Sizes { batch: 1, queries: 70, keys: 70, heads: 2, d: 8 };
    let x = var(1, (1, 70, 16), DType::F32);
    let dy = var(2, (1, 70, 16), DType::F32);
    let y = attention(&x, &x, &x, 2, &Mask::default()).unwrap();
    let grads = (&y * dy.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    let values = [f64s(&x), f64s(&x), f64s(&x)];
    let [dq, dk, dv] = sizes.backward(&values, &f64s(&dy), &Mask::default());
    let want: Vec<f64> = (0..dq.len()).map(|i| dq[i] + dk[i] + dv[i]).collect();
    close(&f64s(grads.get(&x).unwrap()), &want, 2e-6, "gradient");
}

#[test]
fn large_scores_do_not_overflow_and_no_keys_give_zeros() {
    let [q, k, v] = [1, 2, 3].map(|seed| var(seed, (1, 70, 16), DType::F32));
    let (q, k) = ((q.as_tensor() * 300.0).unwrap(), (k.as_tensor() * 300.0).unwrap());
    let sizes = Sizes { batch: 1, queries: 70, keys: 70, heads: 1, d: 16 };
    let y = attention(&q, &k, &v, 1, &Mask::default()).unwrap();
    close(&f64s(&y), &sizes.forward(&[f64s(&q), f64s(&k), f64s(&v)], &Mask::default()), 0.05, "y");
    let mask = Mask { causal: false, key_lengths: Some(vec![0]) };
    let y = attention(&q, &k, &v, 1, &mask).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(f64s(&y).iter().chain(&f64s(grads.get(&v).unwrap())).all(|&x| x == 0.0));
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let [q, k] = [var(1, (2, 5, 12), DType::F32), var(2, (2, 6, 12), DType::F32)];
    let lengths = |l: &[usize]| Mask { causal: false, key_lengths: Some(l.to_vec()) };
    assert!(attention(&q, &k, &q, 2, &Mask::default()).is_err());
    assert!(attention(&q, &k, &k, 5, &Mask::default()).is_err());
    assert!(attention(&q, &k, &k, 2, &lengths(&[7, 1])).is_err());
    assert!(attention(&q, &k, &k, 2, &lengths(&[6])).is_err());
    let none = k.narrow(1, 0, 0).unwrap();
    assert!(attention(&q, &none, &none, 2, &Mask::default()).is_err());
    assert!(attention(&none, &k, &k, 2, &Mask::default()).is_err());
}

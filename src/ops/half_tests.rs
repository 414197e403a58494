//! Half precision at the edges of its range: sums, products, norms and softmax run through numbers that neither f16 nor
//! bf16 holds, and only what is handed out is rounded. Each op's own test compares it in all three dtypes at ordinary
//! numbers.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::cpu::by_dtype;
use super::testing::{close, f64s, numbers};
use super::*;
use crate::device::{Element, WeightRef};

/// The halves, with what rounding once costs.
const HALVES: [(DType, f64); 2] = [(DType::F16, 1.0 / 2048.0), (DType::BF16, 1.0 / 256.0)];

fn leaf(shape: &[usize], dtype: DType, at: impl Fn(usize) -> f32) -> Var {
    let values: Vec<f32> = (0..shape.iter().product()).map(at).collect();
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    Var::from_tensor(&tensor.to_dtype(dtype).unwrap()).unwrap()
}

fn weight(shape: &[usize], dtype: DType, at: impl Fn(usize) -> f32) -> WeightRef {
    let made = || -> Result<WeightRef> {
        by_dtype!(dtype, "weight", T => {
            let values: Vec<T> = (0..shape.iter().product()).map(|i| T::from_f32(at(i))).collect();
            WeightRef::alone("w", shape, &values, true)
        })
    };
    made().unwrap()
}

/// The gradient at `x` where every element of y has gradient `dy`.
fn pull(y: &Tensor, x: &Var, dy: f32) -> Vec<f64> {
    let dy = Tensor::full(dy, y.shape(), &Device::Cpu).unwrap().to_dtype(y.dtype()).unwrap();
    let grads = (y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    f64s(grads.get(x).unwrap())
}

/// Minus from the middle on, so that a sum rises to half its length and returns to nothing.
fn sign(i: usize, len: usize) -> f32 {
    if i % len < len / 2 { 1.0 } else { -1.0 }
}

#[test]
fn products_are_summed_beyond_the_range() {
    for (dtype, _) in HALVES {
        // Every number is exact, so only a sum that left fp32 could be off. 64 * 64 * 2048 = 8388608.
        let (rows, depth) = (640, 4096);
        let x = leaf(&[rows, depth], dtype, |_| 64.0);
        let w = weight(&[3, depth], dtype, |i| 64.0 * sign(i, depth));
        let b = weight(&[3], dtype, |_| 0.5);
        let y = linear(&x, &w, Some(&b)).unwrap();
        assert!(f64s(&y).iter().all(|&y| y == 0.5), "{dtype:?}");
        // Over 640 rows, 8 * 64 * 640 = 327680; over the three outputs, 8 * 3 * 64.
        let dx = pull(&y, &x, 8.0);
        assert!(dx.iter().enumerate().all(|(i, &dx)| dx == f64::from(1536.0 * sign(i, depth))), "{dtype:?}");
        assert!(w.grad().iter().all(|&g| g == 327_680.0) && b.grad().iter().all(|&g| g == 5120.0), "{dtype:?}");

        let (channels, side) = (512, 20);
        let x = leaf(&[1, channels, side, side], dtype, |_| 64.0);
        let w = weight(&[2, channels, 3, 3], dtype, |i| 64.0 * sign(i, channels * 9));
        let y = conv2d(&x, &w, None, Conv2d::new(1, 0)).unwrap();
        assert!(f64s(&y).iter().all(|&y| y == 0.0), "{dtype:?}");
        pull(&y, &x, 8.0);
        // 18 x 18 places.
        assert!(w.grad().iter().all(|&g| g == 8.0 * 64.0 * 324.0), "{dtype:?}");
    }
}

/// (y, dx, dgamma, dbeta) of rows that are normalised, where dy is `dy` times a number that depends on the place.
fn reference(x: &[f64], group: usize, gamma: impl Fn(usize) -> f64, dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (mut y, mut dx) = (Vec::new(), Vec::new());
    for (g, (x, dy)) in x.chunks(group).zip(dy.chunks(group)).enumerate() {
        let n = group as f64;
        let mean = x.iter().sum::<f64>() / n;
        let scale = 1.0 / (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + 1e-5).sqrt();
        let h: Vec<f64> = x.iter().map(|x| (x - mean) * scale).collect();
        let du: Vec<f64> = dy.iter().enumerate().map(|(i, dy)| dy * gamma(g * group + i)).collect();
        let du_mean = du.iter().sum::<f64>() / n;
        let duh_mean = du.iter().zip(&h).map(|(du, h)| du * h).sum::<f64>() / n;
        y.extend(h.iter().enumerate().map(|(i, h)| h * gamma(g * group + i)));
        dx.extend(du.iter().zip(&h).map(|(du, h)| scale * (du - du_mean - h * duh_mean)));
    }
    (y, dx)
}

#[test]
fn norms_take_their_moments_beyond_the_range() {
    let (channels, pixels) = (8usize, 32 * 32);
    let noise = numbers(5, 2 * channels * pixels);
    // A sum of 3e6 and a variance of 1e5, neither of which f16 holds.
    let value = |i: usize| 700.0 + 600.0 * noise[i];
    for (dtype, rounding) in HALVES {
        let dys = numbers(6, noise.len());
        for group_norm_ in [true, false] {
            let (shape, group): (Vec<usize>, usize) = match group_norm_ {
                true => (vec![2, channels, 32, 32], channels / 2 * pixels),
                false => (vec![2, channels, pixels], pixels),
            };
            let width = if group_norm_ { channels } else { pixels };
            let x = leaf(&shape, dtype, value);
            let gamma_at = |i: usize| if i.is_multiple_of(2) { 0.5 } else { 1.5 };
            let (gamma, beta) = (weight(&[width], dtype, gamma_at), weight(&[width], dtype, |_| 0.0));
            let y = match group_norm_ {
                true => group_norm(&x, &gamma, &beta, 2, 1e-5, false),
                false => layer_norm(&x, &gamma, &beta, 1e-5),
            }
            .unwrap();
            // Gradients as a scaled loss has them.
            let dy = leaf(&shape, dtype, |i| 256.0 * dys[i]);
            let grads = (&y * dy.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
            let of = |i: usize| match group_norm_ {
                true => f64::from(gamma_at(i / pixels % channels)),
                false => f64::from(gamma_at(i % pixels)),
            };
            let (want, slope) = reference(&f64s(&x), group, of, &f64s(&dy));
            let what = format!("{dtype:?}, groups: {group_norm_}");
            close(&f64s(&y), &want, 1.01 * rounding, &format!("{what}: y"));
            close(&f64s(grads.get(&x).unwrap()), &slope, 1.01 * rounding, &format!("{what}: dx"));
            assert!(beta.grad().iter().chain(&gamma.grad()).all(|g| g.is_finite()), "{what}");
        }
        // sum(dy) = 64 * 2048 = 131072 for each channel.
        let x = leaf(&[2, channels, 32, 32], dtype, value);
        let (gamma, beta) = (weight(&[channels], dtype, |_| 1.0), weight(&[channels], dtype, |_| 0.0));
        pull(&group_norm(&x, &gamma, &beta, 2, 1e-5, false).unwrap(), &x, 64.0);
        assert!(beta.grad().iter().all(|&g| g == 131_072.0), "{dtype:?}: {:?}", beta.grad());
    }
}

#[test]
fn scores_beyond_the_range_have_their_softmax() {
    for (dtype, _) in HALVES {
        // The score of a query and its own key is 32 * 320 * 640 / sqrt(160) = 518000; of the others 0.
        let (tokens, d) = (5, 160);
        let at = |scale: f32| move |i: usize| if (i / 32) % tokens == i / d % tokens { scale } else { 0.0 };
        let (q, k) = (leaf(&[1, tokens, d], dtype, at(320.0)), leaf(&[1, tokens, d], dtype, at(640.0)));
        let v = leaf(&[1, tokens, d], dtype, |i| (i / d) as f32 + 1.0);
        let y = attention(&q, &k, &v, 1, &Mask::default()).unwrap();
        assert_eq!(f64s(&y), f64s(&v), "{dtype:?}: each query sees its own key alone");
        let grads = (&y * 256.0).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(f64s(grads.get(&v).unwrap()).iter().all(|&g| g == 256.0), "{dtype:?}");
        for leaf in [&q, &k] {
            assert!(f64s(grads.get(leaf).unwrap()).iter().all(|&g| g == 0.0), "{dtype:?}: a certain softmax is flat");
        }
        // 4096 keys alike: each probability is 1/4096, their sum 1, and the mean of the values comes out.
        let (keys, d) = (4096, 40);
        let q = leaf(&[1, 1, d], dtype, |_| 0.0);
        let k = leaf(&[1, keys, d], dtype, |i| (i % 7) as f32);
        let v = leaf(&[1, keys, d], dtype, |i| if (i / d).is_multiple_of(2) { 60000.0 } else { -59904.0 });
        let y = attention(&q, &k, &v, 1, &Mask::default()).unwrap();
        let mean = f64s(&v).iter().sum::<f64>() / (keys * d) as f64;
        close(&f64s(&y), &vec![mean; d], 0.01, &format!("{dtype:?}: mean"));
    }
}

#[test]
fn many_equal_tokens_add_up() {
    for (dtype, _) in HALVES {
        let ids = Var::from_tensor(&Tensor::zeros((1, 70_000), DType::U32, &Device::Cpu).unwrap()).unwrap();
        let table = weight(&[2, 3], dtype, |i| i as f32);
        let y = embedding(&ids, &table, None, dtype).unwrap();
        let dy = Tensor::full(2.0f32, y.shape(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        (y * dy).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(table.grad(), [140_000.0, 140_000.0, 140_000.0, 0.0, 0.0, 0.0], "{dtype:?}");
    }
}

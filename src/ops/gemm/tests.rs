use super::product::block_of;
use super::simd::{Isa, with_isa};
use super::*;
use crate::device::threads::with_threads;

/// Numbers in -1..1 that look random.
pub fn numbers(count: usize, seed: u64) -> Vec<f32> {
    crate::ops::testing::numbers(seed, count)
}

const SIZES: [usize; 9] = [1, 2, 3, 7, 13, 17, 33, 65, 100];

#[test]
fn every_size_equals_the_plain_loop() {
    for isa in Isa::available() {
        for &m in &SIZES {
            for &n in &SIZES {
                for &k in &[1, 2, 7, 17, 33, 100, 500] {
                    with_isa(isa, || check(isa, m, n, k));
                }
            }
        }
    }
}

/// a b with operands that lie by rows or by columns, stored with a bias or added, in rows with a gap.
fn multiply(m: usize, n: usize, k: usize, turned: (bool, bool), add: bool) -> Vec<f32> {
    let (a, b, mut c, bias) = (numbers(m * k, 1), numbers(k * n, 2), numbers(m * (n + 3), 3), numbers(n, 4));
    let strides = |turned: bool, rows: usize, cols: usize| if turned { (1, rows) } else { (cols, 1) };
    let ((ar, ac), (br, bc)) = (strides(turned.0, m, k), strides(turned.1, k, n));
    let (a, b) = (Matrix::new(&a, m, k, ar, ac), Matrix::new(&b, k, n, br, bc));
    let product = Product::new(&a, &b, 1);
    if add {
        product.run(Out::adding(&mut c, n + 3, 0));
    } else {
        product.run(Out::storing(&mut c, n + 3, 0).bias(Bias::Column(&bias)));
    }
    c
}

fn check(isa: Isa, m: usize, n: usize, k: usize) {
    let (a, b, before, bias) = (numbers(m * k, 1), numbers(k * n, 2), numbers(m * (n + 3), 3), numbers(n, 4));
    for (turned, add) in [((false, false), false), ((false, true), true), ((true, false), true)] {
        let got = multiply(m, n, k, turned, add);
        for i in 0..m {
            for j in 0..n {
                let at = i * (n + 3) + j;
                let products = (0..k).map(|p| {
                    let a = a[if turned.0 { p * m + i } else { i * k + p }];
                    a as f64 * b[if turned.1 { j * k + p } else { p * n + j }] as f64
                });
                let want = products.sum::<f64>() + if add { before[at] } else { bias[j] } as f64;
                assert!((got[at] as f64 - want).abs() < 1e-5 * (k as f64).sqrt(), "{isa:?} {m} {n} {k}: {i} {j}");
            }
            let gap = i * (n + 3) + n..(i + 1) * (n + 3);
            assert_eq!(got[gap.clone()], before[gap], "wrote beyond the result");
        }
    }
}

#[test]
fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
    for (m, n, k) in [(100, 300, 1000), (517, 33, 65), (13, 2000, 400)] {
        let bits = || multiply(m, n, k, (false, true), true).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let want = bits();
        for isa in Isa::available() {
            assert_eq!(want, with_isa(isa, bits), "{isa:?}");
            for threads in 1..=3 {
                assert_eq!(want, with_threads(threads, || with_isa(isa, bits)), "{isa:?} {threads}");
            }
        }
    }
}

#[test]
fn blocks_of_k_are_even_and_whole() {
    assert_eq!(block_of(320, 16), 320);
    assert_eq!(block_of(1280, 16), 320);
    assert_eq!(block_of(2880, 9), 360);
    assert_eq!(block_of(36, 9), 36);
    assert_eq!(block_of(1000, 400), 400);
    assert_eq!(block_of(0, 16), 16);
}

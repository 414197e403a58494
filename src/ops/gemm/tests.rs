use super::*;

/// Numbers in -1..1 that look random.
pub(crate) fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2654435761).wrapping_add(12345);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

const SIZES: [usize; 9] = [1, 2, 3, 7, 13, 17, 33, 65, 100];

#[test]
fn every_size_equals_the_plain_loop() {
    for isa in Isa::available() {
        for &m in &SIZES {
            for &n in &SIZES {
                for &k in &[1, 2, 7, 17, 33, 100, 500] {
                    check(isa, m, n, k);
                }
            }
        }
    }
}

fn check(isa: Isa, m: usize, n: usize, k: usize) {
    let (a, b, c) = (numbers(m * k, 1), numbers(k * n, 2), numbers(m * (n + 3), 3));
    for (a_turned, b_turned, accumulate) in [(false, false, false), (false, true, true), (true, false, true)] {
        let av = View { data: &a, row_stride: if a_turned { 1 } else { k }, col_stride: if a_turned { m } else { 1 } };
        let bv = View { data: &b, row_stride: if b_turned { 1 } else { n }, col_stride: if b_turned { k } else { 1 } };
        let mut got = c.clone();
        gemm_serial_on(isa, [m, n, k], av, bv, accumulate, &mut got, n + 3);
        for i in 0..m {
            for j in 0..n {
                let products = (0..k).map(|p| {
                    a[i * av.row_stride + p * av.col_stride] as f64 * b[p * bv.row_stride + j * bv.col_stride] as f64
                });
                let at = i * (n + 3) + j;
                let want = products.sum::<f64>() + if accumulate { c[at] as f64 } else { 0.0 };
                assert!(
                    (got[at] as f64 - want).abs() < 1e-5 * (k as f64).sqrt() + 1e-6,
                    "{isa:?} {m} {n} {k}: {i} {j}"
                );
            }
            let gap = i * (n + 3) + n..(i + 1) * (n + 3);
            assert_eq!(got[gap.clone()], c[gap], "wrote beyond the result");
        }
    }
}

//! The register tile: up to ROWS x 2 LANES sums, one fused multiply-add per element and step of k, in the order of k.

use super::simd::{Simd, first};

/// What happens with a tile's sums.
#[derive(Clone, Copy)]
pub enum Finish {
    /// c += sums.
    Add,
    /// c = sums.
    Store,
    /// c = sums + bias of the row.
    RowBias(*const f32),
    /// c = sums + bias of the column.
    ColumnBias(*const f32),
}

impl Finish {
    /// The same for the tile that begins `rows` further down and `columns` further right.
    ///
    /// # Safety
    /// A bias has that many elements and more.
    #[inline(always)]
    pub unsafe fn at(self, rows: usize, columns: usize) -> Finish {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Finish::RowBias(bias) => Finish::RowBias(bias.add(rows)),
                Finish::ColumnBias(bias) => Finish::ColumnBias(bias.add(columns)),
                plain => plain,
            }
        }
    }
}

/// One packed panel of A (`depth` groups of LANES, of which the first `rows` count) times one of B (`depth` groups of
/// 2 LANES, of which the first `columns` count) into `c` with `stride` elements from row to row.
///
/// # Safety
/// The panels and the rows x columns of `c` are valid; `rows` is in 1..=ROWS, `columns` in 1..=2 LANES; a bias has an
/// element for every row or column. The CPU has `S`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub unsafe fn tile<S: Simd>(
    depth: usize,
    a: *const f32,
    rows: usize,
    b: *const f32,
    columns: usize,
    c: *mut f32,
    stride: usize,
    finish: Finish,
) {
    macro_rules! pick {
        ($($r:literal)*) => {
            match rows {
                $($r => {
                    if $r > S::ROWS {
                        unreachable!("more rows than a tile has")
                    } else if columns > S::LANES {
                        S::vectorize(#[inline(always)] || sized::<S, $r, 2>(depth, a, b, columns, c, stride, finish))
                    } else {
                        S::vectorize(#[inline(always)] || sized::<S, $r, 1>(depth, a, b, columns, c, stride, finish))
                    }
                })*
                _ => unreachable!("more rows than a tile has"),
            }
        };
    }
    // SAFETY: the caller's promise.
    unsafe { pick!(1 2 3 4 5 6 7 8 9 10 11 12 13 14) }
}

#[inline(always)]
unsafe fn sized<S: Simd, const R: usize, const V: usize>(
    depth: usize,
    mut a: *const f32,
    mut b: *const f32,
    columns: usize,
    c: *mut f32,
    stride: usize,
    finish: Finish,
) {
    // SAFETY: the promise to `tile`.
    unsafe {
        for r in 0..R {
            S::prefetch(c.add(r * stride));
            S::prefetch(c.add(r * stride + columns - 1));
        }
        let mut sums = [[S::zero(); V]; R];
        for _ in 0..depth {
            let mut right = [S::zero(); V];
            for (v, right) in right.iter_mut().enumerate() {
                S::prefetch(b.wrapping_add(AHEAD * 2 * S::LANES + v * S::LANES));
                *right = S::load(b.add(v * S::LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let left = S::splat(*a.add(r));
                for (sum, &right) in sums.iter_mut().zip(&right) {
                    *sum = S::fma(left, right, *sum);
                }
            }
            a = a.add(S::LANES);
            b = b.add(2 * S::LANES);
        }
        let last = first(columns - (V - 1) * S::LANES);
        match finish {
            Finish::Store => put::<S, R, V>(
                &sums,
                c,
                stride,
                last,
                #[inline(always)]
                |_, _, sum| sum,
            ),
            Finish::Add => put::<S, R, V>(
                &sums,
                c,
                stride,
                last,
                #[inline(always)]
                |r, v, sum| {
                    let to = c.add(r * stride + v * S::LANES);
                    S::add(if v + 1 < V { S::load(to) } else { S::load_where(to, last) }, sum)
                },
            ),
            Finish::RowBias(bias) => put::<S, R, V>(
                &sums,
                c,
                stride,
                last,
                #[inline(always)]
                |r, _, sum| S::add(sum, S::splat(*bias.add(r))),
            ),
            Finish::ColumnBias(bias) => put::<S, R, V>(
                &sums,
                c,
                stride,
                last,
                #[inline(always)]
                |_, v, sum| {
                    let bias = bias.add(v * S::LANES);
                    S::add(if v + 1 < V { S::load(bias) } else { S::load_where(bias, last) }, sum)
                },
            ),
        }
    }
}

/// How many steps of k before its use a row of B is fetched from the second-level cache.
const AHEAD: usize = 8;

/// Stores what `finish` makes of each vector; of a row's last one only the `last` lanes.
#[inline(always)]
unsafe fn put<S: Simd, const R: usize, const V: usize>(
    sums: &[[S::V; V]; R],
    c: *mut f32,
    stride: usize,
    last: u16,
    finish: impl Fn(usize, usize, S::V) -> S::V,
) {
    for (r, row) in sums.iter().enumerate() {
        for (v, &sum) in row.iter().enumerate() {
            // SAFETY: the promise to `tile`.
            unsafe {
                let to = c.add(r * stride + v * S::LANES);
                let value = finish(r, v, sum);
                if v + 1 < V { S::store(to, value) } else { S::store_where(to, last, value) }
            }
        }
    }
}

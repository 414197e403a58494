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
        for (r, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                let lanes = (columns - v * S::LANES).min(S::LANES);
                put::<S>(sum, c.add(r * stride + v * S::LANES), lanes, finish, r, v * S::LANES);
            }
        }
    }
}

#[inline(always)]
unsafe fn put<S: Simd>(sum: S::V, to: *mut f32, lanes: usize, finish: Finish, row: usize, column: usize) {
    // SAFETY: the promise to `tile`; partial vectors touch only their `lanes`.
    unsafe {
        let whole = lanes == S::LANES;
        let value = match finish {
            Finish::Store => sum,
            Finish::Add if whole => S::add(S::load(to), sum),
            Finish::Add => S::add(S::load_where(to, first(lanes)), sum),
            Finish::RowBias(bias) => S::add(sum, S::splat(*bias.add(row))),
            Finish::ColumnBias(bias) if whole => S::add(sum, S::load(bias.add(column))),
            Finish::ColumnBias(bias) => S::add(sum, S::load_where(bias.add(column), first(lanes))),
        };
        if whole { S::store(to, value) } else { S::store_first(to, lanes, value) }
    }
}

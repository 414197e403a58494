//! A few rows times a matrix that lies by columns, such as a batch of vectors through a layer: every number of the matrix
//! is used once or twice, so it goes straight from memory through the registers instead of into panels. The sums are
//! the same chains as [`Product`](super::Product)'s, so a row's bits do not depend on how many rows are beside it.

use std::ops::Range;

use super::product::block_of;
use super::simd::{Kernel, MOST_LANES, Scalar, Simd, dispatch, first};
use crate::device::{note_flops, threads};
use crate::ops::vector::unwritten;

/// Up to so many rows.
pub const FEW: usize = 4;

/// x (rows, depth), columns (count, depth), bias (count) -> (rows, count): x times the columns, 1 to [`FEW`] rows. The sum
/// over k is cut into blocks of whole `unit`s. Panics if the sizes do not agree.
pub fn few_rows<T: Scalar>(x: &[T], rows: usize, columns: &[T], bias: Option<&[f32]>, unit: usize) -> Vec<T> {
    assert!((1..=FEW).contains(&rows) && x.len().is_multiple_of(rows), "not a few rows");
    let x: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
    let depth = x.len() / rows;
    let count = columns.len() / depth.max(1);
    assert!(columns.len() == count * depth && bias.is_none_or(|bias| bias.len() == count), "operands do not fit");
    note_flops(2.0 * (rows * count * depth) as f64);
    let mut values = unwritten(rows * count);
    let to = Shared(values.as_mut_ptr());
    dispatch(Few { x: &x, rows, depth, columns, count, bias, block: block_of(depth, unit), to });
    values
}

struct Few<'a, T> {
    x: &'a [f32],
    rows: usize,
    depth: usize,
    columns: &'a [T],
    count: usize,
    bias: Option<&'a [f32]>,
    block: usize,
    to: Shared<T>,
}

/// Where tasks write disjoint columns.
struct Shared<T>(*mut T);
// SAFETY: each task writes its own columns of what `few_rows` has borrowed exclusively.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T: Scalar> Kernel for Few<'_, T> {
    type Output = ();
    unsafe fn run<S: Simd>(self) {
        let vectors = self.count.div_ceil(S::LANES);
        // Long runs, since what comes next is fetched ahead; the number of tasks changes no bit.
        let tasks = (2 * threads::threads()).min(vectors);
        threads::parallel_for(tasks, self.columns.len(), |task| {
            for vector in task * vectors / tasks..(task + 1) * vectors / tasks {
                // SAFETY: the CPU has `S`, the promise to `run`; vectors are disjoint.
                unsafe {
                    S::vectorize(
                        #[inline(always)]
                        || match self.rows {
                            1 => self.vector::<S, 1>(vector * S::LANES),
                            2 => self.vector::<S, 2>(vector * S::LANES),
                            3 => self.vector::<S, 3>(vector * S::LANES),
                            _ => self.vector::<S, FEW>(vector * S::LANES),
                        },
                    )
                }
            }
        });
    }
}

impl<T: Scalar> Few<'_, T> {
    /// A vector of columns from `at` on.
    ///
    /// # Safety
    /// There are `R` rows, `at` is below the count, no other task writes these columns, and the CPU has `S`.
    #[inline(always)]
    unsafe fn vector<S: Simd, const R: usize>(&self, at: usize) {
        let exist = (self.count - at).min(S::LANES);
        // SAFETY: `few_rows` has checked the sizes; only what exists is read and written.
        unsafe {
            let mut totals = [S::zero(); R];
            for start in (0..self.depth).step_by(self.block) {
                let sums = self.block::<S, R>(at, exist, start..(start + self.block).min(self.depth));
                for (total, &sum) in totals.iter_mut().zip(&sums) {
                    *total = match self.bias {
                        _ if start > 0 => S::add(*total, sum),
                        Some(bias) => S::add(sum, S::load_where(bias.as_ptr().add(at), first(exist))),
                        None => sum,
                    };
                }
            }
            for (r, &total) in totals.iter().enumerate() {
                T::store_where::<S>(self.to.0.add(r * self.count + at), first(exist), total);
            }
        }
    }

    /// The chains of one block of k.
    ///
    /// # Safety
    /// As [`Self::vector`]; the block lies inside the depth.
    #[inline(always)]
    unsafe fn block<S: Simd, const R: usize>(&self, at: usize, exist: usize, block: Range<usize>) -> [S::V; R] {
        let whole = if exist == S::LANES { block.len() / S::LANES * S::LANES } else { 0 };
        // SAFETY: as for `vector`.
        unsafe {
            let mut sums = [S::zero(); R];
            for k in (block.start..block.start + whole).step_by(S::LANES) {
                self.square::<S, R>(
                    at,
                    k,
                    S::LANES,
                    #[inline(always)]
                    |_, from| T::load::<S>(from),
                    &mut sums,
                );
            }
            for k in (block.start + whole..block.end).step_by(S::LANES) {
                let count = (block.end - k).min(S::LANES);
                self.square::<S, R>(
                    at,
                    k,
                    count,
                    #[inline(always)]
                    |i, from| if i < exist { T::load_where::<S>(from, first(count)) } else { S::zero() },
                    &mut sums,
                );
            }
            sums
        }
    }

    /// `count` steps of k from `k` on; `load` reads them of one column.
    ///
    /// # Safety
    /// As [`Self::block`].
    #[inline(always)]
    unsafe fn square<S: Simd, const R: usize>(
        &self,
        at: usize,
        k: usize,
        count: usize,
        load: impl Fn(usize, *const T) -> S::V,
        sums: &mut [S::V; R],
    ) {
        let from = self.columns.as_ptr().wrapping_add(at * self.depth + k);
        // What the next vector will need, in the order in which it lies.
        let next = self.columns.as_ptr().wrapping_add((at + S::LANES) * self.depth + k * S::LANES);
        // SAFETY: as for `block`; what is fetched ahead may lie anywhere.
        unsafe {
            let mut turned = [S::zero(); MOST_LANES];
            S::transpose(
                #[inline(always)]
                |i| {
                    S::prefetch_far(next.wrapping_add(i * S::LANES).cast());
                    load(i, from.wrapping_add(i * self.depth))
                },
                #[inline(always)]
                |j, column| turned[j] = column,
            );
            let x = self.x.as_ptr().add(k);
            for (j, &column) in turned.iter().enumerate().take(count) {
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = S::fma(S::splat(*x.add(r * self.depth + j)), column, *sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::ops::gemm::{Bias, Isa, Matrix, Product, numbers, with_isa};

    fn check<T: Scalar>(depth: usize, count: usize) {
        let typed = |len, seed| numbers(len, seed).iter().map(|&x| T::from_f32(x)).collect::<Vec<T>>();
        let (x, columns, bias) = (typed(9 * depth, 1), typed(count * depth, 2), numbers(count, 3));
        for bias in [None, Some(&*bias)] {
            let (a, b) = (Matrix::new(&x, 9, depth, depth, 1), Matrix::new(&columns, depth, count, 1, depth));
            let many = Product::new(&a, &b, 16).to_vec::<T>(bias.map_or(Bias::None, Bias::Column));
            for rows in 1..=FEW {
                let few = few_rows(&x[2 * depth..][..rows * depth], rows, &columns, bias, 16);
                let same = |(few, many): (&T, &T)| few.to_f32().to_bits() == many.to_f32().to_bits();
                assert!(few.iter().zip(&many[2 * count..]).all(same), "{:?} {rows} {depth} {count}", T::DTYPE);
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_among_few_and_among_many() {
        for isa in Isa::available() {
            for (depth, count) in [(1, 1), (5, 3), (16, 16), (33, 17), (400, 40), (1000, 70)] {
                with_isa(isa, || {
                    check::<f32>(depth, count);
                    check::<bf16>(depth, count);
                });
            }
        }
    }
}

//! Sums in a fixed order, for the gradients of biases.

use super::simd::{Kernel, Scalar, Simd, dispatch};
use crate::device::threads;

/// Numbers that one task sums: columns of a matrix.
const CHUNK: usize = 64;
/// Rows or pixels that are summed one after the other before their sum joins the others, which keeps rounding small.
const RUN: usize = 128;

/// to[j] += sum over rows of x[row][j]; x has rows of `to.len()` numbers.
pub fn add_column_sums<T: Scalar>(x: &[T], to: &mut [f32]) {
    let columns = to.len();
    if columns == 0 {
        return;
    }
    let at = Shared(to.as_mut_ptr());
    threads::parallel_for(columns.div_ceil(CHUNK), x.len() / 4, |chunk| {
        let from = chunk * CHUNK;
        let count = (columns - from).min(CHUNK);
        // SAFETY: chunks are disjoint and inside `to`.
        let to = unsafe { std::slice::from_raw_parts_mut(at.get().add(from), count) };
        dispatch(Columns { x, columns, from, to });
    });
}

struct Columns<'a, T> {
    x: &'a [T],
    columns: usize,
    from: usize,
    to: &'a mut [f32],
}

impl<T: Scalar> Kernel for Columns<'_, T> {
    type Output = ();
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the CPU has `S`.
        unsafe {
            S::vectorize(
                #[inline(always)]
                || self.add(),
            )
        }
    }
}

impl<T: Scalar> Columns<'_, T> {
    #[inline(always)]
    fn add(self) {
        let count = self.to.len();
        for rows in self.x.chunks(RUN * self.columns) {
            let mut sums = [0f32; CHUNK];
            for row in rows.chunks_exact(self.columns) {
                let row = &row[self.from..self.from + count];
                if let Ok(row) = <&[T; CHUNK]>::try_from(row) {
                    sums.iter_mut().zip(row).for_each(|(s, x)| *s += x.to_f32());
                } else {
                    sums.iter_mut().zip(row).for_each(|(s, x)| *s += x.to_f32());
                }
            }
            self.to.iter_mut().zip(sums).for_each(|(to, s)| *to += s);
        }
    }
}

/// to[c] += sum over images and pixels of x (images, to.len(), pixels).
pub fn add_channel_sums<T: Scalar>(x: &[T], pixels: usize, to: &mut [f32]) {
    let channels = to.len();
    let at = Shared(to.as_mut_ptr());
    threads::parallel_for(channels, x.len() / 4, |channel| {
        // SAFETY: channels are disjoint.
        let to = unsafe { &mut *at.get().add(channel) };
        for image in x.chunks_exact(channels * pixels) {
            *to += dispatch(Total(&image[channel * pixels..][..pixels]));
        }
    });
}

struct Total<'a, T>(&'a [T]);

impl<T: Scalar> Kernel for Total<'_, T> {
    type Output = f32;
    unsafe fn run<S: Simd>(self) -> f32 {
        // SAFETY: the CPU has `S`.
        unsafe {
            S::vectorize(
                #[inline(always)]
                || self.sum(),
            )
        }
    }
}

impl<T: Scalar> Total<'_, T> {
    #[inline(always)]
    fn sum(self) -> f32 {
        const LANES: usize = 64;
        let mut sums = [0f32; LANES];
        let whole = self.0.chunks_exact(LANES);
        let rest = whole.remainder();
        for part in whole {
            sums.iter_mut().zip(part).for_each(|(s, x)| *s += x.to_f32());
        }
        sums.iter_mut().zip(rest).for_each(|(s, x)| *s += x.to_f32());
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                sums[i] += sums[i + half];
            }
            half /= 2;
        }
        sums[0]
    }
}

/// A pointer for tasks that write disjoint elements.
struct Shared(*mut f32);
// SAFETY: see where it is used.
unsafe impl Sync for Shared {}
impl Shared {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_equal_the_plain_ones_and_add_up() {
        for (rows, columns) in [(1, 1), (3, 64), (300, 65), (129, 130)] {
            let x: Vec<f32> = (0..rows * columns).map(|i| (i * 7919 % 1000) as f32 / 500.0 - 1.0).collect();
            let mut to = vec![1f32; columns];
            add_column_sums(&x, &mut to);
            for (j, &got) in to.iter().enumerate() {
                let want = 1.0 + x.iter().skip(j).step_by(columns).map(|&v| v as f64).sum::<f64>();
                assert!((got as f64 - want).abs() < 1e-4, "{rows} {columns} {j}: {got} {want}");
            }
            let mut to = vec![2f32; rows];
            add_channel_sums(&[x.clone(), x.clone()].concat(), columns, &mut to);
            for (i, &got) in to.iter().enumerate() {
                let want = 2.0 + 2.0 * x[i * columns..][..columns].iter().map(|&v| v as f64).sum::<f64>();
                assert!((got as f64 - want).abs() < 1e-4, "{rows} {columns} {i}: {got} {want}");
            }
        }
    }
}

//! Operands of a convolution's gradients: planes with the pixels as k, and a weight with its kernels turned round.

use std::ops::Range;

use super::patches::MOST_TAPS;
use crate::ops::gemm::{Grid, Left, MOST_LANES, Right, Scalar, Simd, first, panels, turned};

/// Images (images, channels, pixels) with a row for each channel: k counts images and pixels.
#[derive(Clone, Copy)]
pub struct Planes<'a, T> {
    images: &'a [T],
    channels: usize,
    pixels: usize,
}

impl<'a, T: Scalar> Planes<'a, T> {
    pub fn new(images: &'a [T], count: usize, channels: usize, pixels: usize) -> Self {
        assert_eq!(images.len(), count * channels * pixels, "images of another size");
        Planes { images, channels, pixels }
    }
}

impl<T: Scalar> Left for Planes<'_, T> {
    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, rows: Range<usize>, depth: Range<usize>, to: *mut f32) {
        for (row, rows, place) in panels::<S>(rows, depth.len()) {
            let mut k = depth.start;
            while k < depth.end {
                let (image, from) = (k / self.pixels, k % self.pixels);
                let count = (self.pixels - from).min(depth.end - k);
                // SAFETY: the rows and k lie inside the images, the caller's promise.
                unsafe {
                    let from = self.images.as_ptr().add((image * self.channels + row) * self.pixels + from);
                    let to = to.add(place + (k - depth.start) * S::LANES);
                    turned::<S, T>(from, self.pixels, rows, count, to, S::LANES);
                }
                k += count;
            }
        }
    }
}

impl<T: Scalar> Right for Planes<'_, T> {
    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, depth: Range<usize>, panels: Range<usize>, grid: Grid, to: *mut f32) {
        let width = 2 * S::LANES;
        for (i, panel) in panels.enumerate() {
            let place = grid.place::<S>(panel);
            let mut k = depth.start;
            while k < depth.end {
                let (image, from) = (k / self.pixels, k % self.pixels);
                let count = (self.pixels - from).min(depth.end - k);
                for first in [0, S::LANES] {
                    let columns = place.columns.saturating_sub(first).min(S::LANES);
                    let row = (place.pixel + first).min(self.channels - 1);
                    // SAFETY: as above.
                    unsafe {
                        let from = self.images.as_ptr().add((image * self.channels + row) * self.pixels + from);
                        let to = to.add((i * depth.len() + k - depth.start) * width + first);
                        turned::<S, T>(from, self.pixels, columns, count, to, width);
                    }
                }
                k += count;
            }
        }
    }
}

/// A weight (outputs, inputs, kh, kw) as the left operand of the data gradient: a row for each input channel, k counts
/// output channels and the taps `first + step * (taps - 1 - t)`, so in reverse.
#[derive(Clone, Copy)]
pub struct Flipped<'a, T> {
    pub weight: &'a [T],
    pub inputs: usize,
    pub kernel: (usize, usize),
    pub taps: (usize, usize),
    pub first: (usize, usize),
    pub step: usize,
}

impl<T: Scalar> Flipped<'_, T> {
    /// The element of a kernel that belongs to a tap.
    #[inline(always)]
    fn element(&self, tap: usize) -> usize {
        let (ty, tx) = (self.taps.0 - 1 - tap / self.taps.1, self.taps.1 - 1 - tap % self.taps.1);
        (self.first.0 + self.step * ty) * self.kernel.1 + self.first.1 + self.step * tx
    }
}

impl<T: Scalar> Left for Flipped<'_, T> {
    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, rows: Range<usize>, depth: Range<usize>, to: *mut f32) {
        let (kernel, taps) = (self.kernel.0 * self.kernel.1, self.taps.0 * self.taps.1);
        /// Up to this part of a kernel, gathering its elements is faster than transposing all of it.
        const FEW: usize = 3;
        let index = std::array::from_fn(|row| (row * kernel) as i32);
        // A vector of rows for each element of the kernel.
        let mut vectors = [0f32; MOST_TAPS * MOST_LANES];
        let mut elements = [0; MOST_TAPS];
        for (tap, element) in elements.iter_mut().enumerate().take(taps) {
            *element = self.element(tap);
        }
        let mut k = depth.start;
        while k < depth.end {
            let (output, tap) = (k / taps, k % taps);
            let count = (taps - tap).min(depth.end - k);
            for (row, rows, place) in panels::<S>(rows.clone(), depth.len()) {
                let from = self.weight[(output * self.inputs + row) * kernel..][..rows * kernel].as_ptr();
                // SAFETY: `vectors` has a vector for each element, `to` for each k.
                unsafe {
                    let to = to.add(place + (k - depth.start) * S::LANES);
                    if count * FEW < kernel {
                        for (i, &element) in elements[tap..tap + count].iter().enumerate() {
                            S::store(
                                to.add(i * S::LANES),
                                T::gather_where::<S>(from.add(element), &index, first(rows)),
                            );
                        }
                        continue;
                    }
                    turned::<S, T>(from, kernel, rows, kernel, vectors.as_mut_ptr(), S::LANES);
                    for (i, &element) in elements[tap..tap + count].iter().enumerate() {
                        S::store(to.add(i * S::LANES), S::load(vectors.as_ptr().add(element * S::LANES)));
                    }
                }
            }
            k += count;
        }
    }
}

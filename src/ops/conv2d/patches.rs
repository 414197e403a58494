//! An image's patches as an operand of a matrix product, packed from where the pixels are and never written out whole.

use std::ops::Range;

use crate::ops::gemm::{Grid, Left, Right, Scalar, Simd, turned};

/// Where the patches of one output grid lie in an image: tap (ty, tx) of output pixel (y, x) is the input pixel
/// (y * stride + top + ty, x * stride + left + tx), and zero outside the image.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Rows and columns of the input.
    pub input: (usize, usize),
    /// Rows and columns of the output.
    pub output: (usize, usize),
    pub taps: (usize, usize),
    pub stride: usize,
    pub top: isize,
    pub left: isize,
}

impl Window {
    pub fn taps(&self) -> usize {
        self.taps.0 * self.taps.1
    }

    pub fn pixels(&self) -> usize {
        self.output.0 * self.output.1
    }

    /// Output pixels `from..from + count` of one tap of one channel's `plane`.
    ///
    /// # Safety
    /// `plane` has the input's pixels, `to` room for `count`.
    #[inline(always)]
    unsafe fn line<T: Scalar>(&self, plane: *const T, tap: usize, from: usize, count: usize, to: *mut f32) {
        let (height, width) = (self.input.0 as isize, self.input.1 as isize);
        let (mut y, mut x) = (from / self.output.1, from % self.output.1);
        let (down, right) = (self.top + (tap / self.taps.1) as isize, self.left + (tap % self.taps.1) as isize);
        let mut done = 0;
        while done < count {
            let run = (self.output.1 - x).min(count - done);
            let row = (y * self.stride) as isize + down;
            for i in 0..run {
                let column = ((x + i) * self.stride) as isize + right;
                let inside = 0 <= row && row < height && 0 <= column && column < width;
                // SAFETY: inside the plane, and below `count`.
                unsafe {
                    *to.add(done + i) = if inside { (*plane.offset(row * width + column)).to_f32() } else { 0.0 };
                }
            }
            done += run;
            (y, x) = (y + 1, 0);
        }
    }
}

/// The patches of images (images, channels, input pixels): k counts channels and taps, columns are output pixels.
#[derive(Clone, Copy)]
pub struct Patches<'a, T> {
    images: &'a [T],
    channels: usize,
    window: Window,
}

impl<'a, T: Scalar> Patches<'a, T> {
    pub fn new(images: &'a [T], count: usize, channels: usize, window: Window) -> Self {
        assert_eq!(images.len(), count * channels * window.input.0 * window.input.1, "images of another size");
        Patches { images, channels, window }
    }

    #[inline(always)]
    fn plane(&self, image: usize, channel: usize) -> *const T {
        let pixels = self.window.input.0 * self.window.input.1;
        self.images[(image * self.channels + channel) * pixels..][..pixels].as_ptr()
    }
}

impl<T: Scalar> Right for Patches<'_, T> {
    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, depth: Range<usize>, panels: Range<usize>, grid: Grid, to: *mut f32) {
        let (width, taps) = (2 * S::LANES, self.window.taps());
        for (i, panel) in panels.enumerate() {
            let place = grid.place::<S>(panel);
            for k in depth.clone() {
                // SAFETY: `to` has room for the panels; a plane is as long as the window says.
                unsafe {
                    let to = to.add((i * depth.len() + k - depth.start) * width);
                    let plane = self.plane(place.image, k / taps);
                    self.window.line(plane, k % taps, place.pixel, place.columns, to);
                    for rest in place.columns..width {
                        *to.add(rest) = 0.0;
                    }
                }
            }
        }
    }
}

/// The same the other way round: k counts images and output pixels, columns are channels and taps.
#[derive(Clone, Copy)]
pub struct PatchesTurned<'a, T>(pub Patches<'a, T>);

impl<T: Scalar> Right for PatchesTurned<'_, T> {
    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, depth: Range<usize>, panels: Range<usize>, grid: Grid, to: *mut f32) {
        const LONGEST: usize = 64;
        let (patches, width) = (&self.0, 2 * S::LANES);
        let (taps, pixels) = (patches.window.taps(), patches.window.pixels());
        let mut lines = [0f32; 16 * LONGEST];
        for (i, panel) in panels.enumerate() {
            let place = grid.place::<S>(panel);
            let mut k = depth.start;
            while k < depth.end {
                let (image, from) = (k / pixels, k % pixels);
                let count = (pixels - from).min(depth.end - k).min(LONGEST);
                for half in 0..2 {
                    let first = half * S::LANES;
                    let columns = place.columns.saturating_sub(first).min(S::LANES);
                    // SAFETY: `lines` takes LANES (at most 16) lines, `to` the panels.
                    unsafe {
                        for j in 0..columns {
                            let column = place.pixel + first + j;
                            let plane = patches.plane(image, column / taps);
                            let line = lines.as_mut_ptr().add(j * LONGEST);
                            patches.window.line(plane, column % taps, from, count, line);
                        }
                        let to = to.add((i * depth.len() + k - depth.start) * width + first);
                        turned::<S, f32>(lines.as_ptr(), LONGEST, columns, count, to, width);
                    }
                }
                k += count;
            }
        }
    }
}

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
    unsafe fn pack<S: Simd>(&self, row: usize, rows: usize, depth: Range<usize>, to: *mut f32) {
        let mut k = depth.start;
        while k < depth.end {
            let (image, from) = (k / self.pixels, k % self.pixels);
            let count = (self.pixels - from).min(depth.end - k);
            // SAFETY: the rows and k lie inside the images, the caller's promise.
            unsafe {
                let from = self.images.as_ptr().add((image * self.channels + row) * self.pixels + from);
                turned::<S, T>(from, self.pixels, rows, count, to.add((k - depth.start) * S::LANES), S::LANES);
            }
            k += count;
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

impl<T: Scalar> Left for Flipped<'_, T> {
    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, row: usize, rows: usize, depth: Range<usize>, to: *mut f32) {
        let (kernel, taps) = (self.kernel.0 * self.kernel.1, self.taps.0 * self.taps.1);
        for k in depth.clone() {
            let (output, tap) = (k / taps, k % taps);
            let (ty, tx) = (self.taps.0 - 1 - tap / self.taps.1, self.taps.1 - 1 - tap % self.taps.1);
            let tap = (self.first.0 + self.step * ty) * self.kernel.1 + self.first.1 + self.step * tx;
            let from = &self.weight[(output * self.inputs + row) * kernel + tap..];
            for r in 0..S::LANES {
                // SAFETY: `to` has LANES numbers for each k.
                unsafe {
                    *to.add((k - depth.start) * S::LANES + r) = if r < rows { from[r * kernel].to_f32() } else { 0.0 };
                }
            }
        }
    }
}

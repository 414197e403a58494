//! An image's patches as an operand of a matrix product, packed from where the pixels are and never written out whole.

use std::ops::Range;

use crate::ops::gemm::{Grid, Left, MOST_LANES, Right, Scalar, Simd, first, turned};

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

    /// `count` output pixels from `pixel` on, at most as many as a vector takes.
    #[inline(always)]
    fn spot(&self, pixel: usize, count: usize) -> Spot {
        let mut spot = Spot { rows: [0; MOST_TAPS], columns: [0; MOST_TAPS], index: [0; MOST_LANES], contiguous: None };
        let (mut y, mut x) = (pixel / self.output.1, pixel % self.output.1);
        let (mut top, mut left) = ([0isize; MOST_LANES], [0isize; MOST_LANES]);
        for i in 0..count {
            top[i] = (y * self.stride) as isize + self.top;
            left[i] = (x * self.stride) as isize + self.left;
            spot.index[i] = (top[i] * self.input.1 as isize + left[i]) as i32;
            x += 1;
            if x == self.output.1 {
                (y, x) = (y + 1, 0);
            }
        }
        for tap in 0..self.taps.0 {
            spot.rows[tap] = inside(&top, tap, self.input.0) & first(count);
        }
        for tap in 0..self.taps.1 {
            spot.columns[tap] = inside(&left, tap, self.input.1) & first(count);
        }
        if self.stride == 1 && self.input.1 == self.output.1 {
            spot.contiguous = Some(spot.index[0] as isize);
        }
        spot
    }
}

/// The lanes that, `tap` further on, lie in 0..size.
#[inline(always)]
fn inside(from: &[isize; MOST_LANES], tap: usize, size: usize) -> u16 {
    let mut lanes = 0;
    for (i, &at) in from.iter().enumerate() {
        // A place before the image is a huge number when taken as unsigned.
        lanes |= u16::from(((at + tap as isize) as usize) < size) << i;
    }
    lanes
}

/// The most rows or columns of a kernel.
pub const MOST_TAPS: usize = 16;

/// What one vector of output pixels reads: which of them lie inside the image for each row and column of taps, and where
/// in a plane, counted from the first tap.
#[derive(Clone, Copy)]
struct Spot {
    rows: [u16; MOST_TAPS],
    columns: [u16; MOST_TAPS],
    index: [i32; MOST_LANES],
    /// The first one's place if the others follow it: where the output is as wide as the input, they do across lines too.
    contiguous: Option<isize>,
}

impl Spot {
    /// The pixels under one tap, zero outside the image; `shift` is the tap's place in a plane.
    ///
    /// # Safety
    /// `plane` has the input's pixels; the CPU has `S`.
    #[inline(always)]
    unsafe fn load<S: Simd, T: Scalar>(&self, plane: *const T, (ty, tx): (usize, usize), shift: usize) -> S::V {
        let lanes = self.rows[ty] & self.columns[tx];
        // SAFETY: lanes outside the plane are not read.
        unsafe {
            match self.contiguous {
                Some(first) => T::load_where::<S>(plane.wrapping_offset(first + shift as isize), lanes),
                None => T::gather_where::<S>(plane.wrapping_add(shift), &self.index, lanes),
            }
        }
    }
}

/// Counts taps and channels in the order of a weight's elements.
#[derive(Clone, Copy)]
struct Counter {
    channel: usize,
    tap: (usize, usize),
}

impl Counter {
    #[inline(always)]
    fn at(element: usize, taps: (usize, usize)) -> Self {
        let (channel, tap) = (element / (taps.0 * taps.1), element % (taps.0 * taps.1));
        Counter { channel, tap: (tap / taps.1, tap % taps.1) }
    }

    #[inline(always)]
    fn step(&mut self, taps: (usize, usize)) {
        self.tap.1 += 1;
        if self.tap.1 == taps.1 {
            self.tap = (self.tap.0 + 1, 0);
            if self.tap.0 == taps.0 {
                (self.channel, self.tap) = (self.channel + 1, (0, 0));
            }
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

    /// One vector of pixels under one tap of one channel.
    ///
    /// # Safety
    /// As [`Spot::load`].
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, spot: &Spot, image: usize, at: Counter) -> S::V {
        let shift = at.tap.0 * self.window.input.1 + at.tap.1;
        // SAFETY: a plane is as long as the window says.
        unsafe { spot.load::<S, T>(self.plane(image, at.channel), at.tap, shift) }
    }
}

impl<T: Scalar> Right for Patches<'_, T> {
    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, depth: Range<usize>, panels: Range<usize>, grid: Grid, to: *mut f32) {
        let (width, taps) = (2 * S::LANES, self.window.taps);
        for (i, panel) in panels.enumerate() {
            let place = grid.place::<S>(panel);
            let ahead = place.columns.min(S::LANES);
            let spots =
                [self.window.spot(place.pixel, ahead), self.window.spot(place.pixel + ahead, place.columns - ahead)];
            let mut at = Counter::at(depth.start, taps);
            for k in 0..depth.len() {
                // SAFETY: `to` has room for the panels.
                unsafe {
                    let to = to.add((i * depth.len() + k) * width);
                    S::store(to, self.load::<S>(&spots[0], place.image, at));
                    S::store(to.add(S::LANES), self.load::<S>(&spots[1], place.image, at));
                }
                at.step(taps);
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
        let (patches, width) = (&self.0, 2 * S::LANES);
        let (taps, pixels) = (patches.window.taps, patches.window.pixels());
        let mut k = depth.start;
        while k < depth.end {
            let (image, pixel) = (k / pixels, k % pixels);
            let count = (pixels - pixel).min(depth.end - k).min(S::LANES);
            let spot = patches.window.spot(pixel, count);
            for (i, panel) in panels.clone().enumerate() {
                let place = grid.place::<S>(panel);
                for half in [0, S::LANES] {
                    let columns = place.columns.saturating_sub(half).min(S::LANES);
                    let mut counters = [Counter::at(place.pixel + half, taps); MOST_LANES];
                    for j in 1..S::LANES {
                        counters[j] = counters[j - 1];
                        counters[j].step(taps);
                    }
                    // SAFETY: `to` has room for the panels.
                    unsafe {
                        S::transpose(
                            #[inline(always)]
                            |j| if j < columns { patches.load::<S>(&spot, image, counters[j]) } else { S::zero() },
                            count,
                            to.add((i * depth.len() + k - depth.start) * width + half),
                            width,
                        );
                    }
                }
            }
            k += count;
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
    unsafe fn pack<S: Simd>(&self, row: usize, rows: usize, depth: Range<usize>, to: *mut f32) {
        let (kernel, taps) = (self.kernel.0 * self.kernel.1, self.taps.0 * self.taps.1);
        // All elements of a kernel by row of A, padded to vectors.
        let mut turned_kernel = [0f32; MOST_TAPS * MOST_TAPS * MOST_LANES];
        let mut elements = [0; MOST_TAPS * MOST_TAPS];
        for (tap, element) in elements.iter_mut().enumerate().take(taps) {
            *element = self.element(tap);
        }
        let mut k = depth.start;
        while k < depth.end {
            let (output, tap) = (k / taps, k % taps);
            let count = (taps - tap).min(depth.end - k);
            let from = self.weight[(output * self.inputs + row) * kernel..][..rows * kernel].as_ptr();
            // SAFETY: `turned_kernel` has a vector for each element, `to` for each k.
            unsafe {
                turned::<S, T>(from, kernel, rows, kernel, turned_kernel.as_mut_ptr(), S::LANES);
                for (i, &element) in elements[tap..tap + count].iter().enumerate() {
                    let vector = S::load(turned_kernel.as_ptr().add(element * S::LANES));
                    S::store(to.add((k - depth.start + i) * S::LANES), vector);
                }
            }
            k += count;
        }
    }
}

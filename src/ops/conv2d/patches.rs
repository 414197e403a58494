//! An image's patches as an operand of a matrix product, packed from where the pixels are and never written out whole.

use std::ops::Range;

use crate::ops::gemm::{Grid, MOST_LANES, Right, Scalar, Simd};

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

/// The most taps of a kernel.
pub const MOST_TAPS: usize = 64;

impl Window {
    pub fn taps(&self) -> usize {
        self.taps.0 * self.taps.1
    }

    pub fn pixels(&self) -> usize {
        self.output.0 * self.output.1
    }

    /// How far each tap lies behind the first in a plane.
    #[inline(always)]
    fn shifts(&self) -> [usize; MOST_TAPS] {
        let mut shifts = [0; MOST_TAPS];
        let (mut ty, mut tx) = (0, 0);
        for shift in &mut shifts[..self.taps()] {
            *shift = ty * self.input.1 + tx;
            tx += 1;
            if tx == self.taps.1 {
                (ty, tx) = (ty + 1, 0);
            }
        }
        shifts
    }

    /// `count` output pixels from `pixel` on, at most as many as a vector takes.
    #[inline(always)]
    fn spot(&self, pixel: usize, count: usize) -> Spot {
        let mut spot = Spot { lanes: [0; MOST_TAPS], index: [0; MOST_LANES], count };
        let (mut y, mut x) = (pixel / self.output.1, pixel % self.output.1);
        let (mut top, mut left) = ([isize::MIN; MOST_LANES], [isize::MIN; MOST_LANES]);
        for i in 0..count {
            top[i] = (y * self.stride) as isize + self.top;
            left[i] = (x * self.stride) as isize + self.left;
            spot.index[i] = (top[i] * self.input.1 as isize + left[i]) as i32;
            x += 1;
            if x == self.output.1 {
                (y, x) = (y + 1, 0);
            }
        }
        let mut columns = [0; MOST_TAPS];
        for (tap, lanes) in columns[..self.taps.1].iter_mut().enumerate() {
            *lanes = inside(&left, tap, self.input.1);
        }
        for ty in 0..self.taps.0 {
            let row = inside(&top, ty, self.input.0);
            let lanes = &mut spot.lanes[ty * self.taps.1..][..self.taps.1];
            lanes.iter_mut().zip(columns).for_each(|(lanes, column)| *lanes = row & column);
        }
        spot
    }

    /// Whether the inputs of consecutive outputs follow each other, from line to line too.
    fn contiguous(&self) -> bool {
        self.stride == 1 && self.input.1 == self.output.1
    }
}

/// The lanes that, `tap` further on, lie in 0..size.
#[inline(always)]
fn inside(from: &[isize; MOST_LANES], tap: usize, size: usize) -> u16 {
    let mut lanes = 0;
    for (i, &at) in from.iter().enumerate() {
        // A place before the image is a huge number when taken as unsigned.
        lanes |= u16::from((at.wrapping_add(tap as isize) as usize) < size) << i;
    }
    lanes
}

/// What one vector of output pixels reads: where in a plane, counted from the first tap, and which lie inside the image
/// under each tap.
#[derive(Clone, Copy)]
struct Spot {
    lanes: [u16; MOST_TAPS],
    index: [i32; MOST_LANES],
    count: usize,
}

impl Spot {
    /// The pixels under a tap, zero outside the image; `from` is the tap's place in a channel's plane.
    ///
    /// # Safety
    /// The plane has the window's pixels; `IN_LINE` only where the window is contiguous; the CPU has `S`.
    #[inline(always)]
    unsafe fn load<S: Simd, T: Scalar, const IN_LINE: bool>(&self, from: *const T, lanes: u16) -> S::V {
        // SAFETY: lanes outside the plane are not read.
        unsafe {
            if IN_LINE {
                T::load_where::<S>(from.wrapping_offset(self.index[0] as isize), lanes)
            } else {
                T::gather_where::<S>(from, &self.index, lanes)
            }
        }
    }
}

/// The patches of images (images, channels, input pixels): k counts channels and taps, columns are output pixels.
#[derive(Clone, Copy)]
pub struct Patches<'a, T> {
    images: &'a [T],
    count: usize,
    channels: usize,
    window: Window,
}

impl<'a, T: Scalar> Patches<'a, T> {
    pub fn new(images: &'a [T], count: usize, channels: usize, window: Window) -> Self {
        assert_eq!(images.len(), count * channels * window.input.0 * window.input.1, "images of another size");
        assert!(window.taps() <= MOST_TAPS, "more taps than a window takes");
        Patches { images, count, channels, window }
    }

    #[inline(always)]
    fn plane(&self, image: usize, channel: usize) -> *const T {
        let pixels = self.window.input.0 * self.window.input.1;
        self.images[(image * self.channels + channel) * pixels..][..pixels].as_ptr()
    }

    #[inline(always)]
    unsafe fn pack_panel<S: Simd, const IN_LINE: bool>(
        &self,
        depth: Range<usize>,
        image: usize,
        spots: &[Spot; 2],
        to: *mut f32,
    ) {
        let (taps, shifts) = (self.window.taps(), self.window.shifts());
        let mut k = depth.start;
        while k < depth.end {
            let (channel, tap) = (k / taps, k % taps);
            let count = (taps - tap).min(depth.end - k);
            let plane = self.plane(image, channel);
            let lanes = spots[0].lanes[tap..tap + count].iter().zip(&spots[1].lanes[tap..tap + count]);
            for (i, (shift, (&low, &high))) in shifts[tap..tap + count].iter().zip(lanes).enumerate() {
                // SAFETY: a plane is as long as the window says; `to` has room for the panel.
                unsafe {
                    let to = to.add((k - depth.start + i) * 2 * S::LANES);
                    let from = plane.wrapping_add(*shift);
                    S::store(to, spots[0].load::<S, T, IN_LINE>(from, low));
                    S::store(to.add(S::LANES), spots[1].load::<S, T, IN_LINE>(from, high));
                }
            }
            k += count;
        }
    }
}

impl<T: Scalar> Right for Patches<'_, T> {
    fn depth(&self) -> usize {
        self.channels * self.window.taps()
    }

    fn grid(&self) -> Grid {
        Grid { images: self.count, pixels: self.window.pixels() }
    }

    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, depth: Range<usize>, panels: Range<usize>, to: *mut f32) {
        let (window, grid) = (&self.window, self.grid());
        for (i, panel) in panels.enumerate() {
            let place = grid.place::<S>(panel);
            let ahead = place.columns.min(S::LANES);
            let spots = [window.spot(place.pixel, ahead), window.spot(place.pixel + ahead, place.columns - ahead)];
            // SAFETY: `to` has room for the panels; the second form only for contiguous windows.
            unsafe {
                let to = to.add(i * depth.len() * 2 * S::LANES);
                if window.contiguous() {
                    self.pack_panel::<S, true>(depth.clone(), place.image, &spots, to);
                } else {
                    self.pack_panel::<S, false>(depth.clone(), place.image, &spots, to);
                }
            }
        }
    }
}

/// The same the other way round: k counts images and output pixels, columns are channels and taps.
#[derive(Clone, Copy)]
pub struct PatchesTurned<'a, T>(pub Patches<'a, T>);

/// Vectors of pixels that are looked up once and then packed for all columns.
const SPOTS: usize = 24;

/// A column's plane, and how far behind its begin its tap lies.
#[derive(Clone, Copy)]
struct Column<T> {
    from: *const T,
    tap: usize,
}

impl<T: Scalar> PatchesTurned<'_, T> {
    /// LANES columns from `first` on, of which `count` exist, in the planes of one image.
    #[inline(always)]
    fn columns<S: Simd>(&self, image: usize, first: usize, count: usize) -> [Column<T>; MOST_LANES] {
        let (patches, taps, shifts) = (&self.0, self.0.window.taps(), self.0.window.shifts());
        let mut columns = [Column { from: patches.images.as_ptr(), tap: 0 }; MOST_LANES];
        for (j, column) in columns.iter_mut().enumerate().take(count) {
            let (channel, tap) = ((first + j) / taps, (first + j) % taps);
            *column = Column { from: patches.plane(image, channel).wrapping_add(shifts[tap]), tap };
        }
        columns
    }

    /// Half a panel: some vectors of pixels under `columns`.
    #[inline(always)]
    unsafe fn pack_half<S: Simd, const IN_LINE: bool>(
        &self,
        spots: &[Spot],
        columns: &[Column<T>; MOST_LANES],
        count: usize,
        to: *mut f32,
    ) {
        for (i, spot) in spots.iter().enumerate() {
            // SAFETY: as in `Patches`; all spots but the last of an image are whole vectors.
            unsafe {
                S::transpose(
                    #[inline(always)]
                    |j| {
                        if j < count {
                            spot.load::<S, T, IN_LINE>(columns[j].from, spot.lanes[columns[j].tap % MOST_TAPS])
                        } else {
                            S::zero()
                        }
                    },
                    #[inline(always)]
                    |j, column| {
                        if j < spot.count {
                            S::store(to.add((i * S::LANES + j) * 2 * S::LANES), column);
                        }
                    },
                );
            }
        }
    }
}

impl<T: Scalar> Right for PatchesTurned<'_, T> {
    fn depth(&self) -> usize {
        self.0.count * self.0.window.pixels()
    }

    fn grid(&self) -> Grid {
        Grid::plain(self.0.channels * self.0.window.taps())
    }

    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, depth: Range<usize>, panels: Range<usize>, to: *mut f32) {
        let (window, width, grid) = (&self.0.window, 2 * S::LANES, self.grid());
        let pixels = window.pixels();
        let mut spots = [Spot { lanes: [0; MOST_TAPS], index: [0; MOST_LANES], count: 0 }; SPOTS];
        let mut k = depth.start;
        while k < depth.end {
            let (image, pixel) = (k / pixels, k % pixels);
            let count = (pixels - pixel).min(depth.end - k).min(SPOTS * S::LANES);
            let spots = &mut spots[..count.div_ceil(S::LANES)];
            for (i, spot) in spots.iter_mut().enumerate() {
                *spot = window.spot(pixel + i * S::LANES, (count - i * S::LANES).min(S::LANES));
            }
            for (i, panel) in panels.clone().enumerate() {
                let place = grid.place::<S>(panel);
                for half in [0, S::LANES] {
                    let exist = place.columns.saturating_sub(half).min(S::LANES);
                    let columns = self.columns::<S>(image, place.pixel + half, exist);
                    // SAFETY: `to` has room for the panels; the second form only for contiguous windows.
                    unsafe {
                        let to = to.add((i * depth.len() + k - depth.start) * width + half);
                        if window.contiguous() {
                            self.pack_half::<S, true>(spots, &columns, exist, to);
                        } else {
                            self.pack_half::<S, false>(spots, &columns, exist, to);
                        }
                    }
                }
            }
            k += count;
        }
    }
}

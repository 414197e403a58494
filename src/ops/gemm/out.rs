//! Where a product goes.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::pack::{Grid, Place};
use super::simd::{Scalar, Simd, first};

/// Added to a result that is stored.
#[derive(Clone, Copy, Debug)]
pub enum Bias<'a> {
    None,
    /// One number per row.
    Row(&'a [f32]),
    /// One number per column; only where there is one image.
    Column(&'a [f32]),
}

/// Where a pixel of the result lies in its row when the pixels are those of a sparser grid.
#[derive(Clone, Copy, Debug)]
pub struct Lattice {
    /// Pixels per line.
    pub width: usize,
    pub first: usize,
    pub line_step: usize,
    pub pixel_step: usize,
}

impl Lattice {
    fn at(&self, pixel: usize) -> usize {
        self.first + pixel / self.width * self.line_step + pixel % self.width * self.pixel_step
    }

    /// Puts a panel's columns, with `step` numbers from row to row, to their places in the rows of an image.
    ///
    /// # Safety
    /// The panel is readable and the places are writable; the CPU has `S`.
    #[inline(always)]
    pub(super) unsafe fn scatter<S: Simd, T: Scalar>(
        &self,
        from: *const f32,
        step: usize,
        place: Place,
        rows: Range<usize>,
        to: *mut T,
        row_stride: usize,
    ) {
        let mut done = 0;
        while done < place.columns {
            let pixel = place.pixel + done;
            let run = (place.columns - done).min(self.width - pixel % self.width);
            let at = self.at(pixel);
            for row in rows.clone() {
                // SAFETY: the caller's promise.
                unsafe {
                    let from = from.add((row - rows.start) * step + done);
                    let to = to.add(row * row_stride + at);
                    if T::DTYPE == candle_core::DType::F32 && self.pixel_step == 2 {
                        for i in (0..run).step_by(S::LANES) {
                            let lanes = first((run - i).min(S::LANES));
                            S::store_apart(to.add(2 * i).cast(), lanes, S::load_where(from.add(i), lanes));
                        }
                        continue;
                    }
                    for i in 0..run {
                        *to.add(i * self.pixel_step) = T::from_f32(*from.add(i));
                    }
                }
            }
            done += run;
        }
    }
}

/// The result: element (m, image, pixel) at `image * image_stride + m * row_stride + pixel`, or where the lattice says.
pub struct Out<'a, T> {
    pub(super) to: *mut T,
    len: usize,
    pub(super) row_stride: usize,
    pub(super) image_stride: usize,
    pub(super) lattice: Option<Lattice>,
    pub(super) add: bool,
    pub(super) bias: Bias<'a>,
    of: PhantomData<&'a mut T>,
}

// SAFETY: tasks write disjoint elements of what was borrowed exclusively.
unsafe impl<T: Send> Sync for Out<'_, T> {}

impl<'a, T: Scalar> Out<'a, T> {
    /// A product that is stored.
    pub fn storing(to: &'a mut [T], row_stride: usize, image_stride: usize) -> Self {
        Out::at(to.as_mut_ptr(), to.len(), row_stride, image_stride)
    }

    /// A product that is stored into memory without values.
    pub(super) fn fresh(to: &'a mut [MaybeUninit<T>], row_stride: usize, image_stride: usize) -> Self {
        Out::at(to.as_mut_ptr().cast(), to.len(), row_stride, image_stride)
    }

    fn at(to: *mut T, len: usize, row_stride: usize, image_stride: usize) -> Self {
        let (lattice, add, bias) = (None, false, Bias::None);
        Out { to, len, row_stride, image_stride, lattice, add, bias, of: PhantomData }
    }

    pub fn bias(self, bias: Bias<'a>) -> Self {
        Out { bias, ..self }
    }

    pub fn lattice(self, lattice: Lattice) -> Self {
        Out { lattice: Some(lattice), ..self }
    }

    /// Whether sums can be kept in the result itself.
    #[inline(always)]
    pub(super) fn direct(&self) -> bool {
        T::DTYPE == candle_core::DType::F32 && self.lattice.is_none()
    }

    /// Panics if an element or a bias would lie outside the memory, or if two elements would be one.
    pub(super) fn check(&self, rows: usize, grid: Grid) {
        if rows * grid.columns() == 0 {
            return;
        }
        let last_pixel = match &self.lattice {
            None => grid.pixels - 1,
            Some(lattice) => lattice.at(grid.pixels - 1).max(lattice.at(grid.pixels.min(lattice.width) - 1)),
        };
        let last = (grid.images - 1) * self.image_stride + (rows - 1) * self.row_stride + last_pixel;
        assert!(last < self.len, "the result is too short");
        assert!(rows == 1 || self.row_stride > last_pixel, "rows of the result overlap");
        assert!(grid.images == 1 || self.image_stride > (rows - 1) * self.row_stride + last_pixel, "images overlap");
        match self.bias {
            Bias::None => (),
            Bias::Row(bias) => assert!(bias.len() >= rows, "the bias is too short"),
            Bias::Column(bias) => assert!(grid.images == 1 && bias.len() >= grid.pixels, "the bias is too short"),
        }
    }
}

impl<'a> Out<'a, f32> {
    /// A product that is added to what is there.
    pub fn adding(to: &'a mut [f32], row_stride: usize, image_stride: usize) -> Self {
        Out { add: true, ..Out::storing(to, row_stride, image_stride) }
    }
}

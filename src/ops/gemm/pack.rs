//! Packing: operands become panels in the order in which the register tile reads them. A panel of A has LANES rows
//! (ROWS of them used) for each k, a panel of B has 2 LANES columns for each k; both are padded with zeros.

use std::ops::Range;

use super::simd::{Scalar, Simd, first};

/// The columns of a product: `images` times `pixels` of them. No panel of B straddles two images, so what a column
/// comes to does not depend on the images beside it.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    pub images: usize,
    pub pixels: usize,
}

/// Where a panel of B lies.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub image: usize,
    /// Its first pixel.
    pub pixel: usize,
    /// Its columns, at most 2 LANES.
    pub columns: usize,
}

impl Grid {
    pub fn plain(columns: usize) -> Self {
        Grid { images: 1, pixels: columns }
    }

    pub fn columns(&self) -> usize {
        self.images * self.pixels
    }

    pub fn panels<S: Simd>(&self) -> usize {
        self.images * self.pixels.div_ceil(2 * S::LANES)
    }

    pub fn place<S: Simd>(&self, panel: usize) -> Place {
        let per_image = self.pixels.div_ceil(2 * S::LANES);
        let pixel = panel % per_image * 2 * S::LANES;
        Place { image: panel / per_image, pixel, columns: (self.pixels - pixel).min(2 * S::LANES) }
    }
}

/// The left operand, M x K.
pub trait Left: Sync {
    /// M and K.
    fn size(&self) -> (usize, usize);

    /// Writes panels of ROWS rows (the last may have fewer), one after the other: for each k of `depth` LANES numbers, the
    /// panel's rows, then zeros.
    ///
    /// # Safety
    /// `to` takes the panels, the ranges lie inside the operand, and the CPU has `S`.
    unsafe fn pack<S: Simd>(&self, rows: Range<usize>, depth: Range<usize>, to: *mut f32);
}

/// The panels of some rows: their first row, their rows, and where their first number goes.
#[inline(always)]
pub fn panels<S: Simd>(rows: Range<usize>, depth: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let end = rows.end;
    let firsts = rows.step_by(S::ROWS).enumerate();
    firsts.map(move |(i, row)| (row, (end - row).min(S::ROWS), i * depth * S::LANES))
}

/// The right operand, K x N.
pub trait Right: Sync {
    /// K.
    fn depth(&self) -> usize;

    /// N.
    fn grid(&self) -> Grid;

    /// Writes each panel, one after the other: for each k of `depth` its 2 LANES columns, padded with zeros.
    ///
    /// # Safety
    /// `to` takes `panels.len()` x `depth.len()` x 2 LANES numbers, the ranges lie inside the operand, and the CPU
    /// has `S`.
    unsafe fn pack<S: Simd>(&self, depth: Range<usize>, panels: Range<usize>, to: *mut f32);
}

/// A matrix in memory, or one per image: element (r, c) of image i at `i * image_stride + r * row_stride + c * col_stride`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    data: &'a [T],
    images: usize,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
    image_stride: usize,
}

impl<'a, T: Scalar> Matrix<'a, T> {
    /// Panics if the last element lies outside `data`: kernels read through pointers.
    pub fn new(data: &'a [T], rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Self {
        Self::per_image(data, 1, 0, rows, cols, row_stride, col_stride)
    }

    /// One matrix for each of `images`.
    pub fn per_image(
        data: &'a [T],
        images: usize,
        image_stride: usize,
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> Self {
        if images * rows * cols > 0 {
            let last = (images - 1) * image_stride + (rows - 1) * row_stride + (cols - 1) * col_stride;
            assert!(last < data.len(), "a matrix reaches beyond its memory");
        }
        Matrix { data, images, rows, cols, row_stride, col_stride, image_stride }
    }
}

impl<T: Scalar> Matrix<'_, T> {
    /// Panels of a right operand whose columns follow each other: some k at a time for all panels, so that what is read
    /// are a few long runs.
    ///
    /// # Safety
    /// As [`Right::pack`].
    #[inline(always)]
    unsafe fn pack_lines<S: Simd>(&self, depth: Range<usize>, panels: Range<usize>, to: *mut f32) {
        const LINES: usize = 4;
        let (width, grid) = (2 * S::LANES, self.grid());
        for first in depth.clone().step_by(LINES) {
            let lines = first..(first + LINES).min(depth.end);
            for (i, panel) in panels.clone().enumerate() {
                let place = grid.place::<S>(panel);
                let at = place.image * self.image_stride + place.pixel;
                for k in lines.clone() {
                    // SAFETY: `new` has checked that every (k, column) lies inside `data`; the caller vouches for `to`.
                    unsafe {
                        let from = self.data.as_ptr().add(at + k * self.row_stride);
                        let to = to.add((i * depth.len() + k - depth.start) * width);
                        run::<S, T>(from, place.columns, to, width);
                    }
                }
            }
        }
    }
}

impl<T: Scalar> Left for Matrix<'_, T> {
    fn size(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, rows: Range<usize>, depth: Range<usize>, to: *mut f32) {
        let (row_stride, col_stride) = (self.row_stride, self.col_stride);
        // SAFETY: `new` has checked that every (row, k) lies inside `data`; the caller vouches for `to`.
        unsafe {
            let from = self.data.as_ptr().add(depth.start * col_stride);
            if row_stride == 1 && col_stride != 1 {
                for k in 0..depth.len() {
                    for (row, count, place) in panels::<S>(rows.clone(), depth.len()) {
                        run::<S, T>(from.add(k * col_stride + row), count, to.add(place + k * S::LANES), S::LANES);
                    }
                }
                return;
            }
            for (row, count, place) in panels::<S>(rows, depth.len()) {
                let (from, to) = (from.add(row * row_stride), to.add(place));
                if col_stride == 1 {
                    turned::<S, T>(from, row_stride, count, depth.len(), to, S::LANES);
                } else {
                    scattered(from, (row_stride, col_stride), count, depth.len(), to, S::LANES);
                }
            }
        }
    }
}

impl<T: Scalar> Right for Matrix<'_, T> {
    fn depth(&self) -> usize {
        self.rows
    }

    fn grid(&self) -> Grid {
        Grid { images: self.images, pixels: self.cols }
    }

    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, depth: Range<usize>, panels: Range<usize>, to: *mut f32) {
        let (width, grid) = (2 * S::LANES, self.grid());
        if self.col_stride == 1 && self.row_stride != 1 {
            // SAFETY: the caller's promise.
            return unsafe { self.pack_lines::<S>(depth, panels, to) };
        }
        for (i, panel) in panels.enumerate() {
            let place = grid.place::<S>(panel);
            // SAFETY: as for the left operand.
            unsafe {
                let to = to.add(i * depth.len() * width);
                let from = self.data.as_ptr().add(
                    place.image * self.image_stride + place.pixel * self.col_stride + depth.start * self.row_stride,
                );
                if self.row_stride == 1 {
                    let first = place.columns.min(S::LANES);
                    turned::<S, T>(from, self.col_stride, first, depth.len(), to, width);
                    if place.columns > S::LANES {
                        let from = from.add(S::LANES * self.col_stride);
                        turned::<S, T>(
                            from,
                            self.col_stride,
                            place.columns - S::LANES,
                            depth.len(),
                            to.add(S::LANES),
                            width,
                        );
                    }
                } else {
                    scattered(from, (self.col_stride, self.row_stride), place.columns, depth.len(), to, width);
                }
            }
        }
    }
}

/// Copies `count` consecutive numbers and pads them with zeros to `width`, a multiple of LANES.
///
/// # Safety
/// `from` has `count` numbers, `to` room for `width`.
#[inline(always)]
pub unsafe fn run<S: Simd, T: Scalar>(from: *const T, count: usize, to: *mut f32, width: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let whole = count - count % S::LANES;
        let mut i = 0;
        while i < whole {
            S::store(to.add(i), T::load::<S>(from.add(i)));
            i += S::LANES;
        }
        while i < width {
            let lanes = first(count.saturating_sub(i).min(S::LANES));
            S::store(to.add(i), T::load_where::<S>(from.wrapping_add(i), lanes));
            i += S::LANES;
        }
    }
}

/// `count` lines of `depth` consecutive numbers become columns: `to[k * width + i] = from[i * stride + k]`, zeros for
/// `count <= i < LANES`.
///
/// # Safety
/// `count` is at most LANES; `from` has the lines, `to` has `depth` rows of `width`, at least LANES.
#[inline(always)]
pub unsafe fn turned<S: Simd, T: Scalar>(
    from: *const T,
    stride: usize,
    count: usize,
    depth: usize,
    to: *mut f32,
    width: usize,
) {
    let whole = depth - depth % S::LANES;
    let mut k = 0;
    // SAFETY: the caller's promise; the last step reads and writes only what is left.
    unsafe {
        while k < whole {
            S::transpose(
                #[inline(always)]
                |i| if i < count { T::load::<S>(from.add(i * stride + k)) } else { S::zero() },
                #[inline(always)]
                |j, column| S::store(to.add((k + j) * width), column),
            );
            k += S::LANES;
        }
        if k < depth {
            let lanes = first(depth - k);
            S::transpose(
                #[inline(always)]
                |i| if i < count { T::load_where::<S>(from.add(i * stride + k), lanes) } else { S::zero() },
                #[inline(always)]
                |j, column| {
                    if k + j < depth {
                        S::store(to.add((k + j) * width), column);
                    }
                },
            );
        }
    }
}

/// As [`turned`] for any two strides (of line, of k), with zeros up to `width`.
#[inline(always)]
unsafe fn scattered<T: Scalar>(
    from: *const T,
    stride: (usize, usize),
    count: usize,
    depth: usize,
    to: *mut f32,
    width: usize,
) {
    for k in 0..depth {
        for i in 0..width {
            // SAFETY: the caller's promise.
            unsafe {
                *to.add(k * width + i) =
                    if i < count { (*from.add(i * stride.0 + k * stride.1)).to_f32() } else { 0.0 };
            }
        }
    }
}

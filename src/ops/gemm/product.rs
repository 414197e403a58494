//! The blocked product: blocks of k outside, panels of A inside, B's block in the second-level cache. Parallel over
//! tiles of the result only, and a result's element is always the same chain of operations (blocks of k in order, in
//! each the k in order), so its bits depend neither on the tiles nor on the number of threads.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use super::micro::{Finish, tile};
use super::pack::{Grid, Left, Right};
use super::simd::{Isa, Kernel, Scalar, Simd};
use crate::device::threads;

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

/// The result: element (m, image, pixel) at `image * image_stride + m * row_stride + pixel`, or where the lattice says.
pub struct Out<'a, T> {
    to: *mut T,
    row_stride: usize,
    image_stride: usize,
    lattice: Option<Lattice>,
    add: bool,
    bias: Bias<'a>,
    of: PhantomData<&'a mut T>,
}

// SAFETY: tasks write disjoint elements of what was borrowed exclusively.
unsafe impl<T: Send> Sync for Out<'_, T> {}

impl<'a, T: Scalar> Out<'a, T> {
    /// # Safety
    /// `to` is valid for writes of every element of the product for `'a`, and for reads if the result is added.
    pub unsafe fn new(to: *mut T, row_stride: usize, image_stride: usize) -> Self {
        Out { to, row_stride, image_stride, lattice: None, add: false, bias: Bias::None, of: PhantomData }
    }

    pub fn bias(self, bias: Bias<'a>) -> Self {
        Out { bias, ..self }
    }

    pub fn lattice(self, lattice: Lattice) -> Self {
        Out { lattice: Some(lattice), ..self }
    }
}

impl Out<'_, f32> {
    /// Adds the product to what is there.
    pub fn adding(self) -> Self {
        Out { add: true, ..self }
    }
}

/// A (rows x depth) times B (depth x grid) into `out`.
pub struct Product<'a, A, B, T> {
    pub a: &'a A,
    pub b: &'a B,
    pub rows: usize,
    pub grid: Grid,
    pub depth: usize,
    /// Every block of k but the last is this long; see [`block_of`].
    pub block: usize,
    pub out: Out<'a, T>,
}

/// The length of the blocks of k: even ones of at most 384, in multiples of `unit`.
pub fn block_of(depth: usize, unit: usize) -> usize {
    const LONGEST: usize = 384;
    let longest = (LONGEST / unit).max(1);
    let units = depth.div_ceil(unit).max(1);
    units.div_ceil(units.div_ceil(longest)) * unit
}

impl<A: Left, B: Right, T: Scalar> Product<'_, A, B, T> {
    /// On all threads where that pays.
    pub fn run(&self) {
        self.run_on(Isa::best());
    }

    pub fn run_on(&self, isa: Isa) {
        isa.run(Parallel(self));
    }

    /// On this thread alone.
    pub fn run_serial(&self, isa: Isa) {
        isa.run(Serial(self));
    }
}

struct Parallel<'p, 'a, A, B, T>(&'p Product<'a, A, B, T>);

impl<A: Left, B: Right, T: Scalar> Kernel for Parallel<'_, '_, A, B, T> {
    type Output = ();
    unsafe fn run<S: Simd>(self) {
        let product = self.0;
        let panels = product.grid.panels::<S>();
        if product.rows == 0 || panels == 0 {
            return;
        }
        let (rows, columns) = tiles::<S>(product.rows, panels, product.depth);
        let (down, across) = (product.rows.div_ceil(rows), panels.div_ceil(columns));
        let operations = product.rows * product.grid.columns() * product.depth / 16;
        threads::parallel_for(down * across, operations, |task| {
            let (y, x) = (task % down * rows, task / down * columns);
            let (rows, columns) = (y..(y + rows).min(product.rows), x..(x + columns).min(panels));
            // SAFETY: the CPU has `S`, the promise to `run`; the tiles are disjoint.
            unsafe { S::vectorize(|| product.tile::<S>(rows, columns)) }
        });
    }
}

struct Serial<'p, 'a, A, B, T>(&'p Product<'a, A, B, T>);

impl<A: Left, B: Right, T: Scalar> Kernel for Serial<'_, '_, A, B, T> {
    type Output = ();
    unsafe fn run<S: Simd>(self) {
        let product = self.0;
        let panels = product.grid.panels::<S>();
        for from in (0..panels).step_by(WIDEST) {
            let columns = from..(from + WIDEST).min(panels);
            // SAFETY: the CPU has `S`, the promise to `run`.
            unsafe { S::vectorize(|| product.tile::<S>(0..product.rows, columns)) }
        }
    }
}

/// Panels of B in a tile: its block then fills a good part of a second-level cache.
const WIDEST: usize = 16;

/// Rows and panels of a tile, from the shape alone: wide enough that packing costs little, and enough tiles to share.
fn tiles<S: Simd>(rows: usize, panels: usize, depth: usize) -> (usize, usize) {
    const WORK: usize = 1 << 22;
    let wanted = (rows * panels * 2 * S::LANES * depth / WORK).clamp(1, 16);
    let across = panels.div_ceil(WIDEST).max(wanted.min(panels.div_ceil(WIDEST / 2)));
    let columns = panels.div_ceil(across);
    let down = wanted.div_ceil(across).min(rows.div_ceil(6 * S::ROWS));
    (rows.div_ceil(down).next_multiple_of(S::ROWS), columns)
}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line {
    _numbers: [f32; 16],
}

/// A thread's buffers: a panel of A, a block of B, and a tile of results that cannot be written in place.
#[derive(Default)]
struct Scratch([Vec<Line>; 3]);

impl Scratch {
    /// Room for `lens` numbers each, left as the last user left them.
    fn room(&mut self, lens: [usize; 3]) -> [*mut f32; 3] {
        let mut at = [std::ptr::null_mut(); 3];
        for ((buffer, len), at) in self.0.iter_mut().zip(lens).zip(&mut at) {
            let lines = len.div_ceil(16);
            if buffer.len() < lines {
                buffer.resize(lines, Line { _numbers: [0.0; 16] });
            }
            *at = buffer.as_mut_ptr().cast();
        }
        at
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl<A: Left, B: Right, T: Scalar> Product<'_, A, B, T> {
    /// One tile of the result.
    ///
    /// # Safety
    /// The CPU has `S`, and no other task writes these elements.
    #[inline(always)]
    unsafe fn tile<S: Simd>(&self, rows: Range<usize>, panels: Range<usize>) {
        let width = 2 * S::LANES;
        let direct = T::DTYPE == candle_core::DType::F32 && self.out.lattice.is_none();
        let held = if direct { 0 } else { rows.len() * panels.len() * width };
        let block = self.block.min(self.depth);
        SCRATCH.with_borrow_mut(|scratch| {
            let [a, b, sums] = scratch.room([block * S::LANES, block * panels.len() * width, held]);
            let mut k = 0;
            loop {
                let depth = k..(k + self.block).min(self.depth);
                // SAFETY: the buffers have the room that `pack` and `block` need; ranges lie inside the operands.
                unsafe {
                    self.b.pack::<S>(depth.clone(), panels.clone(), self.grid, b);
                    self.block::<S>(rows.clone(), panels.clone(), depth.clone(), [a, b, sums], direct);
                }
                k = depth.end;
                if k >= self.depth {
                    break;
                }
            }
            if !direct {
                // SAFETY: `sums` holds the tile.
                unsafe { self.scatter::<S>(rows, panels, sums) }
            }
        });
    }

    #[inline(always)]
    unsafe fn block<S: Simd>(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        depth: Range<usize>,
        [a, b, sums]: [*mut f32; 3],
        direct: bool,
    ) {
        let width = 2 * S::LANES;
        let finish = match self.out.bias {
            _ if depth.start > 0 || self.out.add => Finish::Add,
            Bias::None => Finish::Store,
            Bias::Row(bias) => Finish::RowBias(bias.as_ptr()),
            Bias::Column(bias) => Finish::ColumnBias(bias.as_ptr()),
        };
        for row in rows.clone().step_by(S::ROWS) {
            let count = (rows.end - row).min(S::ROWS);
            // SAFETY: panels and results lie where `tile` made room and where `Out::new` was promised.
            unsafe {
                self.a.pack::<S>(row, count, depth.clone(), a);
                for (i, panel) in panels.clone().enumerate() {
                    let place = self.grid.place::<S>(panel);
                    let b = b.add(i * depth.len() * width);
                    let (c, stride) = if direct {
                        let at = place.image * self.out.image_stride + row * self.out.row_stride + place.pixel;
                        (self.out.to.cast::<f32>().add(at), self.out.row_stride)
                    } else {
                        (sums.add((row - rows.start) * panels.len() * width + i * width), panels.len() * width)
                    };
                    let finish = finish.at(row, place.pixel);
                    tile::<S>(depth.len(), a, count, b, place.columns, c, stride, finish);
                }
            }
        }
    }

    /// Rounds a finished tile into the result.
    #[inline(always)]
    unsafe fn scatter<S: Simd>(&self, rows: Range<usize>, panels: Range<usize>, sums: *const f32) {
        let width = 2 * S::LANES;
        for row in rows.clone() {
            for (i, panel) in panels.clone().enumerate() {
                let place = self.grid.place::<S>(panel);
                // SAFETY: the tile was written by `block`, the result is as `Out::new` was promised.
                unsafe {
                    let from = sums.add(((row - rows.start) * panels.len() + i) * width);
                    let to = self.out.to.add(place.image * self.out.image_stride + row * self.out.row_stride);
                    for p in 0..place.columns {
                        let pixel = place.pixel + p;
                        let at = match self.out.lattice {
                            None => pixel,
                            Some(l) => l.first + pixel / l.width * l.line_step + pixel % l.width * l.pixel_step,
                        };
                        *to.add(at) = T::from_f32(*from.add(p));
                    }
                }
            }
        }
    }
}

//! The blocked product: blocks of k outside, panels of A inside, B's block in the second-level cache. Parallel over
//! tiles of the result only, and a result's element is always the same chain of operations (blocks of k in order, in
//! each the k in order), so its bits depend neither on the tiles nor on the number of threads.

use std::cell::RefCell;
use std::ops::Range;

use super::micro::{Finish, tile};
use super::out::{Bias, Out};
use super::pack::{Grid, Left, Right};
use super::simd::{Kernel, Scalar, Simd, dispatch, first};
use candle_core::DType;

use crate::device::{Buffer, is_dry, note_flops, note_kept_scratch, threads};

/// A times B.
pub struct Product<'a, A, B> {
    a: &'a A,
    b: &'a B,
    rows: usize,
    grid: Grid,
    depth: usize,
    /// Every block of k but the last is this long.
    block: usize,
}

/// The length of the blocks of k: even ones of at most 384, in multiples of `unit`.
pub(super) fn block_of(depth: usize, unit: usize) -> usize {
    const LONGEST: usize = 384;
    let longest = (LONGEST / unit).max(1);
    let units = depth.div_ceil(unit).max(1);
    units.div_ceil(units.div_ceil(longest)) * unit
}

impl<'a, A: Left, B: Right> Product<'a, A, B> {
    /// The sum over k is cut into blocks of whole `unit`s. Panics if the operands' depths differ.
    pub fn new(a: &'a A, b: &'a B, unit: usize) -> Self {
        let (rows, depth) = a.size();
        assert_eq!(depth, b.depth(), "operands of different depth");
        Product { a, b, rows, grid: b.grid(), depth, block: block_of(depth, unit) }
    }

    /// Into new memory: (images, rows, pixels).
    pub fn to_vec<T: Scalar>(&self, bias: Bias) -> Vec<T> {
        let len = self.rows * self.grid.columns();
        let mut values = Vec::with_capacity(len);
        let memory = &mut values.spare_capacity_mut()[..len];
        self.run(Out::fresh(memory, self.grid.pixels, self.rows * self.grid.pixels).bias(bias));
        // SAFETY: the capacity is there, and the product has stored every element of every row of every image.
        unsafe { values.set_len(len) };
        values
    }

    /// On all threads where that pays.
    pub fn run<T: Scalar>(&self, out: Out<T>) {
        out.check(self.rows, self.grid);
        dispatch(Parallel { product: self, out });
    }
}

struct Parallel<'p, 'a, A, B, T> {
    product: &'p Product<'a, A, B>,
    out: Out<'p, T>,
}

impl<A: Left, B: Right, T: Scalar> Kernel for Parallel<'_, '_, A, B, T> {
    type Output = ();
    unsafe fn run<S: Simd>(self) {
        let Parallel { product, out } = &self;
        let panels = product.grid.panels::<S>();
        if product.rows == 0 || panels == 0 {
            return;
        }
        let (down, across) = tiles::<S>(product.rows, panels, product.depth);
        let operations = product.rows * product.grid.columns() * product.depth / 16;
        if is_dry() {
            note_flops(2.0 * (product.rows * product.grid.columns()) as f64 * product.depth as f64);
            let rows = product.rows.div_ceil(S::ROWS).div_ceil(down) * S::ROWS;
            let room = product.room::<S, T>(rows.min(product.rows), panels.div_ceil(across), out);
            let helped = threads::at_once(down * across, operations) > 1;
            note_kept_scratch(room.map(|numbers| numbers * size_of::<f32>()), helped);
            return;
        }
        threads::parallel_for(down * across, operations, |task| {
            let rows = part(task % down, down, product.rows.div_ceil(S::ROWS));
            let rows = rows.start * S::ROWS..(rows.end * S::ROWS).min(product.rows);
            // SAFETY: the CPU has `S`, the promise to `run`; the tiles are disjoint.
            unsafe { product.tile::<S, T>(rows, part(task / down, across, panels), out) }
        });
    }
}

/// Panels of B in a tile at most: its block then fills a good part of a second-level cache.
const WIDEST: usize = 32;

/// The i-th of `parts` nearly equal parts of 0..whole.
fn part(i: usize, parts: usize, whole: usize) -> Range<usize> {
    i * whole / parts..(i + 1) * whole / parts
}

/// Into how many tiles the rows and the panels are cut: such that little is packed twice and the threads have equal
/// shares. This depends on the number of threads, which changes no bit.
fn tiles<S: Simd>(rows: usize, panels: usize, depth: usize) -> (usize, usize) {
    /// Multiply-adds by which packing one number is as dear, in columns or rows of a tile.
    const PACKING: f64 = 12.0;
    /// Multiply-adds that are worth a task.
    const TASK: usize = 1 << 19;
    /// A part of the whole for which a thread may be late or away.
    const AWAY: f64 = 0.03;
    const DOWN: [usize; 16] = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96];
    const COLUMNS: [usize; 12] = [WIDEST, 28, 24, 20, 16, 12, 10, 8, 6, 4, 2, 1];
    let threads = threads::threads() as f64;
    let (high, whole) = (rows.div_ceil(S::ROWS), (rows.div_ceil(S::ROWS) * panels) as f64);
    let most = (rows * panels * 2 * S::LANES * depth / TASK).max(1);
    let mut best = (f64::MAX, 1, panels.div_ceil(WIDEST));
    for across in COLUMNS.map(|columns| panels.div_ceil(columns)) {
        for down in DOWN.into_iter().take_while(|&down| down == 1 || (down * across <= most && down <= high)) {
            let tasks = (down * across) as f64;
            let width = (panels * 2 * S::LANES) as f64 / across as f64;
            let packing = PACKING / width + PACKING * down as f64 / rows as f64;
            // The busiest thread has so many tasks, one of them of the largest.
            let largest = (high.div_ceil(down) * panels.div_ceil(across)) as f64;
            let busy = ((tasks / threads).ceil() - 1.0) * whole / tasks + largest;
            let uneven = if threads > 1.0 { busy * threads / whole + AWAY * threads / tasks } else { 1.0 };
            let cost = (1.0 + packing) * uneven;
            if cost < best.0 {
                best = (cost, down, across);
            }
        }
        if across >= most {
            break;
        }
    }
    (best.1, best.2)
}

/// Panels of A that are packed together, so that what is read of their columns is worth the way.
const GROUP: usize = 4;

/// A thread's buffers: some panels of A, a block of B, and a tile of results that cannot be written in place. Not on the
/// heap that is counted, since which thread comes to need how much is a matter of timing.
#[derive(Default)]
struct Scratch([Option<Buffer>; 3]);

impl Scratch {
    /// Room for `lens` numbers each, left as the last user left them.
    fn room(&mut self, lens: [usize; 3]) -> [*mut f32; 3] {
        let mut at = [std::ptr::null_mut(); 3];
        for ((buffer, len), at) in self.0.iter_mut().zip(lens).zip(&mut at) {
            if buffer.as_ref().is_none_or(|buffer| buffer.len() < len) {
                let Ok(larger) = Buffer::unbudgeted(DType::F32, len) else {
                    std::alloc::handle_alloc_error(std::alloc::Layout::new::<f32>())
                };
                *buffer = Some(larger);
            }
            if let Some(buffer) = buffer {
                *at = buffer.as_mut_slice::<f32>().as_mut_ptr();
            }
        }
        at
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl<A: Left, B: Right> Product<'_, A, B> {
    /// How many numbers a tile of `rows` and `panels` needs in each of its thread's buffers.
    fn room<S: Simd, T: Scalar>(&self, rows: usize, panels: usize, out: &Out<T>) -> [usize; 3] {
        let width = 2 * S::LANES;
        let held = if out.direct() { 0 } else { rows * panels * width };
        let block = self.block.min(self.depth);
        [GROUP * block * S::LANES, block * panels * width, held]
    }

    /// One tile of the result, with this thread's buffers.
    ///
    /// # Safety
    /// The CPU has `S`, and no other task writes these elements.
    unsafe fn tile<S: Simd, T: Scalar>(&self, rows: Range<usize>, panels: Range<usize>, out: &Out<T>) {
        let numbers = self.room::<S, T>(rows.len(), panels.len(), out);
        SCRATCH.with_borrow_mut(|scratch| {
            let room = scratch.room(numbers);
            // SAFETY: the CPU has `S`; the buffers have the room that a block and the tile need.
            unsafe {
                S::vectorize(
                    #[inline(always)]
                    || self.tile_in::<S, T>(rows, panels, room, out),
                )
            }
        });
    }

    #[inline(always)]
    unsafe fn tile_in<S: Simd, T: Scalar>(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        [a, b, sums]: [*mut f32; 3],
        out: &Out<T>,
    ) {
        let mut k = 0;
        loop {
            let depth = k..(k + self.block).min(self.depth);
            // SAFETY: the promise to `tile`; ranges lie inside the operands.
            unsafe {
                if !depth.is_empty() {
                    self.b.pack::<S>(depth.clone(), panels.clone(), b);
                }
                self.block::<S, T>(rows.clone(), panels.clone(), depth.clone(), [a, b, sums], out);
            }
            k = depth.end;
            if k >= self.depth {
                break;
            }
        }
        if !out.direct() {
            // SAFETY: `sums` holds the tile.
            unsafe { self.scatter::<S, T>(rows, panels, sums, out) }
        }
    }

    #[inline(always)]
    unsafe fn block<S: Simd, T: Scalar>(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        depth: Range<usize>,
        [a, b, sums]: [*mut f32; 3],
        out: &Out<T>,
    ) {
        let width = 2 * S::LANES;
        let finish = match out.bias {
            _ if depth.start > 0 || out.add => Finish::Add,
            Bias::None => Finish::Store,
            Bias::Row(bias) => Finish::RowBias(bias.as_ptr()),
            Bias::Column(bias) => Finish::ColumnBias(bias.as_ptr()),
        };
        for first in rows.clone().step_by(GROUP * S::ROWS) {
            let group = first..(first + GROUP * S::ROWS).min(rows.end);
            // SAFETY: panels and results lie where `tile` made room and where `Out` has checked.
            unsafe {
                if !depth.is_empty() {
                    self.a.pack::<S>(group.clone(), depth.clone(), a);
                }
                for (g, row) in group.clone().step_by(S::ROWS).enumerate() {
                    let a = a.add(g * depth.len() * S::LANES);
                    let count = (group.end - row).min(S::ROWS);
                    for (i, panel) in panels.clone().enumerate() {
                        let place = self.grid.place::<S>(panel);
                        let b = b.add(i * depth.len() * width);
                        let (c, stride) = if out.direct() {
                            let at = place.image * out.image_stride + row * out.row_stride + place.pixel;
                            (out.to.cast::<f32>().add(at), out.row_stride)
                        } else {
                            (sums.add((row - rows.start) * panels.len() * width + i * width), panels.len() * width)
                        };
                        tile::<S>(depth.len(), a, count, b, place.columns, c, stride, finish.at(row, place.pixel));
                    }
                }
            }
        }
    }

    /// Rounds a finished tile into the result.
    #[inline(always)]
    unsafe fn scatter<S: Simd, T: Scalar>(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        sums: *const f32,
        out: &Out<T>,
    ) {
        let width = 2 * S::LANES;
        for (i, panel) in panels.clone().enumerate() {
            let place = self.grid.place::<S>(panel);
            let (first_row, step) = (rows.start, panels.len() * width);
            // SAFETY: the tile was written by `block`, the result is as `Out` has checked.
            unsafe {
                let from = sums.add(i * width);
                let to = out.to.add(place.image * out.image_stride);
                if let Some(lattice) = out.lattice {
                    lattice.scatter::<S, T>(from, step, place, rows.clone(), to, out.row_stride);
                    continue;
                }
                let low = place.columns.min(S::LANES);
                let (to, lanes) = (to.add(place.pixel), [first(low), first(place.columns - low)]);
                for row in rows.clone() {
                    let (from, to) = (from.add((row - first_row) * step), to.add(row * out.row_stride));
                    T::store_where::<S>(to, lanes[0], S::load(from));
                    T::store_where::<S>(to.wrapping_add(S::LANES), lanes[1], S::load(from.add(S::LANES)));
                }
            }
        }
    }
}

//! Elements that change their places: concatenation, transposes, nearest-neighbour resampling.

use anyhow::{Result, bail};
use candle_core::DType;

use super::{THREADS, bytes, launch};
use crate::kernels::sizes::{PACK, aligned, small, width};
use crate::kernels::{Address, Arg, Family, Grid, Launcher, suffix};

/// Bytes that are moved at once, and the two widths in them.
fn units(dtype: DType, addresses: &[Address], widths: [usize; 2]) -> Result<(usize, [usize; 2])> {
    let size = bytes(dtype)?;
    let whole = aligned(addresses) && widths.iter().all(|width| (width * size).is_multiple_of(PACK));
    let unit = if whole { PACK } else { size };
    Ok((unit, widths.map(|width| width * size / unit)))
}

/// y (rows, a's width + b's) = a (rows, its width) beside b: the concatenation of channels, whose rows are the batch's.
pub fn join_rows(
    launcher: &dyn Launcher,
    dtype: DType,
    (a, a_width): (Address, usize),
    (b, b_width): (Address, usize),
    y: Address,
    rows: usize,
) -> Result<()> {
    let (unit, widths) = units(dtype, &[a, b, y], [a_width, b_width])?;
    let args = [a.into(), b.into(), y.into()];
    move_rows(launcher, &format!("join_rows_{unit}"), rows, widths, &args)
}

/// The way back: a and b of x.
pub fn split_rows(
    launcher: &dyn Launcher,
    dtype: DType,
    x: Address,
    (a, a_width): (Address, usize),
    (b, b_width): (Address, usize),
    rows: usize,
) -> Result<()> {
    let (unit, widths) = units(dtype, &[a, b, x], [a_width, b_width])?;
    let args = [x.into(), a.into(), b.into()];
    move_rows(launcher, &format!("split_rows_{unit}"), rows, widths, &args)
}

fn move_rows(launcher: &dyn Launcher, kernel: &str, rows: usize, [a, b]: [usize; 2], operands: &[Arg]) -> Result<()> {
    let args = [operands, &[small(rows)?.into(), small(a)?.into(), small(b)?.into()]].concat();
    launch(launcher, kernel, small(rows * (a + b))? as usize, 1, &args)
}

/// (batch, rows, columns) -> (batch, columns, rows): images to tokens and back.
pub fn transpose(
    launcher: &dyn Launcher,
    dtype: DType,
    x: Address,
    y: Address,
    batch: usize,
    rows: usize,
    columns: usize,
) -> Result<()> {
    if batch * rows * columns == 0 {
        return Ok(());
    }
    let even = x.aligned(4) && y.aligned(4) && rows.is_multiple_of(2) && columns.is_multiple_of(2);
    let (kernel, tile) = match (bytes(dtype)?, even) {
        (4, _) => ("transpose_4", 32),
        (_, true) => ("transpose_2", 64),
        (_, false) => ("transpose_loose_2", 32),
    };
    let squares = |len: usize| small(len.div_ceil(tile));
    // Squares along the rows are the grid's second dimension, which has an end.
    if rows.div_ceil(tile) > 65_535 || batch > 65_535 {
        bail!("transposing {batch} times {rows} x {columns} numbers");
    }
    let grid = Grid { blocks: [squares(columns)?, squares(rows)?, small(batch)?], threads: THREADS, shared: 0 };
    let args = [x.into(), y.into(), small(rows)?.into(), small(columns)?.into()];
    launcher.launch(Family::Glue, kernel, grid, &args)
}

/// Nearest-neighbour resampling of planes (planes, h, w) <-> (planes, height, width).
#[derive(Clone, Copy, Debug)]
pub struct Resample {
    pub dtype: DType,
    pub planes: usize,
    pub from: [usize; 2],
    pub to: [usize; 2],
}

impl Resample {
    /// Whether it is the usual doubling, in whole packs.
    fn doubles(&self, addresses: &[Address]) -> bool {
        let [[h, w], to] = [self.from, self.to];
        to == [2 * h, 2 * w] && w.is_multiple_of(width(self.dtype)) && aligned(addresses)
    }

    /// The four sizes and the two scales, which are rounded to f32 as torch does.
    fn args(&self) -> Result<[Arg; 6]> {
        let ([h, w], [height, width]) = (self.from, self.to);
        let scale = |from: usize, to: usize| Arg::F32(from as f32 / to as f32);
        let [a, b, c, d] = [small(h)?, small(w)?, small(height)?, small(width)?].map(Arg::from);
        Ok([a, b, c, d, scale(h, height), scale(w, width)])
    }

    /// y of x.
    pub fn forward(&self, launcher: &dyn Launcher, x: Address, y: Address) -> Result<()> {
        let ([h, w], [height, wide]) = (self.from, self.to);
        let (source, result) = (self.planes * h * w, self.planes * height * wide);
        small(source)?;
        if self.doubles(&[x, y]) {
            let args = [x.into(), y.into(), small(source)?.into(), small(w)?.into()];
            let kernel = format!("upsample_double_{}", suffix(self.dtype)?);
            return launch(launcher, &kernel, source, width(self.dtype), &args);
        }
        let args = [&[x.into(), y.into(), small(result)?.into()][..], &self.args()?].concat();
        launch(launcher, &format!("upsample_{}", bytes(self.dtype)?), result, 1, &args)
    }

    /// dx: the sums over the pixels of dy that each pixel was the source of.
    pub fn backward(&self, launcher: &dyn Launcher, dy: Address, dx: Address) -> Result<()> {
        let [h, w] = self.from;
        let (count, end) = (self.planes * h * w, suffix(self.dtype)?);
        if self.doubles(&[dy, dx]) {
            let args = [dy.into(), dx.into(), small(count)?.into(), small(w)?.into()];
            return launch(launcher, &format!("upsample_double_backward_{end}"), count, width(self.dtype), &args);
        }
        let args = [&[dy.into(), dx.into(), small(count)?.into()][..], &self.args()?].concat();
        launch(launcher, &format!("upsample_backward_{end}"), count, 1, &args)
    }
}

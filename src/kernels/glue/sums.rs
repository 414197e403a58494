//! What is added to whole planes and rows, and the sums that are its backward; the embedding. Sums have a fixed order.

use anyhow::{Result, bail};
use candle_core::DType;

use super::{THREADS, launch, rows_grid};
use crate::kernels::sizes::{aligned, line, small, threads, width};
use crate::kernels::{Address, Arg, Family, Grid, Launcher, suffix};

/// Planes (planes, pixels), to each of which one number is added: one of t (channels), channels dividing the planes. With
/// as many channels as planes that is the time embedding; with a layer's channels, its bias.
#[derive(Clone, Copy, Debug)]
pub struct Planes {
    pub dtype: DType,
    pub planes: usize,
    pub pixels: usize,
    pub channels: usize,
}

impl Planes {
    /// Elements that are moved at once, and the kernels' name's end.
    fn pack(&self, addresses: &[Address]) -> Result<(usize, String)> {
        if self.channels == 0 || !self.planes.is_multiple_of(self.channels) {
            bail!("{} planes are not several times {} channels", self.planes, self.channels);
        }
        let (width, end) = (width(self.dtype), suffix(self.dtype)?);
        Ok(match aligned(addresses) && self.pixels.is_multiple_of(width) {
            true => (width, end.to_string()),
            false => (1, format!("loose_{end}")),
        })
    }

    /// y = x + t. In place if y is x.
    pub fn add(&self, launcher: &dyn Launcher, x: Address, t: Address, y: Address) -> Result<()> {
        let (pack, end) = self.pack(&[x, y])?;
        let count = self.planes * self.pixels;
        let shape = [small(self.pixels)?.into(), small(self.channels)?.into()];
        let args = [&[x.into(), t.into(), y.into(), small(count)?.into()][..], &shape].concat();
        launch(launcher, &format!("add_planes_{end}"), count, pack, &args)
    }

    fn sum_each(&self, launcher: &dyn Launcher, kernel: &str, dy: Address, sums: Address) -> Result<()> {
        let (pack, end) = self.pack(&[dy])?;
        let threads = threads(self.pixels / pack, 32, THREADS);
        let grid = Grid { blocks: [small(self.planes)?, 1, 1], threads, shared: 0 };
        let args = [dy.into(), sums.into(), small(self.pixels)?.into()];
        launcher.launch(Family::Glue, &format!("{kernel}_{end}"), grid, &args)
    }

    /// dt (planes), in the dtype: the sums over each plane, for a t with a number for each.
    pub fn sum(&self, launcher: &dyn Launcher, dy: Address, dt: Address) -> Result<()> {
        if self.planes == 0 {
            return Ok(());
        }
        self.sum_each(launcher, "sum_planes", dy, dt)
    }

    /// dt (channels), f32, plus the sums over each channel's planes: a bias's gradient.
    pub fn add_sums(&self, launcher: &dyn Launcher, dy: Address, dt: Address) -> Result<()> {
        if self.planes == 0 {
            return Ok(());
        }
        let scratch = launcher.scratch(4 * self.planes)?;
        self.sum_each(launcher, "sum_planes_wide", dy, scratch.address())?;
        add_rows(launcher, scratch.address(), dt, self.planes / self.channels, self.channels)
    }
}

/// to (columns) += the sum over the rows of x (rows, columns), f32, in f64.
fn add_rows(launcher: &dyn Launcher, x: Address, to: Address, rows: usize, columns: usize) -> Result<()> {
    let args = [x.into(), to.into(), small(rows)?.into(), small(columns)?.into()];
    launcher.launch(Family::Glue, "add_rows_f32", line(columns, THREADS)?, &args)
}

/// y (rows, width) = x + bias (width), plus residual (rows, width); rounded after each sum. Without x ([`Address::NULL`])
/// the bias in every row, for a matrix product that adds to it and rounds once. Without residual none. In place if y is x
/// or the residual.
#[allow(clippy::too_many_arguments, reason = "four operands and their shape")]
pub fn add_bias(
    launcher: &dyn Launcher,
    dtype: DType,
    x: Address,
    bias: Address,
    residual: Address,
    y: Address,
    rows: usize,
    row_width: usize,
) -> Result<()> {
    if rows * row_width == 0 {
        return Ok(());
    }
    let whole = aligned(&[x, bias, residual, y]) && row_width.is_multiple_of(width(dtype));
    let operands = [x.into(), bias.into(), residual.into(), y.into()];
    let args = [&operands[..], &[small(rows)?.into(), small(row_width)?.into(), Arg::I32(whole.into())]].concat();
    let grid = rows_grid(rows, row_width, width(dtype))?;
    launcher.launch(Family::Glue, &format!("add_bias_{}", suffix(dtype)?), grid, &args)
}

/// dbias (width), f32, plus the sums over the rows of dy (rows, width): the gradient of a linear layer's bias.
pub fn add_column_sums(
    launcher: &dyn Launcher,
    dtype: DType,
    dy: Address,
    dbias: Address,
    rows: usize,
    row_width: usize,
) -> Result<()> {
    const COLUMNS: usize = 32;
    if rows * row_width == 0 {
        return Ok(());
    }
    // Runs of at least 64 rows, and no more of them than a device has use for.
    let parts = rows.div_ceil(64).min(128);
    let scratch = launcher.scratch(4 * parts * row_width)?;
    let blocks = [small(row_width.div_ceil(COLUMNS))?, small(parts)?, 1];
    let args = [dy.into(), scratch.address().into(), small(rows)?.into(), small(row_width)?.into()];
    let grid = Grid { blocks, threads: 512, shared: 0 };
    launcher.launch(Family::Glue, &format!("sum_columns_{}", suffix(dtype)?), grid, &args)?;
    add_rows(launcher, scratch.address(), dbias, parts, row_width)
}

/// Tokens u32 (batch, length) and a table (rows, width) of vectors.
#[derive(Clone, Copy, Debug)]
pub struct Embedding {
    pub dtype: DType,
    pub batch: usize,
    pub length: usize,
    pub rows: usize,
    pub width: usize,
}

impl Embedding {
    fn tokens(&self) -> usize {
        self.batch * self.length
    }

    fn threads(&self, pack: usize) -> u32 {
        threads(self.width.div_ceil(pack), 32, THREADS)
    }

    /// y (batch, length, width) = table[id], plus positions (length or more, width) unless [`Address::NULL`]. The u32 at
    /// `wrong` becomes 1 if an id is no row of the table, and is left alone otherwise.
    pub fn forward(
        &self,
        launcher: &dyn Launcher,
        ids: Address,
        table: Address,
        positions: Address,
        y: Address,
        wrong: Address,
    ) -> Result<()> {
        if self.tokens() * self.width == 0 {
            return Ok(());
        }
        let pack = width(self.dtype);
        let whole = aligned(&[table, positions, y]) && self.width.is_multiple_of(pack);
        let operands = [ids.into(), table.into(), positions.into(), y.into()];
        let shape = [small(self.rows)?.into(), small(self.length)?.into(), small(self.width)?.into()];
        let args = [&operands[..], &shape, &[Arg::I32(whole.into()), wrong.into()]].concat();
        let grid = Grid { blocks: [small(self.tokens())?, 1, 1], threads: self.threads(pack), shared: 0 };
        launcher.launch(Family::Glue, &format!("embedding_{}", suffix(self.dtype)?), grid, &args)
    }

    /// Adds to the gradients of the table and the positions (f32; [`Address::NULL`] if frozen): the CPU's bits, since tokens
    /// that repeat are added one after the other.
    pub fn backward(
        &self,
        launcher: &dyn Launcher,
        ids: Address,
        dy: Address,
        table: Address,
        positions: Address,
    ) -> Result<()> {
        if self.tokens() * self.width == 0 {
            return Ok(());
        }
        let end = suffix(self.dtype)?;
        if table != Address::NULL {
            let shape = [small(self.tokens())?.into(), small(self.rows)?.into(), small(self.width)?.into()];
            let args = [&[ids.into(), dy.into(), table.into()][..], &shape].concat();
            let grid = Grid { blocks: [small(self.tokens())?, 1, 1], threads: self.threads(1), shared: 0 };
            launcher.launch(Family::Glue, &format!("embedding_backward_{end}"), grid, &args)?;
        }
        if positions == Address::NULL {
            return Ok(());
        }
        let row = self.length * self.width;
        let args = [dy.into(), positions.into(), small(self.batch)?.into(), (row as u64).into()];
        launch(launcher, &format!("positions_backward_{end}"), row, 1, &args)
    }
}

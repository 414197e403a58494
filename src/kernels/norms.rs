//! Group and layer normalisation (`kernels/norms*`): which of the launches a shape takes, and the scratch between them. Why
//! there are several is told at the kernels.
//!
//! Statistics are in f32 about the mean with f64 totals, as those of `ops`. Gradients of gamma and beta are added to f32
//! ranges; where these are frozen ([`Address::NULL`]) their sums are not finished. Activations and weights have one dtype.

use anyhow::{Result, bail};
use candle_core::DType;

use super::sizes::{aligned, line, small, threads, width};
use super::{Address, Arg, Family, Grid, Launcher, suffix};

#[cfg(all(test, any(feature = "cuda", feature = "emulate")))]
mod tests;

/// Packs that a thread keeps (`kernels/norms_moments.cuh`).
const HELD: usize = 6;
/// The same of a group's block, and the most threads of it (`kernels/norms_group.cuh`).
const GROUP_HELD: usize = 12;
const GROUP_THREADS: usize = 448;
/// A pair of f32: moments, or sums.
const PAIR: usize = 8;

/// What a norm computes from: y of x, times gamma plus beta, and their moments, which the backward needs.
#[derive(Clone, Copy, Debug)]
pub struct Forward {
    pub x: Address,
    pub gamma: Address,
    pub beta: Address,
    pub y: Address,
    /// Mean and 1/sqrt(variance + eps), two f32 for each group of each batch row or for each row.
    pub moments: Address,
}

/// The backward's operands; `moments` are the forward's.
#[derive(Clone, Copy, Debug)]
pub struct Backward {
    pub x: Address,
    pub dy: Address,
    pub gamma: Address,
    pub beta: Address,
    pub moments: Address,
    pub dx: Address,
    /// f32, added to; [`Address::NULL`] if frozen.
    pub dgamma: Address,
    pub dbeta: Address,
}

/// x (batch, channels, pixels) normalised over channels / groups channels and all pixels; then SiLU if `silu`.
#[derive(Clone, Copy, Debug)]
pub struct GroupNorm {
    pub dtype: DType,
    pub batch: usize,
    pub channels: usize,
    pub groups: usize,
    pub pixels: usize,
    pub eps: f64,
    pub silu: bool,
}

/// x (rows, width) normalised over its rows.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm {
    pub dtype: DType,
    pub rows: usize,
    pub width: usize,
    pub eps: f64,
}

/// Threads of a group's block in the backward, and how many of them share a channel.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Teams {
    threads: u32,
    team: u32,
}

impl GroupNorm {
    /// Bytes of the moments.
    pub fn moments_bytes(&self) -> usize {
        PAIR * self.batch * self.groups
    }

    fn group_channels(&self) -> usize {
        self.channels / self.groups
    }

    /// Elements of a group.
    fn count(&self) -> usize {
        self.group_channels() * self.pixels
    }

    fn check(&self) -> Result<()> {
        if self.groups == 0 || !self.channels.is_multiple_of(self.groups) || self.batch * self.count() == 0 {
            bail!("group norm: {self:?}");
        }
        small(self.count())?;
        small(self.batch * self.channels).map(drop)
    }

    /// Channels, groups and pixels, as every kernel takes them.
    fn shape(&self) -> Result<[Arg; 3]> {
        Ok([small(self.channels)?.into(), small(self.groups)?.into(), small(self.pixels)?.into()])
    }

    /// Whether whole packs may be moved, none of which straddles two channels.
    fn whole(&self, addresses: &[Address]) -> bool {
        aligned(addresses) && self.pixels.is_multiple_of(width(self.dtype))
    }

    /// The name's end for kernels that take whole packs or, if not `whole`, anything.
    fn end(&self, whole: bool) -> Result<String> {
        Ok(format!("{}{}", if whole { "" } else { "loose_" }, suffix(self.dtype)?))
    }

    /// y and the moments.
    pub fn forward(&self, launcher: &dyn Launcher, on: Forward) -> Result<()> {
        self.check()?;
        let whole = self.whole(&[on.x, on.y]);
        let packs = self.count() / if whole { width(self.dtype) } else { 1 };
        let groups = self.batch * self.groups;
        let (eps, silu) = (Arg::F32(self.eps as f32), Arg::I32(self.silu.into()));
        let most = GROUP_THREADS * GROUP_HELD;
        let many = groups >= 2 * launcher.multiprocessors() as usize && packs <= 4 * most;
        if whole && (packs <= most || many) {
            // Six packs a thread keep memory busy; more only where there are more to keep.
            let threads = packs.div_ceil(GROUP_HELD / 2).next_multiple_of(32).min(GROUP_THREADS) as u32;
            let grid = Grid { blocks: [small(groups)?, 1, 1], threads, shared: 0 };
            let args = [on.x.into(), on.gamma.into(), on.beta.into(), on.y.into(), on.moments.into()];
            let args = [&args[..], &self.shape()?, &[eps, silu]].concat();
            return launcher.launch(Family::Norms, &format!("group_norm_forward_{}", self.end(true)?), grid, &args);
        }
        const THREADS: usize = 256;
        let pieces = packs.div_ceil(THREADS * HELD);
        let grid = Grid { blocks: [small(pieces)?, small(groups)?, 1], threads: THREADS as u32, shared: 0 };
        let scratch = launcher.scratch(PAIR * pieces * groups)?;
        let found = scratch.address();
        let (end, shape) = (self.end(whole)?, self.shape()?);
        let args = [&[on.x.into(), found.into()][..], &shape].concat();
        launcher.launch(Family::Norms, &format!("group_norm_measure_{end}"), grid, &args)?;
        let args = [on.x.into(), found.into(), on.gamma.into(), on.beta.into(), on.y.into(), on.moments.into()];
        let args = [&args[..], &shape, &[eps, silu]].concat();
        launcher.launch(Family::Norms, &format!("group_norm_normalise_{end}"), grid, &args)
    }

    /// How a block of one group is shared out: the fewest turns, counted in instructions of a warp.
    fn teams(&self) -> Option<Teams> {
        let (channels, packs) = (self.group_channels(), self.pixels / width(self.dtype));
        let all = channels * packs;
        // What is larger is better split than read by one multiprocessor.
        if all > 4 * GROUP_THREADS * GROUP_HELD {
            return None;
        }
        let threads = threads(all.div_ceil(4), 64, 512);
        let cost = |&team: &u32| {
            let turns = channels.div_ceil((threads / team) as usize);
            turns * (packs.div_ceil(team as usize) * 25 * width(self.dtype) + 30)
        };
        let fits = |&team: &u32| self.parts_bytes(team) <= 32 << 10;
        let team = (2..10).map(|power| 1 << power).filter(|&team| team <= threads).filter(fits).min_by_key(cost)?;
        Some(Teams { threads, team })
    }

    fn parts_bytes(&self, team: u32) -> usize {
        PAIR * self.group_channels() * (team as usize / 32).max(1)
    }

    /// dx, and what is added to the gradients of gamma and beta.
    pub fn backward(&self, launcher: &dyn Launcher, on: Backward) -> Result<()> {
        self.check()?;
        let whole = self.whole(&[on.x, on.dy, on.dx]);
        let scratch = launcher.scratch(PAIR * self.batch * self.channels)?;
        let sums = scratch.address();
        let operands = [on.x.into(), on.dy.into(), on.gamma.into(), on.beta.into(), on.moments.into()];
        let (shape, silu) = (self.shape()?, Arg::I32(self.silu.into()));
        if whole && let Some(Teams { threads, team }) = self.teams() {
            let shared = small(self.parts_bytes(team))?;
            let grid = Grid { blocks: [small(self.batch * self.groups)?, 1, 1], threads, shared };
            let args = [&operands[..], &[on.dx.into(), sums.into()], &shape, &[team.into(), silu]].concat();
            launcher.launch(Family::Norms, &format!("group_norm_backward_{}", self.end(true)?), grid, &args)?;
        } else {
            self.backward_in_two(launcher, on.dx, &operands, sums, whole)?;
        }
        if on.dgamma == Address::NULL && on.dbeta == Address::NULL {
            return Ok(());
        }
        let args = [sums.into(), on.dgamma.into(), on.dbeta.into(), small(self.batch)?.into(), shape[0]];
        launcher.launch(Family::Norms, "group_norm_weights_f32", line(self.channels, 256)?, &args)
    }

    /// Large groups, and unaligned ones: the channels' sums, then dx.
    fn backward_in_two(
        &self,
        launcher: &dyn Launcher,
        dx: Address,
        operands: &[Arg],
        sums: Address,
        whole: bool,
    ) -> Result<()> {
        let (end, shape, silu) = (self.end(whole)?, self.shape()?, Arg::I32(self.silu.into()));
        let (pack, rows) = (if whole { width(self.dtype) } else { 1 }, self.batch * self.channels);
        let threads = threads(self.pixels / pack, 32, 256);
        let grid = Grid { blocks: [small(rows)?, 1, 1], threads, shared: 0 };
        let args = [operands, &[sums.into()], &shape, &[silu]].concat();
        launcher.launch(Family::Norms, &format!("group_norm_sums_{end}"), grid, &args)?;
        let piece = 4 * threads as usize * pack;
        let pieces = self.pixels.div_ceil(piece);
        let grid = Grid { blocks: [small(rows * pieces)?, 1, 1], threads, shared: 0 };
        let cut = [small(pieces)?.into(), small(piece)?.into(), silu];
        let args = [operands, &[sums.into(), dx.into()], &shape, &cut].concat();
        launcher.launch(Family::Norms, &format!("group_norm_gradients_{end}"), grid, &args)
    }
}

/// Threads and rows of a block of the kernels that give a row to a warp (`kernels/norms_layer.cuh`).
const ROWS_AT_ONCE: usize = 4;
/// Columns of a block of the kernels that add up columns, and its threads.
const COLUMNS: usize = 32;
const COLUMN_THREADS: u32 = 512;

/// By which kernels rows are normalised.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rows {
    /// A warp a row; blocks of the backward on one multiprocessor.
    Warp { size: &'static str, at_once: usize },
    /// A block a row.
    Block { size: &'static str, pack: usize },
}

impl LayerNorm {
    /// Bytes of the moments.
    pub fn moments_bytes(&self) -> usize {
        PAIR * self.rows
    }

    fn kind(&self, whole: bool) -> Rows {
        let packs = (self.width / width(self.dtype)).div_ceil(32);
        let wide = self.dtype == DType::F32;
        let (narrow, medium) = if wide { (3, 10) } else { (2, 5) };
        match () {
            () if !whole => Rows::Block { size: "loose", pack: 1 },
            () if packs <= narrow => Rows::Warp { size: "narrow", at_once: 5 },
            () if packs <= medium => Rows::Warp { size: "medium", at_once: if wide { 2 } else { 3 } },
            () => Rows::Block { size: "wide", pack: width(self.dtype) },
        }
    }

    fn check(&self, addresses: &[Address]) -> Result<Rows> {
        if self.rows * self.width == 0 {
            bail!("layer norm: {self:?}");
        }
        Ok(self.kind(aligned(addresses) && self.width.is_multiple_of(width(self.dtype))))
    }

    /// The grid of a block a row.
    fn blocks(&self, pack: usize) -> Result<Grid> {
        let threads = (self.width / pack).div_ceil(4).next_multiple_of(32).min(256) as u32;
        Ok(Grid { blocks: [small(self.rows)?, 1, 1], threads, shared: 0 })
    }

    /// y and the moments.
    pub fn forward(&self, launcher: &dyn Launcher, on: Forward) -> Result<()> {
        let kind = self.check(&[on.x, on.gamma, on.beta, on.y])?;
        let (rows, columns) = (small(self.rows)?, small(self.width)?);
        let operands = [on.x.into(), on.gamma.into(), on.beta.into(), on.y.into(), on.moments.into()];
        let (eps, end) = (Arg::F32(self.eps as f32), suffix(self.dtype)?);
        match kind {
            Rows::Warp { size, .. } => {
                let grid = line(self.rows * 32, 32 * ROWS_AT_ONCE as u32)?;
                let args = [&operands[..], &[rows.into(), columns.into(), eps]].concat();
                launcher.launch(Family::Norms, &format!("layer_norm_forward_{size}_{end}"), grid, &args)
            }
            Rows::Block { size, pack } => {
                let args = [&operands[..], &[columns.into(), eps]].concat();
                let grid = self.blocks(pack)?;
                launcher.launch(Family::Norms, &format!("layer_norm_forward_{size}_{end}"), grid, &args)
            }
        }
    }

    /// dx, and what is added to the gradients of gamma and beta. (Beta itself takes no part.)
    pub fn backward(&self, launcher: &dyn Launcher, on: Backward) -> Result<()> {
        let kind = self.check(&[on.x, on.dy, on.gamma, on.dx])?;
        let frozen = on.dgamma == Address::NULL && on.dbeta == Address::NULL;
        let (rows, columns, end) = (Arg::U32(small(self.rows)?), Arg::U32(small(self.width)?), suffix(self.dtype)?);
        let operands = [on.x.into(), on.dy.into(), on.gamma.into(), on.moments.into(), on.dx.into()];
        let parts = match kind {
            Rows::Warp { at_once, .. } => {
                self.rows.div_ceil(ROWS_AT_ONCE).min(at_once * launcher.multiprocessors() as usize)
            }
            Rows::Block { .. } => self.rows.div_ceil(64).min(64),
        };
        let scratch = launcher.scratch(2 * 4 * self.width * parts)?;
        let sums = scratch.address();
        match kind {
            Rows::Warp { size, .. } => {
                let shared = small(2 * 4 * self.width)?;
                let grid = Grid { blocks: [small(parts)?, 1, 1], threads: 32 * ROWS_AT_ONCE as u32, shared };
                let args = [&operands[..], &[sums.into(), rows, columns]].concat();
                launcher.launch(Family::Norms, &format!("layer_norm_backward_{size}_{end}"), grid, &args)?;
            }
            Rows::Block { size, pack } => {
                let args = [&operands[..], &[columns]].concat();
                let name = format!("layer_norm_backward_{size}_{end}");
                launcher.launch(Family::Norms, &name, self.blocks(pack)?, &args)?;
                if !frozen {
                    let blocks = [small(self.width.div_ceil(COLUMNS))?, small(parts)?, 1];
                    let grid = Grid { blocks, threads: COLUMN_THREADS, shared: 0 };
                    let args = [on.x.into(), on.dy.into(), on.moments.into(), sums.into(), rows, columns];
                    launcher.launch(Family::Norms, &format!("layer_norm_columns_{end}"), grid, &args)?;
                }
            }
        }
        if frozen {
            return Ok(());
        }
        let blocks = [small(self.width.div_ceil(COLUMNS))?, 2, 1];
        let grid = Grid { blocks, threads: COLUMN_THREADS, shared: 0 };
        let args = [sums.into(), on.dgamma.into(), on.dbeta.into(), small(parts)?.into(), columns];
        launcher.launch(Family::Norms, "layer_norm_weights_f32", grid, &args)
    }
}

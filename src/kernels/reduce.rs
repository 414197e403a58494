//! Sums over buckets (`kernels/reduce.cu`).

use anyhow::Result;
use candle_core::DType;

use super::sizes::{aligned, line, small, width};
use super::{Address, Family, Grid, Launcher, suffix};

#[cfg(all(test, any(feature = "cuda", feature = "emulate")))]
mod tests;

/// Numbers of a piece, and its running sums (`kernels/reduce.cu`).
const PIECE: usize = 1 << 14;
const RUNS: usize = 8;

/// The sum of squares of `count` numbers, to the f64 at `total`: the bits of `zero::reduce`'s on the CPU.
pub fn sum_of_squares(
    launcher: &dyn Launcher,
    dtype: DType,
    values: Address,
    count: usize,
    total: Address,
) -> Result<()> {
    let pieces = count.div_ceil(PIECE);
    let scratch = launcher.scratch(8 * pieces)?;
    if count > 0 {
        let args = [values.into(), scratch.address().into(), (count as u64).into()];
        let grid = line(pieces * RUNS, 128)?;
        launcher.launch(Family::Reduce, &format!("sum_of_squares_{}", suffix(dtype)?), grid, &args)?;
    }
    let grid = Grid { blocks: [1, 1, 1], threads: 256, shared: 0 };
    let args = [scratch.address().into(), total.into(), small(pieces)?.into()];
    launcher.launch(Family::Reduce, "sum_of_pieces_f64", grid, &args)
}

/// The u32 at `found` becomes 1 if one of `count` numbers is infinite or not a number, and is left alone otherwise.
pub fn not_finite(launcher: &dyn Launcher, dtype: DType, values: Address, count: usize, found: Address) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let whole = i32::from(aligned(&[values]));
    let args = [values.into(), (count as u64).into(), whole.into(), found.into()];
    let grid = line(count.div_ceil(width(dtype)), 256)?;
    launcher.launch(Family::Reduce, &format!("not_finite_{}", suffix(dtype)?), grid, &args)
}

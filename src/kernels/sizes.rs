//! Sizes, alignments and grids, as wrappers hand them to kernels.

use anyhow::{Context, Result};
use candle_core::DType;

use super::{Address, Grid};

/// Bytes that kernels move at once.
pub const PACK: usize = 16;

/// A size as kernels take it.
pub fn small(size: usize) -> Result<u32> {
    // Kernels compute with signed offsets here and there.
    i32::try_from(size).ok().map(|size| size as u32).with_context(|| format!("{size} is too much for a kernel"))
}

/// How many of the dtype are moved at once.
pub fn width(dtype: DType) -> usize {
    PACK / dtype.size_in_bytes()
}

/// Whether all of these may be moved in whole packs. What is not there ([`Address::NULL`]) may.
pub fn aligned(addresses: &[Address]) -> bool {
    addresses.iter().all(|address| address.aligned(PACK as u64))
}

/// Blocks of `threads` threads, for `work` threads in all.
pub fn line(work: usize, threads: u32) -> Result<Grid> {
    Ok(Grid { blocks: [small(work.div_ceil(threads as usize))?, 1, 1], threads, shared: 0 })
}

/// A power of two of threads, from `least` to `most`, that are not many more than `work`.
pub fn threads(work: usize, least: u32, most: u32) -> u32 {
    (work.min(most as usize).next_power_of_two() as u32).clamp(least, most)
}

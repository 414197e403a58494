//! What a GPU shows before it is trusted: that our code loads, launches, computes, and comes back.

use anyhow::{Result, ensure};

use super::gpu::Gpu;
use crate::kernels::{Arg, Family, Grid, Launcher};

/// Enough for every multiprocessor of any GPU to have some.
const BLOCKS: u32 = 4096;
const THREADS: u32 = 256;

/// Sums that are known, by all multiprocessors, in less than a millisecond.
pub(super) fn run(gpu: &Gpu) -> Result<()> {
    let out = gpu.computing().alloc_zeroed(BLOCKS as usize * size_of::<u32>(), "the self-test")?;
    let grid = Grid { blocks: [BLOCKS, 1, 1], threads: THREADS, shared: 0 };
    gpu.launch(Family::Selftest, "selftest_sums", grid, &[Arg::Address(out.address()), Arg::U32(BLOCKS)])?;
    let bytes = gpu.read(&out)?;
    for (block, sum) in bytes.as_chunks::<4>().0.iter().map(|sum| u32::from_le_bytes(*sum)).enumerate() {
        ensure!(sum == expected(block as u32), "block {block} computed {sum} instead of {}", expected(block as u32));
    }
    Ok(())
}

/// The sum of `block * THREADS + t` over the block's threads, as the kernel wraps it.
fn expected(block: u32) -> u32 {
    block.wrapping_mul(THREADS * THREADS).wrapping_add(THREADS * (THREADS - 1) / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expected_sum_is_the_sum() {
        for block in [0, 1, 77, BLOCKS - 1] {
            assert_eq!(expected(block), (0..THREADS).map(|t| block * THREADS + t).sum::<u32>());
        }
    }
}

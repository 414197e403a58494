//! What a GPU shows before it is trusted: that our code loads, launches, computes, and comes back. Sums that are known, by
//! all multiprocessors, in less than a millisecond.

use anyhow::{Result, ensure};

use crate::kernels::{Address, Arg, Family, Grid, Launcher};

/// Enough for every multiprocessor of any GPU to have some.
const BLOCKS: u32 = 1024;
const THREADS: u32 = 256;

/// What [`launch`] writes, in bytes.
pub(super) const BYTES: usize = BLOCKS as usize * size_of::<u32>();

/// Every block writes one sum to `out`.
pub(super) fn launch(launcher: &dyn Launcher, out: Address) -> Result<()> {
    let grid = Grid { blocks: [BLOCKS, 1, 1], threads: THREADS, shared: 0 };
    launcher.launch(Family::Selftest, "selftest_sums", grid, &[Arg::Address(out), Arg::U32(BLOCKS)])
}

/// Whether they are what they must be.
pub(super) fn check(sums: impl Iterator<Item = u32>) -> Result<()> {
    for (block, sum) in (0..BLOCKS).zip(sums) {
        // Of `block * THREADS + t` over the threads, as 32 bits hold it.
        let expected = block.wrapping_mul(THREADS * THREADS).wrapping_add(THREADS * (THREADS - 1) / 2);
        ensure!(sum == expected, "block {block} computed {sum} instead of {expected}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expected_sums_are_sums() {
        let sum = |block: u32| (0..THREADS).map(|t| block * THREADS + t).fold(0u32, u32::wrapping_add);
        check((0..BLOCKS).map(sum)).unwrap();
        assert!(check((0..BLOCKS).map(|block| sum(block) ^ u32::from(block == 77))).is_err());
    }

    #[cfg(feature = "emulate")]
    #[test]
    fn the_emulator_passes() {
        use crate::kernels::emulated::{Emulated, Values};
        for launcher in Emulated::each().unwrap() {
            let out = Values::<u32>::unwritten(BYTES / size_of::<u32>()).unwrap();
            launch(&launcher, out.address()).unwrap();
            check(out.get().into_iter()).unwrap();
        }
    }
}

//! A device that launches nothing: a dry run on it goes the way that ops go on a GPU of its kind, and takes what they take
//! there, scratch included.

use anyhow::Result;

use super::product::Product;
use super::{Address, Arg, Family, Grid, Launcher, Scratch};
use crate::device::{TakenScratch, note_flops};

/// A kind of GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dry {
    /// Major and minor, times 10.
    pub capability: u32,
    pub multiprocessors: u32,
}

impl Launcher for Dry {
    fn launch(&self, _: Family, _: &str, grid: Grid, _: &[Arg]) -> Result<()> {
        grid.check(self.capability)
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        note_flops(2.0 * (product.rows * product.columns) as f64 * product.inner as f64);
        product.check()
    }

    fn capability(&self) -> u32 {
        self.capability
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Sizes do not depend on it.
    fn allows_tf32(&self) -> bool {
        false
    }

    /// The most that is taken at a time is noted as scratch; nobody writes there.
    fn scratch(&self, bytes: usize) -> Result<Scratch> {
        Ok(Scratch::new(Address::NULL, Some(Box::new(TakenScratch::of(bytes)))))
    }
}

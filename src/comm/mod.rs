//! Row 1: collectives. Every rank calls the same ones in the same order; sums are taken in rank order, so results are
//! the same on every run. Implementations: a world of one, and ranks over shared memory on one machine.

use anyhow::Result;
use half::{bf16, f16};

/// What a collective reads.
#[derive(Clone, Copy, Debug)]
pub enum Slice<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
    BF16(&'a [bf16]),
    F16(&'a [f16]),
    U8(&'a [u8]),
}

/// What a collective writes.
#[derive(Debug)]
pub enum SliceMut<'a> {
    F32(&'a mut [f32]),
    F64(&'a mut [f64]),
    BF16(&'a mut [bf16]),
    F16(&'a mut [f16]),
    U8(&'a mut [u8]),
}

/// The collectives of one group of ranks. Reductions are sums, taken in rank order and accumulated in fp32 (fp64 for
/// F64; U8 cannot be summed). A collective that not everyone joins within the time-out is an error that names who is missing.
pub trait Communicator: Send + Sync {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    /// In place: everyone's sum, to everyone.
    fn all_reduce(&self, data: SliceMut) -> Result<()>;
    /// `input` has world_size times `output`'s length; rank r gets the sum of everyone's r-th part.
    fn reduce_scatter(&self, input: Slice, output: SliceMut) -> Result<()>;
    /// `output` has world_size times `input`'s length; part r is rank r's input.
    fn all_gather(&self, input: Slice, output: SliceMut) -> Result<()>;
    /// Rank `root`'s data, to everyone.
    fn broadcast(&self, data: SliceMut, root: usize) -> Result<()>;
    fn barrier(&self) -> Result<()>;
}

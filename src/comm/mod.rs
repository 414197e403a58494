//! Row 1: collectives. Every rank calls the same ones in the same order; sums are taken in rank order, so results are
//! the same on every run. Implementations: a world of one ([`Solo`]), and ranks over shared memory on one machine
//! ([`Shared`]). Between GPUs, under the feature `cuda`, there are collectives that the devices do themselves. Knows nothing of segments, tensors or training.

mod call;
mod far;
mod gpus;
mod meeting;
#[cfg(feature = "cuda")]
mod nccl;
#[cfg(feature = "cuda")]
mod on_device;
#[cfg(feature = "cuda")]
mod paired;
pub mod probe;
pub mod process;
mod reduce;
mod rendezvous;
mod shared;
mod slice;
mod solo;
mod traced;
mod values;
#[cfg(any(feature = "cuda", test))]
pub mod watch;
mod window;

use std::fmt;

use anyhow::Result;
use half::{bf16, f16};

pub use call::{Call, Kind, Scalar};
pub use far::{Far, Operation};
pub use gpus::{GpuCollectives, connect, each_its_own};
#[cfg(feature = "cuda")]
pub use nccl::Nccl;
#[cfg(feature = "cuda")]
pub use on_device::{AloneOnDevice, DeviceCommunicator};
#[cfg(feature = "cuda")]
pub use paired::Paired;
pub use rendezvous::Rendezvous;
pub use shared::Shared;
pub use solo::Solo;
pub use traced::Traced;
pub use values::CommunicatorExt;
pub use window::{MAX_RANKS, Window};

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
/// After an error a communicator stays broken: every later call fails with the same reason.
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
    /// Says that this rank has failed and will join no more collectives, so that nobody waits for it.
    fn abort(&self, _message: &str) {}
    /// Another rank that is known to have failed. Not collective: whoever waits for something beside the collectives asks.
    fn failed_peer(&self) -> Option<PeerFailure> {
        None
    }
    /// Leaves the group together with the others, when all is done; no collective comes after it. One that is dropped
    /// instead gives up what is under way.
    fn leave(&self) -> Result<()> {
        Ok(())
    }
    /// The same ranks' collectives over the memory of their accelerators, where these do them themselves.
    fn far(&self) -> Option<&dyn Far> {
        None
    }
}

/// The error of a rank that is itself sound and was ended by another rank's failure. Who reports failures looks for it
/// in the chain of causes, so that the cause is told apart from its consequences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerFailure {
    pub rank: usize,
    pub message: String,
}

impl fmt::Display for PeerFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} failed: {}", self.rank, self.message)
    }
}

impl std::error::Error for PeerFailure {}

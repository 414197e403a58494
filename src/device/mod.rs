//! Row 0: memory and threads. Parameters, gradients and optimizer state live in buffers handed out by budgeted
//! arenas; ops see them through [`WeightRef`]s into a segment's slots. Knows nothing of layers, ranks or training.

mod accelerator;
mod allocator;
mod arena;
mod buffer;
pub mod bulk;
#[cfg(any(feature = "cuda", test))]
pub mod cuda;
mod dry;
#[cfg(feature = "emulate")]
mod emulated;
mod files;
mod hardware;
mod heap;
mod layout;
mod memory;
pub mod nvme;
mod place;
mod queue;
mod slot;
mod team;
pub mod threads;
pub mod trace;

pub use accelerator::{Accelerator, Moment, Taken};
pub use allocator::Keeping;
pub use arena::{Arena, Usage};
pub use buffer::{Buffer, Element};
pub use dry::{TakenScratch, Tally, dry, forget_peak, is_dry, note_flops, note_kept_scratch, tally, touch_scratch};
pub use files::{free_disk_bytes, map_file, peak_rss_bytes};
pub use hardware::Hardware;
pub use heap::{activations, count_activations_from_here, device_peak, within_budget};
pub use layout::{BLOCK, BucketLayout, Entry, LARGE};
pub use memory::{Held, Memory};
pub use nvme::{Region, StateFile, StateFileOptions};
pub use place::Place;
pub use queue::{Delays, Pending, Promise, Queue, promise};
pub use slot::{GradSlot, ParamSlot, WeightAt, WeightRef, WeightView};

use candle_core::{DType, Device};

/// A GPU as far as the planner cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundGpu {
    /// As its driver calls it.
    pub name: String,
    /// Bytes.
    pub memory: u64,
    /// Major and minor, times 10.
    pub capability: u32,
    pub multiprocessors: u32,
}

/// The GPU that the rank with this place on the machine would compute on; if there is none, why and what to do, in one
/// paragraph.
#[cfg(feature = "cuda")]
pub fn gpu(local_rank: usize) -> Result<FoundGpu, String> {
    let card = cuda::check(local_rank)?;
    let cuda::found::Card { name, capability, multiprocessors, memory, .. } = card;
    Ok(FoundGpu { name, memory: memory as u64, capability, multiprocessors })
}

/// How many GPUs this process sees.
#[cfg(feature = "cuda")]
pub fn gpus() -> usize {
    cuda::count()
}

#[cfg(not(feature = "cuda"))]
pub fn gpus() -> usize {
    0
}

/// Whether a rank can compute on a GPU: not with this build.
#[cfg(not(feature = "cuda"))]
pub fn gpu(_local_rank: usize) -> Result<FoundGpu, String> {
    Err("this build of dblaunch has no GPU support (feature `cuda`)".to_string())
}

/// A tensor's values in the processor's memory, once they are computed.
pub fn on_host(tensor: &candle_core::Tensor) -> candle_core::Result<candle_core::Tensor> {
    #[cfg(feature = "cuda")]
    if tensor.device().is_cuda() {
        return cuda::on_host(tensor);
    }
    tensor.to_device(&Device::Cpu)
}

/// Where and in what precision a run computes; taken from the configuration by everything that allocates.
#[derive(Clone, Debug)]
pub struct Compute {
    pub device: Device,
    /// Activations and the parameters that ops read; master weights, moments and gradients are always fp32.
    pub dtype: DType,
}

//! An NVIDIA GPU: opening it, its memory under a hard limit, page-locked memory of the host, streams and what one waits
//! for of another, and launching our kernels. Knows nothing of ranks; NCCL is in `comm/`.
//!
//! Note: streams. candle puts everything it does onto one stream, the *computing* one: a real stream, not the per-thread
//! one, so that it is the same for whichever thread calls. Our kernels go there, too. Copies between host and device and
//! NCCL's collectives have streams of their own ([`Stream`]). candle's way of keeping several streams apart, two events a
//! tensor that are recorded and waited for at each use, is switched off: it costs two driver calls for every allocation
//! and every argument of every op, and it could not see our own memory anyway. What it did is ensured so:
//!
//! - A candle tensor is allocated, used and freed on the computing stream only. Memory is stream-ordered (`pool.rs`): a
//!   free takes effect when everything that was put on that stream before it is done, so a tensor may be dropped while
//!   kernels that read it are still waiting to run.
//! - What other streams touch is [`DeviceMemory`], which is ours. Its home is the stream it was allocated on. Before
//!   another stream uses it, that stream waits for a [`Mark`] of the home stream set after the allocation and after the
//!   last write; before the home stream reads what the other wrote, or frees it, it waits for a mark of the other
//!   ([`DeviceMemory::used_until`] makes the free wait).
//! - Where another stream is to read a candle tensor (an activation that goes to the host), it waits for a mark of the
//!   computing stream, and the computing stream waits for a mark of the copy before the tensor is dropped.
//! - Buffers that are handed out as an [`Accelerator`](crate::device::Accelerator)'s memory are the computing stream's.
//!   Copies between them and the host have two streams for all threads, one each way. A copy waits for a mark of the
//!   computing stream, and the thread that asked for it waits until it has ended: what that thread, or one that waits for
//!   it, puts on the computing stream afterwards needs no further wait, nor does a free. So the computing stream itself
//!   waits for nothing, and no copy can hang.
//! - Host memory of a copy under way is kept alive by the stream ([`Stream::keep`]) and is not looked at before its mark.

#[cfg(feature = "cuda")]
mod accelerator;
#[cfg(feature = "cuda")]
mod event;
pub mod found;
#[cfg(feature = "cuda")]
mod gpu;
pub mod libraries;
#[cfg(feature = "cuda")]
mod memory;
#[cfg(feature = "cuda")]
mod modules;
#[cfg(feature = "cuda")]
mod pinned;
#[cfg(feature = "cuda")]
mod pool;
#[cfg(feature = "cuda")]
mod products;
#[cfg(any(feature = "cuda", all(test, feature = "emulate")))]
mod selftest;
#[cfg(feature = "cuda")]
mod status;
#[cfg(feature = "cuda")]
mod stream;
#[cfg(feature = "cuda")]
mod tensors;
#[cfg(all(feature = "cuda", test))]
pub(crate) mod tests;

#[cfg(feature = "cuda")]
pub use event::Mark;
#[cfg(feature = "cuda")]
pub use gpu::{Gpu, check, count};
#[cfg(feature = "cuda")]
pub use memory::DeviceMemory;
#[cfg(feature = "cuda")]
pub use pinned::{LockedPages, Pinned};
#[cfg(feature = "cuda")]
pub use pool::PoolUsage;
#[cfg(feature = "cuda")]
pub use status::Faults;
#[cfg(feature = "cuda")]
pub use stream::Stream;
#[cfg(feature = "cuda")]
pub use tensors::{address_of, download, moment, on_host, uninitialised, upload};

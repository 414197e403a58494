//! Row 4: benchmarks on networks of published shapes with made-up weights, of a drive, of a GPU, and of the optimizer: `dblaunch
//! bench`. They measure; they judge nothing, and no test depends on a clock.

mod adamw;
mod disk;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
mod kernels;
mod layers;
mod memory;
mod shape;

pub use adamw::adamw;
pub use disk::disk;
#[cfg(feature = "cuda")]
pub use gpu::gpu;
pub use layers::layers;
pub use memory::{MemoryCase, memory};

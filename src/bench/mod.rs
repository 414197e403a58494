//! Row 4: benchmarks on networks of published shapes with made-up weights, of a drive, of a GPU, and of the optimizer: `dblaunch
//! bench`. They measure; they judge nothing, and no test depends on a clock.

mod adamw;
#[cfg(feature = "cuda")]
mod attention;
mod disk;
mod fits;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
mod hold;
#[cfg(feature = "cuda")]
mod kernels;
mod layers;
mod memory;
#[cfg(feature = "cuda")]
mod numbers;
#[cfg(feature = "cuda")]
mod offload;
mod ops;
mod shape;

pub use adamw::adamw;
pub use disk::disk;
pub use fits::check_rows;
#[cfg(feature = "cuda")]
pub use gpu::gpu;
#[cfg(feature = "cuda")]
pub use hold::hold;
#[cfg(feature = "cuda")]
pub use kernels::kernels;
pub use layers::layers;
pub use memory::{MemoryCase, memory};
#[cfg(feature = "cuda")]
pub use offload::offload;
pub use ops::ops;

//! Row 4: benchmarks on networks of published shapes with made-up weights, and of a drive: `dblaunch bench`. They
//! measure; they judge nothing, and no test depends on a clock.

mod disk;
mod layers;
mod memory;
mod shape;

pub use disk::disk;
pub use layers::layers;
pub use memory::{MemoryCase, memory};

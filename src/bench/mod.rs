//! Row 4: benchmarks on networks of published shapes with made-up weights: `dblaunch bench`. They measure; they judge
//! nothing, and no test depends on a clock.

mod layers;
mod memory;
mod shape;

pub use layers::layers;
pub use memory::memory;

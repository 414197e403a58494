//! Row 4: training. Start with `step.rs`.

pub mod network;
pub mod step;

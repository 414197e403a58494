//! Row 4: training. Start with `step.rs`.

mod metrics;
pub mod export;
mod frozen;
mod items;
mod rows;
pub mod setup;
pub mod step;
mod text;
mod trainer;
mod weights;

//! Row 4: training. Start with `step.rs`.

mod export;
mod items;
mod metrics;
pub mod network;
mod prompts;
mod rows;
mod run;
mod setup;
pub mod step;
mod trainer;

pub use run::run;
pub(crate) use setup::fresh_seed;
pub use trainer::{Ending, Trainer};

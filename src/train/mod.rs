//! Row 4: training. Start with `step.rs`.

mod export;
mod frozen;
mod items;
pub mod network;
mod rows;
mod run;
mod setup;
pub mod step;
mod text;
mod trainer;
mod weights;

pub use run::run;
pub use trainer::{Ending, Trainer};

//! Row 4: training. Start with `step.rs`.

pub mod arrange;
mod class_images;
mod export;
mod items;
mod loss;
pub mod network;
pub mod optimizer;
mod prompts;
mod rows;
mod run;
mod samples;
mod scaling;
mod scores;
mod setup;
pub mod step;
mod trainer;
mod update;
mod vae;
mod validation;

pub use run::run;
pub(crate) use setup::fresh_seed;
pub use trainer::{Ending, Trainer};

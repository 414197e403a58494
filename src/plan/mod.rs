//! The planner.

mod activations;
mod dry;
mod facts;

pub use activations::{Profile, Wiring};
pub use dry::{Given, Measured, Span};
pub use facts::{Facts, FrozenFacts, SegmentFacts, Surroundings, compute_dtype};

//! Row 4: what a run will take, before it begins, and how it runs best. From configurations and the graph alone it
//! predicts bytes per rank in each tier and bytes that travel in a step ([`ledger`](Bytes)), and chooses stage, tiers and
//! what each segment keeps, such that the run is the fastest that fits its budgets ([`Decision::of`]).
//!
//! What activations take is not modelled but tried: the real code runs dry (`device::dry`), segment by segment. Nothing
//! here reads weights, and nothing is measured of the machine but sizes.

mod activations;
mod cards;
mod choose;
pub mod command;
mod decision;
mod dry;
mod facts;
mod ledger;
mod refusal;
mod table;
mod time;
mod traffic;

pub use activations::{Profile, Turn, Wiring};
pub use cards::{Machine, card_names, memory_bytes};
pub use choose::{Answer, Budgets, Question};
pub use decision::{Compared, Decision, Prediction};
pub use dry::{Given, Measured, Span};
pub use facts::{Facts, FrozenFacts, SegmentFacts, Surroundings, compute_dtype};
pub use ledger::{Bytes, Choice, Ledger, PictureBytes, Terms, TierBytes, Traffic, bytes};
pub use table::{Table, size};
pub use time::{Seconds, seconds};

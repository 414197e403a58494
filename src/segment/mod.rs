//! Row 2: a model as a list of segments wired by slots. Knows layers, no ranks.

mod graph;
mod pullback;
mod tape;
mod value;

pub use graph::{GraphBuilder, Node, Params, Segment, SegmentGraph, SlotId};
pub(crate) use pullback::Forward;
pub use tape::{Keep, Tape};
pub use value::Aside;

/// Chooses where the ops of segments compute, for who runs them without knowing ops.
pub use crate::ops::compute_on;

//! Row 2: ZeRO. Who owns which part of every bucket, where parameters and gradients are between uses, and when they
//! travel. Knows segments by index and parameters by name and shape, never layers.

mod grad_reducer;
mod param_store;
mod partition;
mod placement;
mod stage;

pub use grad_reducer::GradReducer;
pub use param_store::{Fetched, Owned, ParamStore, Ranks, WeightSource};
pub use partition::Partition;
pub use placement::Placement;
pub use stage::Stage;

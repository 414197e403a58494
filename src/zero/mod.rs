//! Row 2: ZeRO. Who owns which part of every bucket, where parameters and gradients are between uses, and when they
//! travel. Knows segments by index and parameters by name and shape, never layers.

mod bring;
mod collect;
mod early;
mod grad_reducer;
mod owned;
mod param_store;
mod partition;
mod placement;
pub(crate) mod reduce;
mod rest;
mod stage;
mod tiers;

pub use grad_reducer::{GradReducer, OwnedGrads, Start};
pub use owned::{OwnedComing, OwnedPiece, OwnedWeights, Weights};
pub use param_store::{Fetched, ParamStore, Ranks, Walk, WeightSource};
pub use partition::Partition;
pub use placement::Placement;
pub use rest::{AHEAD, BEHIND, Coming, Copies, IN_FLIGHT, PIECE, Piece, Rest, Staging, pieces, pieces_of};
pub use stage::Stage;
pub use tiers::{States, Tiers};

//! Row 4: checkpoints (files). `checkpoint-N/` is whole or absent: every rank writes its own shard aside, everything is
//! synced, then the folder gets its name. A checkpoint loads on any number of ranks and in any stage, since the place
//! of an element in its bucket does not depend on either.

mod load;
mod manifest;
mod output_lock;
mod save;
mod shard_file;

pub use load::{Checkpoint, latest};
pub use manifest::{Manifest, Position, SegmentRecord};
pub use output_lock::{TAKEN, hold, is_held};
pub use save::{OptimizerState, Saving, all_finite, clear_leftovers, number, save};

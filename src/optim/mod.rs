//! Row 3: optimizers over owned shards, and learning-rate schedules. Knows flat ranges, no layers and no ranks.

mod adamw;
mod lr_schedule;

pub use adamw::{AdamW, Moments};
pub use lr_schedule::{LrKind, LrSchedule};

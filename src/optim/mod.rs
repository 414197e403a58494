//! Row 3: optimizers over owned shards, learning-rate schedules and loss scaling. Knows flat ranges, no layers and no ranks.

mod adamw;
mod loss_scale;
mod lr_schedule;

pub use adamw::{AdamW, Moments};
pub use loss_scale::{LossScale, Overflow, ScalePolicy, ScaleState};
pub use lr_schedule::{LrKind, LrSchedule};

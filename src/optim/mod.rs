//! Row 3: optimizers over owned shards, learning-rate schedules and loss scaling. Knows flat ranges, no layers and no ranks.

mod adamw;
mod blockwise;
mod code_book;
mod kernel;
mod kernel8;
mod lanes;
mod level;
mod loss_scale;
mod lr_schedule;
mod on_device;
mod record;
mod rounding;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use adamw::{AdamW, Grads, Rounded, Weights};
pub use loss_scale::{LossScale, Overflow, ScalePolicy, ScaleState};
pub use lr_schedule::{LrKind, LrSchedule};
pub use on_device::{DeviceWeights, table_words, tables_at};
pub use record::{Part, RecordLayout, StateKind};
pub use rounding::StochasticRounding;

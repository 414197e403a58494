//! The mathematics of diffusion: noise schedules, random draws, recorded draws, the noisy input of a row and the
//! closed-form loss with its gradient; the way back: samplers and guidance. Plain slices of f32 in and out; knows no
//! networks, ranks, devices or files but the scheduler's configuration and the record.

mod draws;
mod guidance;
mod objective;
mod record;
mod rows;
pub mod sampler;
mod schedule;
mod scheduler_file;

pub use draws::{Draws, Purpose, Row, Stream};
pub use guidance::guide;
pub use objective::{LossValue, RowShape, loss_and_gradient, row_weights};
pub use record::{MicroRecord, Record, RecordUse, Rows};
pub use rows::{add_offset_noise, noisy_and_target, sample_latent};
pub use schedule::{NoiseSchedule, Prediction, VelocityWeight};

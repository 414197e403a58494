//! Row 1: differentiable ops. An op is a candle custom op over activations alone; it carries its weights as
//! [`WeightRef`](crate::device::WeightRef)s, and its `bwd` adds the weights' gradients straight into the gradient
//! bucket. One file each: forward, backward, and under it the test against a composed reference and finite differences.

mod activation;
mod attention;
mod conv2d;
mod cpu;
mod embedding;
mod gemm;
mod glue;
mod gpu;
mod group_norm;
#[cfg(test)]
mod half_tests;
mod layer_norm;
mod linear;
mod objective;
mod pointwise;
mod record;
#[cfg(test)]
pub(crate) mod testing;
mod tokens;
mod transpose;
mod upsample;
mod vector;

pub use activation::{Activation, activation, add_channels, geglu};
pub use attention::{Mask, attention};
pub use conv2d::{Conv2d, conv2d, conv2d_op};
pub use embedding::embedding;
pub use glue::{add, cat_channels};
pub use group_norm::group_norm;
pub use layer_norm::layer_norm;
pub use linear::{linear, linear_op};
pub use objective::Objective;
pub use record::{Record, noted, record, scale};
pub use tokens::{image_from_tokens, tokens_from_image};
pub use upsample::upsample_nearest;

pub use gpu::compute_on;

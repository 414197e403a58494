//! Layer normalisation.
use crate::device::WeightRef;
use candle_core::{Result, Tensor, bail};

/// x (..., D) normalised over D, times gamma (D) plus beta (D).
pub fn layer_norm(_x: &Tensor, _gamma: &WeightRef, _beta: &WeightRef, _eps: f64) -> Result<Tensor> {
    bail!("being written")
}

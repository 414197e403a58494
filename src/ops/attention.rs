//! Attention without the score matrix.
use candle_core::{Result, Tensor, bail};

/// Which keys a query may see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mask {
    /// Query i sees keys 0..=i.
    pub causal: bool,
    /// Of batch row b only the first `key_lengths[b]` keys exist.
    pub key_lengths: Option<Vec<usize>>,
}

/// q (B, S, heads*D), k and v (B, T, heads*D) -> (B, S, heads*D); softmax(q k^T / sqrt(D)) v per head.
pub fn attention(_q: &Tensor, _k: &Tensor, _v: &Tensor, _heads: usize, _mask: &Mask) -> Result<Tensor> {
    bail!("being written")
}

//! Images as sequences of pixels and back.
use candle_core::{Result, Tensor, bail};

/// (B, C, H, W) -> (B, H*W, C).
pub fn tokens_from_image(_x: &Tensor) -> Result<Tensor> {
    bail!("being written")
}

/// (B, H*W, C) -> (B, C, H, W).
pub fn image_from_tokens(_x: &Tensor, _height: usize, _width: usize) -> Result<Tensor> {
    bail!("being written")
}

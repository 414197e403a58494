//! 2-D convolution.
use crate::device::WeightRef;
use candle_core::{Result, Tensor, bail};

/// Stride and zero padding of a convolution (the VAE's downsampling pads right and bottom only).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2d {
    pub stride: usize,
    pub top: usize,
    pub bottom: usize,
    pub left: usize,
    pub right: usize,
}

impl Conv2d {
    pub fn new(stride: usize, padding: usize) -> Self {
        Conv2d { stride, top: padding, bottom: padding, left: padding, right: padding }
    }
}

/// x (B, C, H, W), weight (O, C, kh, kw), bias (O) -> (B, O, H', W').
pub fn conv2d(_x: &Tensor, _weight: &WeightRef, _bias: Option<&WeightRef>, _conv: Conv2d) -> Result<Tensor> {
    bail!("being written")
}

//! Layers that are one op with its tensors: they declare the tensors when built and apply the op.

use candle_core::{Result, Tensor, bail};

use crate::device::WeightRef;
use crate::ops::{self, Conv2d};
use crate::segment::Params;

/// y = x W^T + b.
pub(super) struct Linear {
    weight: WeightRef,
    bias: Option<WeightRef>,
}

impl Linear {
    pub fn new(p: &Params, inputs: usize, outputs: usize) -> Self {
        Linear { weight: p.get("weight", &[outputs, inputs]), bias: Some(p.get("bias", &[outputs])) }
    }

    pub fn without_bias(p: &Params, inputs: usize, outputs: usize) -> Self {
        Linear { weight: p.get("weight", &[outputs, inputs]), bias: None }
    }

    /// A 1x1 convolution over pixels that lie as tokens: the same numbers, the file's weight has two more axes.
    pub fn pointwise(p: &Params, inputs: usize, outputs: usize) -> Self {
        Linear { weight: p.get("weight", &[outputs, inputs, 1, 1]), bias: Some(p.get("bias", &[outputs])) }
    }

    /// (..., inputs) -> (..., outputs)
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, &self.weight, self.bias.as_ref())
    }
}

/// A square-kernel convolution with bias.
pub(super) struct Conv {
    weight: WeightRef,
    bias: WeightRef,
    geometry: Conv2d,
}

impl Conv {
    pub fn new(p: &Params, inputs: usize, outputs: usize, kernel: usize, geometry: Conv2d) -> Self {
        let weight = p.get("weight", &[outputs, inputs, kernel, kernel]);
        Conv { weight, bias: p.get("bias", &[outputs]), geometry }
    }

    /// Keeps height and width; `kernel` is odd.
    pub fn same(p: &Params, inputs: usize, outputs: usize, kernel: usize) -> Self {
        Self::new(p, inputs, outputs, kernel, Conv2d::new(1, kernel / 2))
    }

    /// Halves height and width; padding 0 means one row below and one column to the right (`Downsample2D`).
    pub fn halving(p: &Params, channels: usize, padding: usize) -> Self {
        let geometry = match padding {
            0 => Conv2d { stride: 2, top: 0, bottom: 1, left: 0, right: 1 },
            padding => Conv2d::new(2, padding),
        };
        Self::new(p, channels, channels, 3, geometry)
    }

    /// (B, inputs, H, W) -> (B, outputs, H', W')
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::conv2d(x, &self.weight, Some(&self.bias), self.geometry)
    }
}

/// Group normalisation.
pub(super) struct GroupNorm {
    gamma: WeightRef,
    beta: WeightRef,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    pub fn new(p: &Params, channels: usize, groups: usize, eps: f64) -> Self {
        GroupNorm { gamma: p.get("weight", &[channels]), beta: p.get("bias", &[channels]), groups, eps }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, &self.gamma, &self.beta, self.groups, self.eps, false)
    }

    /// Followed by SiLU.
    pub fn silu(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, &self.gamma, &self.beta, self.groups, self.eps, true)
    }
}

/// Layer normalisation over the last axis.
pub(super) struct LayerNorm {
    gamma: WeightRef,
    beta: WeightRef,
    eps: f64,
}

impl LayerNorm {
    pub fn new(p: &Params, width: usize, eps: f64) -> Self {
        LayerNorm { gamma: p.get("weight", &[width]), beta: p.get("bias", &[width]), eps }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.gamma, &self.beta, self.eps)
    }
}

/// A segment's inputs by position.
pub(super) fn take<const N: usize>(inputs: &[Tensor]) -> Result<&[Tensor; N]> {
    match inputs.try_into() {
        Ok(inputs) => Ok(inputs),
        Err(_) => bail!("a segment of {N} inputs was given {}", inputs.len()),
    }
}

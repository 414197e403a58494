//! Activations by kernels.

use candle_core::{Result, Tensor};

use super::{Activation, AddChannels, Geglu, Pointwise};
use crate::kernels::glue;
use crate::ops::gpu::{Fresh, Gpu, Operand};

impl Pointwise {
    fn function(&self) -> glue::Function {
        match self.0 {
            Activation::Silu => glue::Function::Silu,
            Activation::Gelu => glue::Function::Gelu,
            Activation::QuickGelu => glue::Function::QuickGelu,
        }
    }

    pub(super) fn forward_on(&self, gpu: &Gpu, x: Operand) -> Result<Fresh> {
        let y = gpu.fresh(x.dtype, x.dims)?;
        gpu.run(|l| glue::activation(l, self.function(), x.dtype, x.at, y.at, x.len()))?;
        Ok(y)
    }

    pub(super) fn backward_on(&self, gpu: &Gpu, x: Operand, dy: Operand) -> Result<Tensor> {
        let dx = gpu.fresh(x.dtype, x.dims)?;
        gpu.run(|l| glue::activation_backward(l, self.function(), x.dtype, x.at, dy.at, dx.at, x.len()))?;
        Ok(dx.tensor())
    }
}

impl Geglu {
    pub(super) fn forward_on(&self, gpu: &Gpu, x: Operand) -> Result<Fresh> {
        let mut dims = x.dims.to_vec();
        let width = dims.pop().unwrap_or(0) / 2;
        dims.push(width);
        let y = gpu.fresh(x.dtype, dims)?;
        gpu.run(|l| glue::geglu(l, x.dtype, x.at, y.at, x.len() / (2 * width), width))?;
        Ok(y)
    }

    pub(super) fn backward_on(&self, gpu: &Gpu, x: Operand, dy: Operand) -> Result<Tensor> {
        let width = dy.dims.last().copied().unwrap_or(0);
        let dx = gpu.fresh(x.dtype, x.dims)?;
        gpu.run(|l| glue::geglu_backward(l, x.dtype, x.at, dy.at, dx.at, dy.len() / width.max(1), width))?;
        Ok(dx.tensor())
    }
}

/// The planes of x (B, C, H, W).
fn planes(x: &Operand) -> glue::sums::Planes {
    let planes = x.dims[..2].iter().product();
    glue::sums::Planes { dtype: x.dtype, planes, channels: planes, pixels: x.dims[2..].iter().product() }
}

impl AddChannels {
    pub(super) fn forward_on(&self, gpu: &Gpu, x: Operand, t: Operand) -> Result<Fresh> {
        let y = gpu.fresh(x.dtype, x.dims)?;
        gpu.run(|l| planes(&x).add(l, x.at, t.at, y.at))?;
        Ok(y)
    }

    /// The sums of dy over each plane, in dims `dims`: the gradient of t.
    pub(super) fn sums_on(&self, gpu: &Gpu, dy: Operand, dims: &[usize]) -> Result<Tensor> {
        let dt = gpu.fresh(dy.dtype, dims)?;
        gpu.run(|l| planes(&dy).sum(l, dy.at, dt.at))?;
        Ok(dt.tensor())
    }
}

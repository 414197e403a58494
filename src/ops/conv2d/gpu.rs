//! Convolution by kernels.

use candle_core::{DType, Result, Tensor};

use super::Convolution;
use crate::device::note_flops;
use crate::kernels::conv2d as kernels;
use crate::ops::gpu::{Fresh, Gpu, Operand};

impl Convolution {
    fn kernels(&self, dtype: DType, images: usize) -> kernels::Convolution {
        let &Convolution { conv, outputs, inputs, kernel, input, .. } = self;
        let super::Conv2d { stride, top, bottom, left, right } = conv;
        kernels::Convolution { dtype, images, inputs, outputs, input, kernel, stride, top, bottom, left, right }
    }

    /// Floating-point operations of one of its three products.
    fn flops(&self, images: usize) -> f64 {
        let taps = self.inputs * self.kernel.0 * self.kernel.1;
        2.0 * (images * self.outputs * self.output.0 * self.output.1) as f64 * taps as f64
    }

    pub(super) fn forward_on(&self, gpu: &Gpu, x: Operand) -> Result<Fresh> {
        let images = x.dims[0];
        note_flops(self.flops(images));
        let y = gpu.fresh(x.dtype, (images, self.outputs, self.output.0, self.output.1))?;
        let weight = self.weight.at(x.dtype)?;
        let bias = self.bias.as_ref().map(|bias| bias.at(x.dtype)).transpose()?;
        let bias = bias.as_ref().map(|bias| bias.address());
        gpu.run(|l| self.kernels(x.dtype, images).forward(l, x.at, weight.address(), bias, y.at))?;
        Ok(y)
    }

    pub(super) fn input_gradient_on(&self, gpu: &Gpu, x: &Operand, dy: &Operand) -> Result<Tensor> {
        note_flops(self.flops(x.dims[0]));
        let dx = gpu.fresh(x.dtype, x.dims)?;
        let weight = self.weight.at(x.dtype)?;
        let kernels = self.kernels(x.dtype, x.dims[0]);
        gpu.run(|l| kernels.input_gradient(l, dy.at, weight.address(), dx.at))?;
        Ok(dx.tensor())
    }

    pub(super) fn add_weight_gradients_on(&self, gpu: &Gpu, x: &Operand, dy: &Operand) -> Result<()> {
        if !self.weight.trainable() {
            return Ok(());
        }
        note_flops(self.flops(x.dims[0]));
        let dw = self.weight.grad_at()?;
        let db = self.bias.as_ref().filter(|bias| bias.trainable()).map(|bias| bias.grad_at()).transpose()?;
        gpu.run(|l| self.kernels(x.dtype, x.dims[0]).add_weight_gradients(l, x.at, dy.at, dw, db))
    }
}

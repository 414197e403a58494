//! Layer normalisation by kernels.

use candle_core::{DType, Result, Tensor, bail};

use super::LayerNorm;
use crate::kernels::norms;
use crate::ops::gpu::{Fresh, Gpu, Operand};

impl LayerNorm {
    fn kernels(&self, x: &Operand) -> norms::LayerNorm {
        norms::LayerNorm { dtype: x.dtype, rows: x.len() / self.width, width: self.width, eps: self.eps }
    }

    pub(super) fn forward_on(&self, gpu: &Gpu, x: Operand) -> Result<Fresh> {
        let kernels = self.kernels(&x);
        let y = gpu.fresh(x.dtype, x.dims)?;
        let moments = gpu.fresh(DType::F32, kernels.moments_bytes() / 4)?;
        let (gamma, beta) = (self.gamma.at(x.dtype)?, self.beta.at(x.dtype)?);
        let (gamma, beta) = (gamma.address(), beta.address());
        gpu.run(|l| kernels.forward(l, norms::Forward { x: x.at, gamma, beta, y: y.at, moments: moments.at }))?;
        let _ = self.moments_there.set(moments.tensor());
        Ok(y)
    }

    pub(super) fn backward_on(&self, gpu: &Gpu, x: Operand, dy: Operand) -> Result<Tensor> {
        let Some(moments) = self.moments_there.get() else { bail!("layer_norm: backward before forward") };
        let moments = gpu.operand(moments)?.at;
        let dx = gpu.fresh(x.dtype, x.dims)?;
        let (gamma, beta) = (self.gamma.at(x.dtype)?, self.beta.at(x.dtype)?);
        let (gamma, beta) = (gamma.address(), beta.address());
        let (dgamma, dbeta) = (self.gamma.grad_at()?, self.beta.grad_at()?);
        let on = norms::Backward { x: x.at, dy: dy.at, gamma, beta, moments, dx: dx.at, dgamma, dbeta };
        gpu.run(|l| self.kernels(&x).backward(l, on))?;
        Ok(dx.tensor())
    }
}

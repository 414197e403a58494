//! The objective's gradient where a GPU computes, so that nothing between forward and backward waits for the GPU. The
//! processor's is `diffusion::loss_and_gradient`.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::gpu::Gpu;
use crate::kernels::glue;

/// What a micro-batch's prediction is compared with, in a GPU's memory.
pub struct Objective {
    gpu: Gpu,
    /// (rows, elements that have a target), fp32.
    targets: Tensor,
    /// (rows), f64: what a row's differences are multiplied with.
    factors: Tensor,
}

impl Objective {
    /// `targets`: a row after the other; `weights`: one a row, as of `diffusion::row_weights`. None where the processor
    /// computes. May wait for what was launched before: call it before the forward.
    pub fn on(device: &Device, targets: &[f32], weights: &[f64], accumulation: usize) -> Result<Option<Self>> {
        let Some(gpu) = Gpu::on(device)? else { return Ok(None) };
        let (rows, used) = (weights.len(), targets.len() / weights.len().max(1));
        if rows == 0 || targets.len() != rows * used {
            bail!("objective: {} targets in {rows} rows", targets.len());
        }
        let kernel = glue::Objective { dtype: DType::F32, rows, used, predicted: used };
        let factors = weights.iter().map(|&weight| kernel.factor(weight, accumulation)).collect::<Vec<_>>();
        let targets = Tensor::from_slice(targets, (rows, used), device)?;
        Ok(Some(Objective { gpu, targets, factors: Tensor::from_vec(factors, rows, device)? }))
    }

    /// The derivative of (loss / accumulation) times `scale` by `prediction` (rows, ...), of its shape and dtype, and the
    /// mean squared error of each row, f64. What of a row has no target gets zeros.
    pub fn gradient(&self, prediction: &Tensor, scale: f32) -> Result<(Tensor, Tensor)> {
        let (rows, used) = self.targets.dims2()?;
        let predicted = prediction.elem_count() / rows;
        if prediction.dims().first() != Some(&rows) || (predicted != used && predicted != 2 * used) {
            bail!("objective: a prediction {:?} for {rows} rows of {used}", prediction.shape());
        }
        let kernel = glue::Objective { dtype: prediction.dtype(), rows, used, predicted };
        let prediction = prediction.contiguous()?;
        let (got, wanted) = (self.gpu.operand(&prediction)?, self.gpu.operand(&self.targets)?);
        let factors = self.gpu.operand(&self.factors)?;
        let gradient = self.gpu.fresh(got.dtype, got.dims)?;
        let errors = self.gpu.fresh(DType::F64, rows)?;
        self.gpu.run(|l| kernel.gradient(l, got.at, wanted.at, factors.at, scale, gradient.at, errors.at))?;
        Ok((gradient.tensor(), errors.tensor()))
    }
}

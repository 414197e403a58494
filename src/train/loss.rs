//! The loss of this rank's rows of a micro-batch: its gradient between forward and backward, its value afterwards, so that
//! nothing waits for a GPU in between.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::rows::Rows;
use crate::device::on_host;
use crate::device::trace::{Row, span};
use crate::diffusion::loss_and_gradient;
use crate::ops::Objective;

/// What a prediction is compared with, where it is made.
pub(super) struct Loss<'a> {
    rows: &'a Rows,
    accumulation: usize,
    /// By which the gradient is multiplied; 1 but under fp16.
    scale: f32,
    on_gpu: Option<Objective>,
    value: Value,
}

enum Value {
    /// No prediction came yet.
    None,
    /// Each row's mean squared error.
    Known(Vec<f64>),
    /// The same, still being computed.
    Coming(Tensor),
}

impl<'a> Loss<'a> {
    pub fn new(rows: &'a Rows, accumulation: usize, scale: f32, device: &Device) -> Result<Self> {
        let on_gpu = Objective::on(device, &rows.targets, &rows.weights, accumulation)?;
        Ok(Loss { rows, accumulation, scale, on_gpu, value: Value::None })
    }

    /// The gradient by the prediction (rows, C, h, w), in its dtype.
    pub fn gradient(&mut self, prediction: &Tensor) -> Result<Tensor> {
        let _span = span(Row::Compute, "loss");
        if let Some(objective) = self.on_gpu.take() {
            let (gradient, errors) = objective.gradient(prediction, self.scale)?;
            self.value = Value::Coming(errors);
            return Ok(gradient);
        }
        let dims = prediction.dims4()?;
        let values = on_host(&prediction.to_dtype(DType::F32)?)?.flatten_all()?.to_vec1::<f32>()?;
        let mut gradient = vec![0f32; values.len()];
        let Rows { targets, weights, .. } = self.rows;
        let value =
            loss_and_gradient(&values, targets, self.rows.shape(dims.1), weights, self.accumulation, &mut gradient);
        gradient.iter_mut().for_each(|g| *g *= self.scale);
        self.value = Value::Known(value.row_mse);
        Ok(Tensor::from_vec(gradient, dims, prediction.device())?.to_dtype(prediction.dtype())?)
    }

    /// This rank's part of the loss, and, if it is not finite, which rows it comes from. Waits for the device.
    pub fn value(self) -> Result<(f64, String)> {
        let row_mse = match self.value {
            Value::None => return Ok((0.0, String::new())),
            Value::Known(errors) => errors,
            Value::Coming(errors) => {
                let _span = span(Row::Wait, "the GPU");
                on_host(&errors)?.to_vec1::<f64>()?
            }
        };
        let loss = row_mse.iter().zip(&self.rows.weights).fold(0.0, |sum, (mse, weight)| sum + weight * mse);
        let bad = (0..self.rows.len()).filter(|&row| !row_mse[row].is_finite());
        let trouble = if loss.is_finite() { String::new() } else { self.rows.describe(bad) };
        Ok((loss, trouble))
    }
}

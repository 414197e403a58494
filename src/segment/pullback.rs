//! The gradient of one segment.

use candle_core::{DType, Result, Tensor};

use crate::ops::Record;

/// A segment's forward, and what its way back needs.
pub struct Forward {
    pub inputs: Vec<Tensor>,
    pub outputs: Vec<Tensor>,
    record: Record,
}

impl Forward {
    /// Runs `forward` on `inputs`, recorded.
    pub fn of(inputs: Vec<Tensor>, forward: impl FnOnce(&[Tensor]) -> Result<Vec<Tensor>>) -> Result<Self> {
        let (outputs, record) = crate::ops::record(&inputs, || forward(&inputs))?;
        Ok(Forward { inputs, outputs, record })
    }

    /// Pulls the gradients `dys` of the outputs back to the inputs. None for an input that no output depends on. Weights'
    /// gradients land in the gradient bucket on the way.
    pub fn pull(self, dys: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> {
        let Forward { inputs, outputs, record } = self;
        record.pull(outputs, dys, inputs)
    }
}

/// Whether gradients flow through tensors of this dtype.
pub fn carries_gradient(dtype: DType) -> bool {
    dtype.is_float()
}

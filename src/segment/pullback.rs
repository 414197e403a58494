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
    /// Runs `forward` on `inputs`, recorded. `wanted`: of which of them a gradient is.
    pub fn of(
        inputs: Vec<Tensor>,
        wanted: impl Iterator<Item = bool>,
        forward: impl FnOnce(&[Tensor]) -> Result<Vec<Tensor>>,
    ) -> Result<Self> {
        let given: Vec<_> = inputs.iter().map(Tensor::id).zip(wanted).collect();
        let (outputs, record) = crate::ops::record(given, || forward(&inputs))?;
        Ok(Forward { inputs, outputs, record })
    }

    /// Pulls the gradients `dys` of the outputs back to the inputs. None for an input whose gradient is not wanted, or that no
    /// output depends on. Weights'
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

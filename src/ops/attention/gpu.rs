//! Attention by kernels.

use candle_core::{DType, Result, Tensor, bail};

use super::Attention;
use crate::device::note_flops;
use crate::kernels::{Address, attention as kernels};
use crate::ops::gpu::{Fresh, Gpu, Operand};

impl Attention {
    fn kernels(&self, dtype: DType) -> kernels::Attention {
        let plan = &self.plan;
        let sizes = [plan.batch, plan.queries, plan.keys];
        kernels::Attention::contiguous(dtype, sizes, plan.heads, plan.head_width, plan.causal)
    }

    /// Lengths of the batch rows' keys in the device's memory; none if all keys exist.
    fn lengths(&self, gpu: &Gpu) -> Result<Option<Tensor>> {
        if self.plan.lengths.iter().all(|&length| length == self.plan.keys) {
            return Ok(None);
        }
        // The kernels take i32; lengths are less than 2^31.
        gpu.numbers(self.plan.lengths.iter().map(|&length| length as u32).collect()).map(Some)
    }

    pub(super) fn forward_on(&self, gpu: &Gpu, [q, k, v]: [Operand; 3]) -> Result<Fresh> {
        note_flops(4.0 * self.plan.cost() as f64);
        let kernels = self.kernels(q.dtype);
        let y = gpu.fresh(q.dtype, q.dims)?;
        let log_sums = gpu.fresh(DType::F32, kernels.log_sums())?;
        let lengths = self.lengths(gpu)?;
        let lengths = lengths.as_ref().map(|lengths| gpu.operand(lengths)).transpose()?;
        let at = lengths.as_ref().map(|lengths| lengths.at);
        gpu.run(|l| kernels.forward(l, [q.at, k.at, v.at], at, y.at, log_sums.at))?;
        // A second forward of the same op would give the same sums.
        let _ = self.log_sums_there.set(log_sums.tensor());
        Ok(y)
    }

    /// dq, dk and dv.
    pub(super) fn backward_on(&self, gpu: &Gpu, [q, k, v, y, dy]: [&Tensor; 5]) -> Result<[Tensor; 3]> {
        note_flops(10.0 * self.plan.cost() as f64);
        let Some(log_sums) = self.log_sums_there.get() else { bail!("attention: backward before forward") };
        let [q, k, v, y, dy, log_sums] = [q, k, v, y, dy, log_sums].map(|tensor| gpu.operand(tensor));
        let ([q, k, v], [y, dy, log_sums]) = ([q?, k?, v?], [y?, dy?, log_sums?]);
        let fresh = |of: &Operand| gpu.fresh(of.dtype, of.dims);
        let (dq, dk, dv) = (fresh(&q)?, fresh(&k)?, fresh(&v)?);
        let lengths = self.lengths(gpu)?;
        let lengths = lengths.as_ref().map(|lengths| gpu.operand(lengths)).transpose()?;
        let given = kernels::Backward {
            q: q.at,
            k: k.at,
            v: v.at,
            y: y.at,
            log_sums: log_sums.at,
            dy: dy.at,
            lengths: lengths.as_ref().map(|lengths| lengths.at),
        };
        let results: [Address; 3] = [dq.at, dk.at, dv.at];
        gpu.run(|l| self.kernels(q.dtype).backward(l, given, results))?;
        Ok([dq.tensor(), dk.tensor(), dv.tensor()])
    }
}

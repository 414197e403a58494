//! Between candle's tensors and slices of numbers, for ops on the CPU.

use candle_core::{CpuStorage, Device, Layout, Result, Storage, Tensor, bail};

use crate::device::Element;

/// Evaluates the expression with the type name bound to the number type of a dtype; an error for other dtypes.
macro_rules! per_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            other => candle_core::bail!("no kernel for {other:?}"),
        }
    };
}
pub(super) use per_dtype;

/// A contiguous storage's numbers.
pub(super) fn plain_cpu<'a, T: Element>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<T>()?[start..end]),
        None => bail!("an op was given a tensor that is not contiguous"),
    }
}

/// A contiguous CPU tensor's numbers, given what `storage_and_layout` returned.
pub(super) fn plain<'a, T: Element>(storage: &'a Storage, layout: &Layout) -> Result<&'a [T]> {
    match storage {
        Storage::Cpu(cpu) => plain_cpu(cpu, layout),
        _ => bail!("a CPU kernel was given a tensor of another device"),
    }
}

/// A CPU tensor of these numbers, without a copy.
pub(super) fn tensor<T: Element>(values: Vec<T>, dims: &[usize]) -> Result<Tensor> {
    Tensor::from_vec(values, dims, &Device::Cpu)
}

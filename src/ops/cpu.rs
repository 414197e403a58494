//! What the ops share on the CPU: reading tensors, building results, cutting work. No arithmetic.

use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, StorageRef, Tensor, WithDType, bail};

use super::vector::Real;
pub use crate::device::threads::for_parts;
use crate::device::within_budget;

/// Runs the block with the type `$T` that belongs to the dtype.
macro_rules! by_dtype {
    ($dtype:expr, $what:expr, $T:ident => $body:expr) => {
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
            other => candle_core::bail!("{}: no kernel for {other:?}", $what),
        }
    };
}
pub(super) use by_dtype;

/// A contiguous tensor's elements, as a forward is given them. Every op comes by here before it allocates its results, so
/// the memory's budget is looked at here.
pub fn elements<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    within_budget()?;
    let all = T::cpu_storage_as_slice(storage)?;
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&all[from..to]),
        None => bail!("an op was given strided memory"),
    }
}

/// A tensor made contiguous and held for reading, as a backward needs it.
pub struct Held<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Held<'a> {
    /// `tensor` is contiguous.
    pub fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Held { storage, layout }
    }

    pub fn elements<T: WithDType>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => elements(storage, self.layout),
            _ => bail!("a CPU kernel was given memory of another device"),
        }
    }
}

/// A forward's result.
pub fn result<T: Real>(values: Vec<T>, shape: impl Into<Shape>) -> (CpuStorage, Shape) {
    (T::to_cpu_storage_owned(values), shape.into())
}

/// A backward's result.
pub fn tensor<T: Real>(values: Vec<T>, shape: &Shape) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// Rows of `width` elements that make a piece of work worth handing to a thread.
pub fn rows_per_part(width: usize) -> usize {
    const PART: usize = 1 << 14;
    (PART / width.max(1)).max(1)
}

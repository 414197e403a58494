//! What a slot holds: an activation on the device, or on the host while nobody needs it for long.

use candle_core::{DType, Device, Error, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};

use crate::device::trace::{Row, span};
use crate::device::{Arena, Buffer, Element};

/// An activation, wherever it is.
pub(super) enum Value {
    Device(Tensor),
    Host { values: Buffer, shape: Shape, device: Device },
}

impl Value {
    /// The activation on its device; a copy if it rests on the host.
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            Value::Device(tensor) => Ok(tensor.clone()),
            Value::Host { values, shape, device } => {
                let _span = span(Row::Copy, "activations").bytes(values.bytes().len());
                #[cfg(feature = "cuda")]
                if let Device::Cuda(device) = device {
                    return crate::device::cuda::upload(values.bytes(), shape, values.dtype(), device);
                }
                match values.dtype() {
                    DType::F32 => Tensor::from_slice(values.as_slice::<f32>(), shape, device),
                    DType::BF16 => Tensor::from_slice(values.as_slice::<bf16>(), shape, device),
                    _ => Tensor::from_slice(values.as_slice::<f16>(), shape, device),
                }
            }
        }
    }

    /// Moves it to the host's memory. What carries no gradient (token ids) is small and stays.
    pub fn move_to_host(self, arena: &Arena, what: &str) -> Result<Self> {
        let Value::Device(tensor) = self else { return Ok(self) };
        let values = match tensor.dtype() {
            DType::F32 => copied::<f32>(&tensor, arena, what)?,
            DType::BF16 => copied::<bf16>(&tensor, arena, what)?,
            DType::F16 => copied::<f16>(&tensor, arena, what)?,
            _ => return Ok(Value::Device(tensor)),
        };
        Ok(Value::Host { values, shape: tensor.shape().clone(), device: tensor.device().clone() })
    }
}

fn copied<T: Element>(tensor: &Tensor, arena: &Arena, what: &str) -> Result<Buffer> {
    let mut values =
        arena.alloc_dirty(T::DTYPE, tensor.elem_count(), what).map_err(|e| Error::msg(format!("{e:#}")))?;
    let _span = span(Row::Copy, || format!("activations of {what}")).bytes(values.bytes().len());
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((from, to))) => {
            values.as_mut_slice::<T>().copy_from_slice(&T::cpu_storage_as_slice(storage)?[from..to]);
        }
        #[cfg(feature = "cuda")]
        (Storage::Cuda(storage), Some(_)) => crate::device::cuda::download(storage, layout, values.bytes_mut())?,
        (_, Some(_)) => values.as_mut_slice::<T>().copy_from_slice(&tensor.flatten_all()?.to_vec1::<T>()?),
        (_, None) => bail!("{what}: a contiguous tensor is not contiguous"),
    }
    Ok(values)
}

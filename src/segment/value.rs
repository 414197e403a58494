//! What a slot holds: an activation on the device, or on the host while nobody needs it for long. Both ways are gone
//! beside the computation.

use std::sync::Arc;

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Device, Error, Layout, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};

use super::pullback::carries_gradient;
use crate::device::trace::{Row, span};
use crate::device::{Arena, Buffer, Element, Pending, Queue};

/// Where activations wait on the host, and the queue on which they go there and come back.
#[derive(Clone)]
pub struct Aside {
    pub arena: Arena,
    pub queue: Arc<Queue>,
}

/// An activation, wherever it is.
pub(super) enum Value {
    Device(Tensor),
    Host(Resting),
    /// On its way back.
    Coming(Pending<Tensor>),
}

/// An activation on the host.
pub(super) struct Resting {
    values: Buffer,
    shape: Shape,
    device: Device,
}

/// An activation on its way to the host, and still on the device.
pub(super) struct Leaving(Pending<(Resting, Tensor)>);

impl Value {
    /// Waits for it, if it is on its way back.
    pub fn landed(self, what: &str) -> Result<Value> {
        match self {
            Value::Coming(coming) => {
                let tensor = coming.wait_for(|| format!("activations of {what}")).map_err(told)?;
                Ok(Value::Device(tensor))
            }
            here => Ok(here),
        }
    }

    /// The activation on its device.
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            Value::Device(tensor) => Ok(tensor.clone()),
            Value::Host(_) | Value::Coming(_) => bail!("an activation was not brought back from the host"),
        }
    }
}

impl Leaving {
    /// Waits until it is on the host; its memory on the device is free from now on.
    pub fn gone(self, what: &str) -> Result<Resting> {
        let (resting, _) = self.0.wait_for(|| format!("activations of {what} leave")).map_err(told)?;
        Ok(resting)
    }
}

impl Aside {
    /// Begins to copy an activation to the host, as it is at this point of the computation; ops may read it meanwhile.
    /// `None` for what carries no gradient (token ids): it is small and stays.
    pub(super) fn send(&self, tensor: &Tensor, what: &str) -> Result<Option<Leaving>> {
        if !carries_gradient(tensor.dtype()) {
            return Ok(None);
        }
        let tensor = tensor.contiguous()?;
        let values = self.arena.alloc_dirty(tensor.dtype(), tensor.elem_count(), what).map_err(told)?;
        let mut resting = Resting { values, shape: tensor.shape().clone(), device: tensor.device().clone() };
        let copy = Copy::after_what_is_launched(&resting.device)?;
        let name = format!("activations of {what}");
        Ok(Some(Leaving(self.queue.submit(move || {
            let _span = span(Row::Copy, || name).bytes(resting.values.byte_len());
            copy.out(&tensor, &mut resting.values)?;
            Ok((resting, tensor))
        }))))
    }

    /// Begins to bring it back, if it is on the host, into memory taken at this point of the computation.
    pub(super) fn bring(&self, value: Value) -> Result<Value> {
        let Value::Host(resting) = value else { return Ok(value) };
        let room = room(&resting)?;
        let copy = Copy::after_what_is_launched(&resting.device)?;
        Ok(Value::Coming(self.queue.submit(move || {
            let _span = span(Row::Copy, "activations").bytes(resting.values.byte_len());
            let storage = copy.back(&resting, room)?;
            Ok(Tensor::from_storage(storage, resting.shape, BackpropOp::none(), false))
        })))
    }
}

/// A copy beside the computation.
struct Copy {
    /// What has to be done before, on a GPU.
    #[cfg(feature = "cuda")]
    after: Option<crate::device::Moment>,
}

impl Copy {
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    fn after_what_is_launched(device: &Device) -> Result<Copy> {
        Ok(Copy {
            #[cfg(feature = "cuda")]
            after: match device {
                Device::Cuda(device) => Some(crate::device::cuda::moment(device)?),
                _ => None,
            },
        })
    }

    fn out(&self, tensor: &Tensor, into: &mut Buffer) -> Result<()> {
        let (storage, layout) = tensor.storage_and_layout();
        match (&*storage, tensor.dtype()) {
            (Storage::Cpu(storage), DType::F32) => here::<f32>(storage, layout, into),
            (Storage::Cpu(storage), DType::BF16) => here::<bf16>(storage, layout, into),
            (Storage::Cpu(storage), DType::F16) => here::<f16>(storage, layout, into),
            #[cfg(feature = "cuda")]
            (Storage::Cuda(storage), _) if let Some(after) = &self.after => {
                crate::device::cuda::download(storage, layout, into.bytes_mut(), after)
            }
            (_, dtype) => bail!("activations of {dtype:?} cannot wait on the host"),
        }
    }

    fn back(&self, resting: &Resting, room: Storage) -> Result<Storage> {
        let values = &resting.values;
        match room {
            Storage::Cpu(CpuStorage::F32(room)) => Ok(Storage::Cpu(CpuStorage::F32(filled(room, values)))),
            Storage::Cpu(CpuStorage::BF16(room)) => Ok(Storage::Cpu(CpuStorage::BF16(filled(room, values)))),
            Storage::Cpu(CpuStorage::F16(room)) => Ok(Storage::Cpu(CpuStorage::F16(filled(room, values)))),
            #[cfg(feature = "cuda")]
            Storage::Cuda(room) if let Some(after) = &self.after => {
                crate::device::cuda::upload(values.bytes(), &room, &resting.shape, after)?;
                Ok(Storage::Cuda(room))
            }
            _ => bail!("activations of {:?} cannot come back", values.dtype()),
        }
    }
}

/// Memory for it on its device, with nothing in it.
fn room(resting: &Resting) -> Result<Storage> {
    let (dtype, len) = (resting.values.dtype(), resting.values.len());
    match &resting.device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(Storage::Cuda(crate::device::cuda::uninitialised(device, &resting.shape, dtype)?)),
        _ => Ok(Storage::Cpu(match dtype {
            DType::F32 => CpuStorage::F32(Vec::with_capacity(len)),
            DType::BF16 => CpuStorage::BF16(Vec::with_capacity(len)),
            _ => CpuStorage::F16(Vec::with_capacity(len)),
        })),
    }
}

fn here<T: Element>(storage: &CpuStorage, layout: &Layout, into: &mut Buffer) -> Result<()> {
    let Some((from, to)) = layout.contiguous_offsets() else { bail!("a contiguous tensor is not contiguous") };
    into.as_mut_slice::<T>().copy_from_slice(&T::cpu_storage_as_slice(storage)?[from..to]);
    Ok(())
}

fn filled<T: Element>(mut room: Vec<T>, values: &Buffer) -> Vec<T> {
    room.extend_from_slice(values.as_slice());
    room
}

/// What went wrong, as candle's error.
fn told(error: anyhow::Error) -> Error {
    Error::Msg(format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::device::Delays;

    #[test]
    fn activations_go_to_the_host_and_come_back_unchanged() -> Result<()> {
        let queue = Queue::late("test", Some(Delays::new(3, Duration::from_millis(2)))).unwrap();
        let aside = Aside { arena: Arena::new("host", None), queue: Arc::new(queue) };
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let whole = Tensor::arange(0f32, 60.0, &Device::Cpu)?.reshape((3, 4, 5))?.to_dtype(dtype)?;
            // One that begins in the middle, and one whose elements do not lie one after the other.
            for tensor in [whole.narrow(0, 1, 2)?, whole.transpose(0, 2)?] {
                let Some(leaving) = aside.send(&tensor, "a test")? else { bail!("{dtype:?} stays") };
                let value = Value::Host(leaving.gone("a test")?);
                assert_eq!(aside.arena.usage().used, tensor.elem_count() * dtype.size_in_bytes());
                assert!(value.tensor().is_err());
                let back = aside.bring(value)?.landed("a test")?.tensor()?;
                assert_eq!(back.dims(), tensor.dims());
                let numbers = |tensor: &Tensor| tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>();
                assert_eq!(numbers(&back)?, numbers(&tensor)?);
                assert_eq!(aside.arena.usage().used, 0);
            }
        }
        assert!(aside.send(&Tensor::new(&[1u32, 2], &Device::Cpu)?, "a test")?.is_none(), "token ids stay");
        Ok(())
    }

    #[test]
    fn a_host_without_room_says_so() {
        let aside = Aside { arena: Arena::new("host", Some(16)), queue: Arc::new(Queue::new("test").unwrap()) };
        let error = aside.send(&Tensor::zeros(100, DType::F32, &Device::Cpu).unwrap(), "down.0").err().unwrap();
        assert!(error.to_string().contains("down.0"), "{error}");
    }
}

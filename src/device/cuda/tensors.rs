//! candle's tensors as addresses, for our kernels, and fresh ones for what they compute.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::CudaStorageSlice as Slice;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Error, Layout, Result, Shape, Storage, Tensor, bail};
use cudarc::driver::{CudaSlice, DevicePtr};

use super::Gpu;
use crate::device::Accelerator;
use crate::kernels::Address;

/// Where a tensor's elements begin. An error if they do not lie one after the other.
pub fn address_of(storage: &CudaStorage, layout: &Layout) -> Result<Address> {
    let Some((start, _)) = layout.contiguous_offsets() else {
        bail!("a kernel was given a tensor whose elements do not lie one after the other: {:?}", layout.shape());
    };
    match &storage.slice {
        Slice::U8(slice) => Ok(start_of(slice, start)),
        Slice::U32(slice) => Ok(start_of(slice, start)),
        Slice::I64(slice) => Ok(start_of(slice, start)),
        Slice::BF16(slice) => Ok(start_of(slice, start)),
        Slice::F16(slice) => Ok(start_of(slice, start)),
        Slice::F32(slice) => Ok(start_of(slice, start)),
        Slice::F64(slice) => Ok(start_of(slice, start)),
        _ => bail!("our kernels take no tensor of this dtype"),
    }
}

/// A tensor's storage whose contents are whatever was there: for what a kernel writes whole.
pub fn uninitialised(device: &CudaDevice, shape: &Shape, dtype: DType) -> Result<CudaStorage> {
    // SAFETY: numbers have no invalid bits, and kernels write what they are given before anyone reads it.
    unsafe { device.alloc_uninit(shape, dtype) }
}

/// A tensor of the host's `bytes`, which are free again when this returns: candle itself does not wait for its copy, which
/// goes on behind its back where the bytes are page-locked.
pub fn upload(bytes: &[u8], shape: &Shape, dtype: DType, device: &CudaDevice) -> Result<Tensor> {
    if bytes.len() != shape.elem_count() * dtype.size_in_bytes() {
        bail!("{} bytes for a tensor of {shape:?}", bytes.len());
    }
    let storage = uninitialised(device, shape, dtype)?;
    let to = address_of(&storage, &Layout::contiguous(shape))?;
    let copied = || {
        let gpu = Gpu::of(device)?;
        // SAFETY: both sides hold as many bytes, and nobody else knows the tensor yet.
        unsafe { gpu.upload(bytes.as_ptr(), to, bytes.len(), &gpu.moment()?) }
    };
    told(copied())?;
    Ok(Tensor::from_storage(Storage::Cuda(storage), shape.clone(), BackpropOp::none(), false))
}

/// The elements of a contiguous tensor, once they are computed.
pub fn download(storage: &CudaStorage, layout: &Layout, into: &mut [u8]) -> Result<()> {
    if into.len() != layout.shape().elem_count() * storage.dtype().size_in_bytes() {
        bail!("{} bytes of a tensor of {:?}", into.len(), layout.shape());
    }
    let from = address_of(storage, layout)?;
    let mut copied = || {
        let gpu = Gpu::of(storage.device())?;
        // SAFETY: both sides hold as many bytes, and the tensor, whose elements nobody changes, is borrowed.
        unsafe { gpu.download(from, into.as_mut_ptr(), into.len(), &gpu.moment()?) }
    };
    told(copied())
}

/// What went wrong, as candle's error.
fn told<T>(result: anyhow::Result<T>) -> Result<T> {
    result.map_err(|error| Error::Msg(format!("{error:#}")))
}

fn start_of<T>(slice: &CudaSlice<T>, start: usize) -> Address {
    // Without event tracking this asks nothing of the driver: all is on the slice's own stream.
    let (address, _unused) = slice.device_ptr(slice.stream());
    Address(address).at(start * size_of::<T>())
}

//! candle's tensors as addresses, for our kernels, and fresh ones for what they compute.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::CudaStorageSlice as Slice;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Error, Layout, Result, Shape, Storage, Tensor, bail};
use cudarc::driver::{CudaSlice, DevicePtr};

use super::Gpu;
use crate::device::{Accelerator, Moment};
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
    let ask = || unsafe { device.alloc_uninit(shape, dtype) };
    ask().or_else(|_| {
        let gpu = told(Gpu::of(device))?;
        told(gpu.gather())?;
        let bytes = shape.elem_count() * dtype.size_in_bytes();
        ask().or_else(|_| told(Err(gpu.does_not_fit(bytes, "a tensor"))))
    })
}

/// A tensor's values in the processor's memory, once they are computed.
pub fn on_host(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.contiguous()?;
    let mut bytes = vec![0u8; tensor.elem_count() * tensor.dtype().size_in_bytes()];
    let (storage, layout) = tensor.storage_and_layout();
    if let Storage::Cuda(storage) = &*storage {
        download(storage, layout, &mut bytes, &moment(storage.device())?)?;
    }
    Tensor::from_raw_buffer(&bytes, tensor.dtype(), tensor.dims(), &Device::Cpu)
}

/// What was launched until now, on candle's device.
pub fn moment(device: &CudaDevice) -> Result<Moment> {
    told(Gpu::of(device).and_then(|gpu| gpu.moment()))
}

/// Copies the host's `bytes` into a fresh contiguous tensor of this shape, beside the computation and once that has come to
/// `after`; has ended when this returns.
pub fn upload(bytes: &[u8], into: &CudaStorage, shape: &Shape, after: &Moment) -> Result<()> {
    if bytes.len() != shape.elem_count() * into.dtype().size_in_bytes() {
        bail!("{} bytes for a tensor of {shape:?}", bytes.len());
    }
    let to = address_of(into, &Layout::contiguous(shape))?;
    // SAFETY: both sides hold as many bytes, and nobody uses a fresh tensor yet.
    told(Gpu::of(into.device()).and_then(|gpu| unsafe { gpu.upload(bytes.as_ptr(), to, bytes.len(), after) }))
}

/// Copies the elements of a contiguous tensor to the host, likewise; nobody changes them meanwhile.
pub fn download(storage: &CudaStorage, layout: &Layout, into: &mut [u8], after: &Moment) -> Result<()> {
    if into.len() != layout.shape().elem_count() * storage.dtype().size_in_bytes() {
        bail!("{} bytes of a tensor of {:?}", into.len(), layout.shape());
    }
    let from = address_of(storage, layout)?;
    // SAFETY: both sides hold as many bytes, and the tensor is borrowed.
    told(Gpu::of(storage.device()).and_then(|gpu| unsafe { gpu.download(from, into.as_mut_ptr(), into.len(), after) }))
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

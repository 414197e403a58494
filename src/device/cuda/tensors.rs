//! candle's tensors as addresses, for our kernels, and fresh ones for what they compute.

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::CudaStorageSlice as Slice;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, bail};
use cudarc::driver::{CudaSlice, DevicePtr};

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

fn start_of<T>(slice: &CudaSlice<T>, start: usize) -> Address {
    // Without event tracking this asks nothing of the driver: all is on the slice's own stream.
    let (address, _unused) = slice.device_ptr(slice.stream());
    Address(address).at(start * size_of::<T>())
}

//! [`Slice`] and [`SliceMut`] as plain bytes, and the checks that every implementation makes before it starts.

use anyhow::{Result, ensure};

use super::call::{Call, Kind, Scalar};
use super::{Slice, SliceMut};

/// Calls `$body` with `$data` bound to the typed slice inside.
macro_rules! with_data {
    ($slice:expr, $type:ident, $data:ident => $body:expr) => {
        match $slice {
            $type::F32($data) => $body,
            $type::F64($data) => $body,
            $type::BF16($data) => $body,
            $type::F16($data) => $body,
            $type::U8($data) => $body,
        }
    };
}

impl<'a> Slice<'a> {
    pub fn len(&self) -> usize {
        with_data!(self, Slice, data => data.len())
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn scalar(&self) -> Scalar {
        match self {
            Slice::F32(_) => Scalar::F32,
            Slice::F64(_) => Scalar::F64,
            Slice::BF16(_) => Scalar::BF16,
            Slice::F16(_) => Scalar::F16,
            Slice::U8(_) => Scalar::U8,
        }
    }

    pub(super) fn bytes(self) -> &'a [u8] {
        with_data!(self, Slice, data => as_bytes(data))
    }
}

impl<'a> SliceMut<'a> {
    pub fn len(&self) -> usize {
        with_data!(self, SliceMut, data => data.len())
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn scalar(&self) -> Scalar {
        match self {
            SliceMut::F32(_) => Scalar::F32,
            SliceMut::F64(_) => Scalar::F64,
            SliceMut::BF16(_) => Scalar::BF16,
            SliceMut::F16(_) => Scalar::F16,
            SliceMut::U8(_) => Scalar::U8,
        }
    }

    pub(super) fn bytes(self) -> &'a mut [u8] {
        with_data!(self, SliceMut, data => as_bytes_mut(data))
    }
}

/// Numbers whose every bit pattern is a value and which have no padding: f32, f64, bf16, f16, u8.
pub(super) trait Plain: Copy + Send + Sync + 'static {}
impl Plain for f32 {}
impl Plain for f64 {}
impl Plain for half::bf16 {}
impl Plain for half::f16 {}
impl Plain for u8 {}

pub(super) fn as_bytes<T: Plain>(data: &[T]) -> &[u8] {
    // SAFETY: `Plain` types are made of initialised bytes only, and u8 has no alignment to keep.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

pub(super) fn as_bytes_mut<T: Plain>(data: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and every bit pattern written through the bytes is a valid `Plain` value.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), size_of_val(data)) }
}

/// `bytes` as numbers; its start is aligned and its length a multiple of the number's size, or this is our mistake.
pub(super) fn from_bytes<T: Plain>(bytes: &[u8]) -> &[T] {
    // SAFETY: every bit pattern is a valid `Plain` value.
    let (head, data, tail) = unsafe { bytes.align_to::<T>() };
    assert!(head.is_empty() && tail.is_empty(), "staged numbers are not aligned");
    data
}

/// As [`from_bytes`], to be written.
pub(super) fn from_bytes_mut<T: Plain>(bytes: &mut [u8]) -> &mut [T] {
    // SAFETY: every bit pattern is a valid `Plain` value.
    let (head, data, tail) = unsafe { bytes.align_to_mut::<T>() };
    assert!(head.is_empty() && tail.is_empty(), "staged numbers are not aligned");
    data
}

/// The call that an all_gather makes, or what is wrong with its arguments.
pub(super) fn all_gather_call(input: &Slice, output: &SliceMut, world_size: usize) -> Result<Call> {
    let (scalar, length) = (input.scalar(), input.len());
    ensure!(scalar == output.scalar(), "all_gather from {scalar} to {}", output.scalar());
    ensure!(
        output.len() == length * world_size,
        "all_gather of {length} elements from each of {world_size} ranks into {}",
        output.len()
    );
    Ok(Call::new(Kind::AllGather, scalar, length))
}

/// The call that a reduce_scatter makes, or what is wrong with its arguments.
pub(super) fn reduce_scatter_call(input: &Slice, output: &SliceMut, world_size: usize) -> Result<Call> {
    let (scalar, length) = (output.scalar(), output.len());
    ensure!(scalar == input.scalar(), "reduce_scatter from {} to {scalar}", input.scalar());
    ensure!(scalar != Scalar::U8, "reduce_scatter of u8: bytes cannot be summed");
    ensure!(
        input.len() == length * world_size,
        "reduce_scatter of {} elements into {length} on each of {world_size} ranks",
        input.len()
    );
    Ok(Call::new(Kind::ReduceScatter, scalar, length))
}

/// The call that an all_reduce makes, or what is wrong with its arguments.
pub(super) fn all_reduce_call(data: &SliceMut) -> Result<Call> {
    ensure!(data.scalar() != Scalar::U8, "all_reduce of u8: bytes cannot be summed");
    Ok(Call::new(Kind::AllReduce, data.scalar(), data.len()))
}

/// The call that a broadcast makes, or what is wrong with its arguments.
pub(super) fn broadcast_call(data: &SliceMut, root: usize, world_size: usize) -> Result<Call> {
    ensure!(root < world_size, "broadcast from rank {root} in a world of {world_size}");
    Ok(Call { root, ..Call::new(Kind::Broadcast, data.scalar(), data.len()) })
}

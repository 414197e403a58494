//! Flat memory of one dtype, zeroed, aligned for SIMD and for direct I/O, in huge pages where it is large.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;

use anyhow::{Result, bail};
use candle_core::DType;
use half::{bf16, f16};

use super::accelerator::{Accelerator, Far, Moment};
use super::arena::Charge;
use crate::kernels::Address;

/// The number types of activations and weights.
pub trait Element: candle_core::WithDType + Copy + Send + Sync + 'static {
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

/// The host's memory, aligned to a page from [`PAGE`] bytes on, so that a drive can read into it, else to 64 bytes; or an
/// accelerator's, which only kernels and copies reach ([`super::bulk`]).
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    len: usize,
    dtype: DType,
    reused: bool,
    charge: Option<Charge>,
}

#[derive(Debug)]
enum Memory {
    /// From the C library, of the buffer's size.
    Small(NonNull<u8>),
    /// From the system; may be larger than the buffer.
    Large(Option<Mapping>),
    /// An accelerator's.
    Far(Far),
}

/// Pages of the system's, given back when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    ptr: NonNull<u8>,
    bytes: usize,
    /// Keeps the pages where they are, for an accelerator's copies. Dropped before they are unmapped.
    locked: Option<Locked>,
}

/// Pages that stay where they are.
struct Locked(#[allow(dead_code, reason = "held for its drop")] Box<dyn Any + Send + Sync>);

impl std::fmt::Debug for Locked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Locked")
    }
}

// SAFETY: a `Mapping` owns its pages alone.
unsafe impl Send for Mapping {}
// SAFETY: as above; shared access does nothing.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Fresh zero pages; locked for the copies of an accelerator, if there is one.
    fn new(bytes: usize, copies_to: Option<&Arc<dyn Accelerator>>) -> Result<Self> {
        let mut mapping = Mapping { ptr: map(bytes)?, bytes, locked: None };
        if let Some(accelerator) = copies_to {
            // SAFETY: unmapped after the lock is dropped. Pages that cannot be locked are copied all the same, slower.
            mapping.locked = unsafe { accelerator.lock(mapping.ptr.as_ptr(), bytes) }.ok().map(Locked);
        }
        Ok(mapping)
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        drop(self.locked.take());
        // SAFETY: `ptr` came from `mmap` with this length and nothing borrows it any more.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.bytes) };
    }
}

// SAFETY: a `Buffer` owns its memory alone; shared access is read-only and exclusive access needs `&mut`.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

/// What direct I/O wants memory, lengths and places in a file to be multiples of.
pub(super) const PAGE: usize = 4096;

const LARGE_BYTES: usize = 1 << 20;

impl Buffer {
    /// `what` it is for is for errors.
    pub(super) fn new(dtype: DType, len: usize, charge: Option<Charge>, what: &str) -> Result<Self> {
        if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16 | DType::U8) {
            bail!("a parameter buffer cannot hold {dtype:?}");
        }
        let bytes = len * dtype.size_in_bytes();
        if let Some(accelerator) = charge.as_ref().and_then(Charge::far) {
            let memory = Memory::Far(Far::take(accelerator, bytes, what)?);
            return Ok(Buffer { memory, len, dtype, reused: true, charge });
        }
        if bytes < LARGE_BYTES {
            return Ok(Buffer { memory: Memory::Small(allocate(bytes)?), len, dtype, reused: false, charge });
        }
        let spare = charge.as_ref().and_then(|charge| charge.reuse(bytes));
        let reused = spare.is_some();
        let mapping = match spare {
            Some(mapping) => mapping,
            None => Mapping::new(bytes, charge.as_ref().and_then(Charge::copies_to))?,
        };
        Ok(Buffer { memory: Memory::Large(Some(mapping)), len, dtype, reused, charge })
    }

    /// Whether the memory was something else's before, so that it may not be zero.
    pub(super) fn is_reused(&self) -> bool {
        self.reused
    }

    fn ptr(&self) -> NonNull<u8> {
        match &self.memory {
            Memory::Small(ptr) => *ptr,
            // Only `drop` takes the mapping out.
            Memory::Large(mapping) => mapping.as_ref().map_or(NonNull::dangling(), |m| m.ptr),
            // Our own mistake, never the user's.
            Memory::Far(_) => panic!("the processor was to look into an accelerator's memory"),
        }
    }

    /// A buffer outside every arena, for scratch and tests.
    pub fn unbudgeted(dtype: DType, len: usize) -> Result<Self> {
        Self::new(dtype, len, None, "scratch")
    }

    /// The same for what comes from this accelerator: page-locked where it is large.
    pub(super) fn staging(dtype: DType, len: usize, from: &Arc<dyn Accelerator>) -> Result<Self> {
        let bytes = len * dtype.size_in_bytes();
        if bytes < LARGE_BYTES {
            return Self::unbudgeted(dtype, len);
        }
        let memory = Memory::Large(Some(Mapping::new(bytes, Some(from))?));
        Ok(Buffer { memory, len, dtype, reused: false, charge: None })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn byte_len(&self) -> usize {
        self.len * self.dtype.size_in_bytes()
    }

    /// Its memory on an accelerator, if it is there.
    pub(super) fn far(&self) -> Option<&Far> {
        match &self.memory {
            Memory::Far(far) => Some(far),
            Memory::Small(_) | Memory::Large(_) => None,
        }
    }

    pub(super) fn far_mut(&mut self) -> Option<&mut Far> {
        match &mut self.memory {
            Memory::Far(far) => Some(far),
            Memory::Small(_) | Memory::Large(_) => None,
        }
    }

    /// The accelerator whose memory it is.
    pub fn accelerator(&self) -> Option<&Arc<dyn Accelerator>> {
        self.far().map(|far| &far.on)
    }

    /// No kernel is launched on it from now on until somebody asks for its address: copies to the host need not wait for
    /// what is launched later.
    pub fn note_last_use(&self) -> Result<()> {
        self.far().map_or(Ok(()), Far::note)
    }

    /// For kernels that read it while it lives.
    pub fn address(&self) -> Address {
        match &self.memory {
            Memory::Far(far) => far.address(),
            Memory::Small(_) | Memory::Large(_) => Address(self.ptr().as_ptr() as u64),
        }
    }

    /// For kernels that change it while it lives.
    pub fn address_mut(&mut self) -> Address {
        self.address()
    }

    /// On an accelerator: where it is, and what must be over before something beside the accelerator's row may use it. That
    /// has ended before anything else is asked of this buffer.
    pub fn beside(&self) -> Result<Option<(Address, Moment)>> {
        self.far().map(Far::beside).transpose()
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `ptr` is valid for `byte_len` initialised (zeroed) bytes for as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.ptr().as_ptr(), self.byte_len()) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr().as_ptr(), self.byte_len()) }
    }

    /// The elements. Panics if `T` is not the buffer's dtype: that is our own mistake, never the user's.
    pub fn as_slice<T: Element>(&self) -> &[T] {
        assert_eq!(T::DTYPE, self.dtype, "buffer read as another dtype");
        // SAFETY: the memory is aligned to 64, holds `len` elements of `T`, and every bit pattern is valid.
        unsafe { std::slice::from_raw_parts(self.ptr().as_ptr() as *const T, self.len) }
    }

    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        assert_eq!(T::DTYPE, self.dtype, "buffer written as another dtype");
        // SAFETY: as in `as_slice`, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr().as_ptr() as *mut T, self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = self.byte_len();
        match &mut self.memory {
            Memory::Small(ptr) if bytes > 0 => {
                // SAFETY: `ptr` came from `aligned_alloc` and nothing borrows it any more.
                unsafe { libc::free(ptr.as_ptr().cast()) };
            }
            Memory::Small(_) | Memory::Far(_) => {}
            Memory::Large(mapping) => {
                if let (Some(charge), Some(mapping)) = (&self.charge, mapping.take()) {
                    charge.keep(mapping);
                }
            }
        }
    }
}

/// Not from the heap that is counted: arenas count their buffers themselves.
fn allocate(bytes: usize) -> Result<NonNull<u8>> {
    let align = if bytes < PAGE { 64 } else { PAGE };
    if bytes == 0 {
        return Ok(NonNull::<u128>::dangling().cast());
    }
    let size = bytes.next_multiple_of(align);
    // SAFETY: the alignment is a power of two that divides the size; fresh memory of this size may be written.
    let ptr = unsafe {
        let ptr = libc::aligned_alloc(align, size);
        if !ptr.is_null() {
            libc::memset(ptr, 0, size);
        }
        ptr
    };
    NonNull::new(ptr.cast()).ok_or_else(|| anyhow::anyhow!("the system has no {bytes} bytes of memory left"))
}

/// Fresh zero pages, straight from the system so that dropping them gives them back.
fn map(bytes: usize) -> Result<NonNull<u8>> {
    // SAFETY: an anonymous private mapping touches no existing memory.
    let ptr = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if ptr == libc::MAP_FAILED {
        bail!("the system has no {bytes} bytes of memory left: {}", std::io::Error::last_os_error());
    }
    #[cfg(target_os = "linux")]
    // SAFETY: advice on the mapping just made; failure is harmless (no huge pages).
    unsafe {
        libc::madvise(ptr, bytes, libc::MADV_HUGEPAGE)
    };
    Ok(NonNull::new(ptr.cast()).expect("mmap never returns null on success"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_aligned_and_typed() {
        for len in [0, 3, 1024, 5000, 1 << 19] {
            let mut buffer = Buffer::unbudgeted(DType::F32, len).unwrap();
            assert!(buffer.as_slice::<f32>().iter().all(|&x| x == 0.0));
            buffer.as_mut_slice::<f32>().fill(1.5);
            assert_eq!(buffer.bytes().len(), 4 * len);
            assert!(4 * len < PAGE || (buffer.bytes().as_ptr() as usize).is_multiple_of(PAGE));
        }
    }
}

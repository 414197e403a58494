//! Memory of the host that the GPU copies from and to at the bus's full speed and without the host's help: page-locked.

use std::ptr::NonNull;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use cudarc::driver::{CudaContext, result, sys};

use super::gpu::Gpu;
use super::status::{Attempt, describe};

/// Page-locked bytes of our own.
pub struct Pinned {
    ptr: NonNull<u8>,
    bytes: usize,
    context: Arc<CudaContext>,
}

// SAFETY: owns its memory alone; shared access is read-only and exclusive access needs `&mut`.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Zeroed. Taking it costs about a millisecond a few MB, so it is kept and used again. Errors name `what`.
    pub fn new(gpu: &Gpu, bytes: usize, what: &str) -> Result<Pinned> {
        let context = gpu.context().clone();
        context.bind_to_thread().attempt(what)?;
        // For every context of the process. Not write-combined: the optimizer reads what comes down.
        // SAFETY: a plain allocation; it is filled below before anyone reads it.
        let ptr = unsafe { result::malloc_host(bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) }
            .map_err(|error| anyhow!("{what}: {bytes} bytes of page-locked host memory: {}", describe(error)))?;
        let ptr = NonNull::new(ptr.cast::<u8>()).ok_or_else(|| anyhow!("{what}: the driver gave no memory"))?;
        // SAFETY: fresh memory of this many bytes may be written.
        unsafe { std::ptr::write_bytes(ptr.as_ptr(), 0, bytes) };
        Ok(Pinned { ptr, bytes, context })
    }

    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: valid for `bytes` initialised bytes as long as `self` lives; a copy into it owns it (`Stream::download`).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` is exclusive; a copy from it shares it (`Stream::upload`).
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: came from `malloc_host` and is freed once; copies that use it own it. Nobody to tell of an error.
            let _ = unsafe { result::free_host(self.ptr.as_ptr().cast()) };
        }
    }
}

/// Memory that is somebody else's and stays page-locked as long as this lives.
pub struct LockedPages {
    start: usize,
    context: Arc<CudaContext>,
}

impl LockedPages {
    /// Locks the pages of `bytes` bytes from `start`.
    ///
    /// # Safety
    /// The memory stays mapped until the result is dropped, and no part of it is locked already.
    pub unsafe fn over(gpu: &Gpu, start: *mut u8, bytes: usize, what: &str) -> Result<LockedPages> {
        let context = gpu.context().clone();
        context.bind_to_thread().attempt(what)?;
        // SAFETY: the caller's promise.
        unsafe { sys::cuMemHostRegister_v2(start.cast(), bytes, sys::CU_MEMHOSTREGISTER_PORTABLE) }.result().map_err(
            |error| anyhow!("{what}: {bytes} bytes of host memory cannot be page-locked: {}", describe(error)),
        )?;
        Ok(LockedPages { start: start as usize, context })
    }
}

impl Drop for LockedPages {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: registered in `over` and unregistered once. Nobody to tell of an error.
            let _ = unsafe { sys::cuMemHostUnregister(self.start as *mut _) };
        }
    }
}

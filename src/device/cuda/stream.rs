//! A row of work for the GPU, done in order: copies, fills, launches, collectives. The rules between streams are in the
//! module above.

use std::any::Any;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};
use cudarc::driver::sys::{self, CUdeviceptr};
use cudarc::driver::{CudaContext, CudaStream};

use super::event::Mark;
use super::pool::Pool;
use super::status::{Attempt, Faults};
use super::{DeviceMemory, Pinned};
use crate::device::Pending;
use crate::kernels::Address;

/// Cheap to clone; any thread may put work on it.
#[derive(Clone)]
pub struct Stream(Arc<Inner>);

struct Inner {
    name: String,
    raw: Arc<CudaStream>,
    pool: Arc<Pool>,
    faults: Faults,
    /// What the work on the stream uses, until it is done.
    kept: Mutex<VecDeque<(Mark, Box<dyn Any + Send>)>>,
}

impl Stream {
    pub(super) fn over(name: &str, raw: Arc<CudaStream>, pool: Arc<Pool>, faults: Faults) -> Stream {
        Stream(Arc::new(Inner { name: name.to_string(), raw, pool, faults, kept: Mutex::default() }))
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The driver's handle, for libraries that put work on the stream themselves. Valid as long as `self`.
    pub fn raw(&self) -> sys::CUstream {
        self.0.raw.cu_stream()
    }

    pub(super) fn faults(&self) -> &Faults {
        &self.0.faults
    }

    pub(super) fn cudarc(&self) -> &Arc<CudaStream> {
        &self.0.raw
    }

    pub fn context(&self) -> &Arc<CudaContext> {
        self.0.raw.context()
    }

    pub(super) fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// Marks what is on the stream now.
    pub fn mark(&self) -> Result<Mark> {
        Mark::set(&self.0.raw, false, &self.0.faults)
    }

    /// As [`Self::mark`], with a time stamp.
    pub fn timed_mark(&self) -> Result<Mark> {
        Mark::set(&self.0.raw, true, &self.0.faults)
    }

    /// What is put on the stream from now on begins when `mark` is reached. The host does not wait.
    pub fn after(&self, mark: &Mark) -> Result<()> {
        mark.hold(&self.0.raw)
    }

    /// Waits until all that is on the stream is done.
    pub fn synchronize(&self) -> Result<()> {
        self.mark()?.wait()?;
        self.reap();
        Ok(())
    }

    /// Memory of the GPU, not filled, for use on this stream; others wait for a mark set after this. Errors name `what`.
    pub fn alloc(&self, bytes: usize, what: &str) -> Result<DeviceMemory> {
        DeviceMemory::take(self, bytes, what)
    }

    /// As [`Self::alloc`], zeroed.
    pub fn alloc_zeroed(&self, bytes: usize, what: &str) -> Result<DeviceMemory> {
        let memory = self.alloc(bytes, what)?;
        self.zero(&memory, 0..bytes)?;
        Ok(memory)
    }

    pub fn zero(&self, memory: &DeviceMemory, range: Range<usize>) -> Result<()> {
        let address = memory.range(&range)?;
        if range.is_empty() {
            return Ok(());
        }
        self.context().bind_to_thread().attempt("zeroing memory")?;
        // SAFETY: `range` lies in memory that is handed out, and its free comes after this on its home stream.
        unsafe { sys::cuMemsetD8Async(address.0, 0, range.len(), self.raw()) }.result().attempt("zeroing memory")
    }

    /// Keeps `what` until all that is on the stream now is done: memory of a copy under way.
    pub fn keep(&self, what: impl Any + Send) -> Result<()> {
        let mark = self.mark()?;
        self.reap();
        let mut kept = self.0.kept.lock().unwrap_or_else(|e| e.into_inner());
        kept.push_back((mark, Box::new(what)));
        Ok(())
    }

    /// Drops what was kept for work that is done.
    fn reap(&self) {
        let done: Vec<_> = {
            let mut kept = self.0.kept.lock().unwrap_or_else(|e| e.into_inner());
            let count = kept.iter().take_while(|(mark, _)| mark.is_reached().unwrap_or(false)).count();
            kept.drain(..count).collect()
        };
        // Only now, as it may put frees on streams.
        drop(done);
    }

    /// Copies from page-locked memory to the GPU's. `from` can be looked at meanwhile and changed by nobody.
    pub fn upload(&self, from: &Arc<Pinned>, range: Range<usize>, to: &DeviceMemory, at: usize) -> Result<Mark> {
        ensure!(range.start <= range.end && range.end <= from.len(), "a copy of {range:?} out of {} bytes", from.len());
        let address = to.range(&(at..at + range.len()))?;
        // SAFETY: both sides were checked; the stream keeps `from` (whose bytes nobody can change while it is shared)
        // until the copy is done, and the GPU's memory is freed after the mark that its user has to leave.
        unsafe { self.copy_from_host(address, from.bytes()[range.clone()].as_ptr(), range.len())? };
        let mark = self.mark()?;
        to.used_until(&mark);
        self.keep(from.clone())?;
        Ok(mark)
    }

    /// Copies from the GPU's memory to page-locked memory, which comes back when the copy is done.
    pub fn download(
        &self,
        from: &DeviceMemory,
        range: Range<usize>,
        mut to: Pinned,
        at: usize,
    ) -> Result<Pending<Pinned>> {
        let address = from.range(&range)?;
        let end = at + range.len();
        ensure!(end <= to.len(), "a copy into {at}..{end} of {} bytes", to.len());
        let target = to.bytes_mut()[at..end].as_mut_ptr();
        // SAFETY: both sides were checked; nobody looks at `to` before the mark, and the stream keeps it until then.
        unsafe { self.copy_to_host(target, address, range.len())? };
        // Kept by the stream even if nobody waits; who waits is the only other owner.
        let to = Arc::new(Mutex::new(Some(to)));
        let mark = self.mark()?;
        from.used_until(&mark);
        self.keep(to.clone())?;
        Ok(Pending::after(move || {
            mark.wait()?;
            let pinned = to.lock().unwrap_or_else(|e| e.into_inner()).take();
            pinned.ok_or_else(|| anyhow::anyhow!("page-locked memory was taken twice"))
        }))
    }

    /// Copies within the GPU's memory.
    pub fn copy(&self, from: &DeviceMemory, range: Range<usize>, to: &DeviceMemory, at: usize) -> Result<Mark> {
        let (source, target) = (from.range(&range)?, to.range(&(at..at + range.len()))?);
        // SAFETY: both sides were checked; both are freed after the mark.
        unsafe { self.copy_on_device(target, source, range.len())? };
        let mark = self.mark()?;
        from.used_until(&mark);
        to.used_until(&mark);
        Ok(mark)
    }

    /// Begins a copy from the host.
    ///
    /// # Safety
    /// Both sides hold `bytes` bytes, which nobody else writes (or, of `to`, reads) until the work put on this stream is
    /// done. From memory that is not page-locked the copy is slow, and has left the host's memory when this returns.
    pub unsafe fn copy_from_host(&self, to: Address, from: *const u8, bytes: usize) -> Result<()> {
        self.context().bind_to_thread().attempt("copying to the GPU")?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to.0 as CUdeviceptr, from.cast(), bytes, self.raw()) }
            .result()
            .attempt("copying to the GPU")
    }

    /// Begins a copy to the host.
    ///
    /// # Safety
    /// As for [`Self::copy_from_host`], the other way round.
    pub unsafe fn copy_to_host(&self, to: *mut u8, from: Address, bytes: usize) -> Result<()> {
        self.context().bind_to_thread().attempt("copying from the GPU")?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from.0 as CUdeviceptr, bytes, self.raw()) }
            .result()
            .attempt("copying from the GPU")
    }

    /// Begins a copy within the GPU.
    ///
    /// # Safety
    /// Both sides hold `bytes` bytes of the GPU's memory until the work put on this stream is done, and do not overlap.
    pub unsafe fn copy_on_device(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.context().bind_to_thread().attempt("copying on the GPU")?;
        if bytes == 0 || to == from {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { sys::cuMemcpyDtoDAsync_v2(to.0 as CUdeviceptr, from.0 as CUdeviceptr, bytes, self.raw()) }
            .result()
            .attempt("copying on the GPU")
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let kept = self.kept.get_mut().unwrap_or_else(|e| e.into_inner());
        if !kept.is_empty() {
            // What is kept may go only when the copies are done. An error here is one that waits have told.
            let _ = self.raw.synchronize();
        }
    }
}

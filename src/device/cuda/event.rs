//! Marks on streams: what one waits for. cudarc's events cannot be told to put a waiting thread to sleep and measure no
//! time at once, so these are our own.

use std::sync::Arc;

use anyhow::Result;
use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};

use super::status::{Attempt, Faults, failed};
use crate::device::Pending;

/// A point on a stream: reached when all that was put there before it is done. A value to be waited for, by the host or by
/// another stream ([`super::Stream::after`]); cheap to clone.
#[derive(Clone)]
pub struct Mark {
    event: Arc<Event>,
    faults: Faults,
}

struct Event {
    raw: sys::CUevent,
    context: Arc<CudaContext>,
}

// SAFETY: the driver's events may be used by any thread, several at once.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made by `cuEventCreate` and destroyed once; the driver lets waits that are under way end.
            // An error here is one that a wait has told or will tell.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}

impl Mark {
    /// Marks what is on `stream` now. `timed`: [`Self::since`] can be asked, at the cost of a time stamp.
    pub(super) fn set(stream: &CudaStream, timed: bool, faults: &Faults) -> Result<Mark> {
        let context = stream.context().clone();
        context.bind_to_thread().attempt("marking a stream")?;
        // Who waits sleeps: the cores have the optimizer and other ranks to run.
        let sleeps = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        let untimed = if timed { 0 } else { sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32 };
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for the handle, and flags the driver knows; the context is current.
        unsafe { sys::cuEventCreate(&mut raw, sleeps | untimed) }.result().attempt("making an event")?;
        let event = Event { raw, context };
        // SAFETY: both handles are alive and of one context.
        unsafe { sys::cuEventRecord(event.raw, stream.cu_stream()) }.result().attempt("marking a stream")?;
        Ok(Mark { event: Arc::new(event), faults: faults.clone() })
    }

    /// Makes `stream` wait for this before whatever is put on it from now on. Does not wait itself.
    pub(super) fn hold(&self, stream: &CudaStream) -> Result<()> {
        self.event.context.bind_to_thread().attempt("making a stream wait")?;
        // SAFETY: both handles are alive and of one context; 0 is the only flag that matters outside graphs.
        unsafe { sys::cuStreamWaitEvent(stream.cu_stream(), self.event.raw, 0) }
            .result()
            .attempt("making a stream wait")
    }

    /// Whether it is reached. Errors are those of the work before it.
    pub fn is_reached(&self) -> Result<bool> {
        self.event.context.bind_to_thread().attempt("asking for an event")?;
        // SAFETY: the handle is alive.
        match unsafe { sys::cuEventQuery(self.event.raw) } {
            CUresult::CUDA_SUCCESS => Ok(true),
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            error => Err(failed("what was put on a stream", DriverError(error))),
        }
    }

    /// Waits until it is reached. Errors are those of the work before it, or that the run has gone wrong elsewhere.
    pub fn wait(&self) -> Result<()> {
        self.faults.check()?;
        self.reach()?;
        self.faults.check()
    }

    /// Waits until it is reached, also if the run has gone wrong elsewhere: for who must not go on before.
    pub(super) fn reach(&self) -> Result<()> {
        self.event.context.bind_to_thread().attempt("waiting for an event")?;
        // SAFETY: the handle is alive.
        unsafe { sys::cuEventSynchronize(self.event.raw) }.result().attempt("what was put on a stream")
    }

    /// `value` once this is reached.
    pub fn then<T: Send + 'static>(self, value: T) -> Pending<T> {
        Pending::after(move || self.wait().map(|()| value))
    }

    /// Seconds from `earlier` to this; both timed, both reached.
    pub fn since(&self, earlier: &Mark) -> Result<f64> {
        self.event.context.bind_to_thread().attempt("reading a time")?;
        // SAFETY: both handles are alive, timed and recorded.
        let milliseconds = unsafe { result::event::elapsed(earlier.event.raw, self.event.raw) }
            .attempt("the time between two events")?;
        Ok(f64::from(milliseconds) / 1000.0)
    }
}

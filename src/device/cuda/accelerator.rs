//! A GPU as memory and copies see it: the row of work is the computing stream; copies from and to the host have a stream
//! each, beside it.

use std::any::Any;
use std::sync::Arc;

use anyhow::{Context, Result};
use cudarc::driver::sys;

use super::status::Attempt;
use super::{Gpu, LockedPages, Mark, Stream};
use crate::device::trace::{self, Row};
use crate::device::{Accelerator, Moment, Taken};
use crate::kernels::Address;

impl Accelerator for Gpu {
    fn take(&self, bytes: usize, what: &str) -> Result<Taken> {
        let memory = self.computing().alloc(bytes, what)?;
        Ok(Taken { address: memory.address(), memory: Box::new(memory) })
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.context().bind_to_thread().attempt("zeroing memory")?;
        // SAFETY: the memory is the caller's, and its free comes after this on the computing stream, its home.
        unsafe { sys::cuMemsetD8Async(at.0, 0, bytes, self.computing().raw()) }.result().attempt("zeroing memory")
    }

    unsafe fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.computing().copy_on_device(to, from, bytes) }
    }

    fn moment(&self) -> Result<Moment> {
        Ok(Moment(Arc::new(self.computing().mark()?)))
    }

    fn timed_moment(&self) -> Result<Moment> {
        Ok(Moment(Arc::new(self.computing().timed_mark()?)))
    }

    fn seconds(&self, from: &Moment, to: &Moment) -> Result<f64> {
        let (from, to) = (mark_of(from)?, mark_of(to)?);
        from.wait()?;
        to.wait()?;
        to.since(from)
    }

    unsafe fn upload(&self, from: *const u8, to: Address, bytes: usize, after: &Moment) -> Result<()> {
        // SAFETY: the caller's promise; the copy has ended when `beside` returns.
        beside(self.uploads(), "GPU, from the host", bytes, after, |stream| unsafe {
            stream.copy_from_host(to, from, bytes)
        })
    }

    unsafe fn download(&self, from: Address, to: *mut u8, bytes: usize, after: &Moment) -> Result<()> {
        // SAFETY: as above.
        beside(self.downloads(), "GPU, to the host", bytes, after, |stream| unsafe {
            stream.copy_to_host(to, from, bytes)
        })
    }

    unsafe fn lock(&self, start: *mut u8, bytes: usize) -> Result<Box<dyn Any + Send + Sync>> {
        // SAFETY: the caller's promise; the pages are fresh, so that no part of them is locked already.
        Ok(Box::new(unsafe { LockedPages::over(self, start, bytes, "memory for copies")? }))
    }

    fn peak(&self) -> Result<Option<usize>> {
        Ok(Some(self.usage()?.used_peak))
    }

    fn turn(&self) -> Result<Option<usize>> {
        Gpu::turn(self).map(Some)
    }

    fn reset_peak(&self) -> Result<()> {
        Gpu::reset_peak(self)
    }
}

/// Puts a copy on `stream` after that moment of the computing stream, and waits until it has ended, whatever has gone
/// wrong elsewhere meanwhile: the host's side of it is used again when this returns.
fn beside(
    stream: &Stream,
    who: &'static str,
    bytes: usize,
    after: &Moment,
    copy: impl FnOnce(&Stream) -> Result<()>,
) -> Result<()> {
    let timed = trace::is_on();
    stream.faults().check()?;
    stream.after(mark_of(after)?)?;
    let begun = if timed { Some(stream.timed_mark()?) } else { None };
    copy(stream)?;
    match if timed { stream.timed_mark() } else { stream.mark() } {
        Ok(ended) => {
            ended.reach()?;
            if let Some(begun) = begun {
                let [from, to] = [begun, ended].map(|mark| Moment(Arc::new(mark)));
                trace::on_accelerator(Row::Copy, who, "copy", (from, to), Some(bytes));
            }
        }
        Err(error) => {
            // Nothing is left but to wait for all that is there; an error of that is the same trouble.
            let _ = stream.cudarc().synchronize();
            return Err(error);
        }
    }
    stream.faults().check()
}

fn mark_of(moment: &Moment) -> Result<&Mark> {
    moment.0.downcast_ref::<Mark>().context("a moment of another accelerator")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::bulk::{cast, read_bytes, write_bytes, zero};
    use crate::device::cuda::tests::gpu;
    use crate::device::{Buffer, Memory};
    use candle_core::DType;

    #[test]
    fn bytes_of_buffers_go_up_across_and_down_from_two_threads() -> Result<()> {
        let Some(gpu) = gpu() else { return Ok(()) };
        let memory = Memory::beside(gpu.clone(), None, None);
        // Less than a megabyte is memory that is not page-locked.
        for len in [1000, 3 << 20] {
            let work = |seed: usize| -> Result<()> {
                let values: Vec<u8> = (0..len).map(|i| (i * 31 + seed) as u8).collect();
                for _ in 0..20 {
                    let (mut here, mut back) =
                        (memory.host.alloc(DType::U8, len, "a test")?, memory.host.alloc(DType::U8, len, "a test")?);
                    here.bytes_mut().copy_from_slice(&values);
                    let mut first = memory.device.alloc_dirty(DType::U8, len, "a test")?;
                    let mut second = memory.device.alloc(DType::U8, len, "a test")?;
                    cast(&here, &mut first)?;
                    cast(&first, &mut second)?;
                    zero(&mut first)?;
                    // Handed out again while the above may still have to be done.
                    drop(first);
                    second.note_last_use()?;
                    cast(&second, &mut back)?;
                    assert!(back.bytes() == values, "other bytes came back");
                }
                Ok(())
            };
            std::thread::scope(|scope| {
                let other = scope.spawn(|| work(7));
                work(3)?;
                other.join().unwrap_or_else(|_| anyhow::bail!("the other thread panicked"))
            })?;
        }
        Ok(())
    }

    #[test]
    fn parts_of_buffers_are_read_and_written() -> Result<()> {
        let Some(gpu) = gpu() else { return Ok(()) };
        let memory = Memory::beside(gpu, None, None);
        let mut there: Buffer = memory.device.alloc(DType::U8, 100, "a test")?;
        write_bytes(&[1, 2, 3], &mut there, 40)?;
        let mut bytes = [9; 5];
        read_bytes(&there, 39, &mut bytes)?;
        assert_eq!(bytes, [0, 1, 2, 3, 0]);
        Ok(())
    }
}

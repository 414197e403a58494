//! The emulated device as an accelerator: its memory is its own, so that whoever looks into it from the host is caught,
//! and it begins with NaNs. What is put into its row is done at once.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};

use super::accelerator::{Accelerator, Moment, Taken};
use crate::kernels::Address;
use crate::kernels::emulated::{Emulated, Values};

/// What addresses of an accelerator's memory are multiples of.
const ALIGNMENT: usize = 256;

impl Accelerator for Emulated {
    fn take(&self, bytes: usize, _what: &str) -> Result<Taken> {
        let memory = Values::<u8>::unwritten(bytes.max(1).next_multiple_of(ALIGNMENT))?;
        Ok(Taken { address: memory.address(), memory: Box::new(memory) })
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<()> {
        // SAFETY: launches are over when they return, and the memory is the caller's.
        unsafe { std::ptr::write_bytes(at.0 as *mut u8, 0, bytes) };
        Ok(())
    }

    unsafe fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, to.0 as *mut u8, bytes) };
        Ok(())
    }

    fn moment(&self) -> Result<Moment> {
        Ok(Moment(Arc::new(())))
    }

    fn timed_moment(&self) -> Result<Moment> {
        Ok(Moment(Arc::new(Instant::now())))
    }

    fn seconds(&self, from: &Moment, to: &Moment) -> Result<f64> {
        let at = |moment: &Moment| moment.0.downcast_ref::<Instant>().copied().context("a moment that is not timed");
        Ok(at(to)?.duration_since(at(from)?).as_secs_f64())
    }

    unsafe fn upload(&self, from: *const u8, to: Address, bytes: usize, _after: &Moment) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from, to.0 as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn download(&self, from: Address, to: *mut u8, bytes: usize, _after: &Moment) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, to, bytes) };
        Ok(())
    }

    unsafe fn lock(&self, _start: *mut u8, _bytes: usize) -> Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new(()))
    }

    fn peak(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    fn turn(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    fn reset_peak(&self) -> Result<()> {
        Ok(())
    }
}

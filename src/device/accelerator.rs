//! An accelerator as memory and copies see it: a GPU, or the emulated one of tests. It does what it is given in order,
//! in one row (the computing stream): kernels, fills and copies within its memory. So whatever is right for threads that
//! wait for each other is right here: what was put into the row before somebody's wait ended is done before what that
//! somebody puts in afterwards. Copies from and to the host go on beside the row; see [`Far`].

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex};

use anyhow::Result;

use crate::kernels::{Address, Launcher};

/// A point in an accelerator's row of work.
#[derive(Clone)]
pub struct Moment(pub Arc<dyn Any + Send + Sync>);

/// Memory of an accelerator. Dropping it gives it back to what is put into the row later.
pub struct Taken {
    pub address: Address,
    /// What owns it.
    pub memory: Box<dyn Any + Send + Sync>,
}

/// What a device is asked for besides launching kernels.
pub trait Accelerator: Launcher {
    /// Memory for what is put into the row from now on, not filled. Errors name `what` it is for.
    fn take(&self, bytes: usize, what: &str) -> Result<Taken>;

    /// Puts a fill with zero bytes into the row.
    fn zero(&self, at: Address, bytes: usize) -> Result<()>;

    /// Puts a copy within the accelerator's memory into the row.
    ///
    /// # Safety
    /// Both sides hold `bytes` bytes of its memory until the row has come there, and do not overlap.
    unsafe fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()>;

    /// Here, in the row.
    fn moment(&self) -> Result<Moment>;

    /// As [`Self::moment`], for [`Self::seconds`].
    fn timed_moment(&self) -> Result<Moment>;

    /// Between two timed moments; waits until both are reached.
    fn seconds(&self, from: &Moment, to: &Moment) -> Result<f64>;

    /// Copies from the host, beside the row, once it has come to `after`; has ended when this returns.
    ///
    /// # Safety
    /// Both sides hold `bytes` bytes, which nobody else uses meanwhile.
    unsafe fn upload(&self, from: *const u8, to: Address, bytes: usize, after: &Moment) -> Result<()>;

    /// Copies to the host, likewise.
    ///
    /// # Safety
    /// As for [`Self::upload`].
    unsafe fn download(&self, from: Address, to: *mut u8, bytes: usize, after: &Moment) -> Result<()>;

    /// Keeps pages of the host where they are, so that copies are fast, until the result is dropped.
    ///
    /// # Safety
    /// The pages stay mapped until then.
    unsafe fn lock(&self, start: *mut u8, bytes: usize) -> Result<Box<dyn Any + Send + Sync>>;

    /// Most bytes that were taken at a time, by whoever: buffers, tensors, scratch. None where nobody counts them.
    fn peak(&self) -> Result<Option<usize>>;

    /// The most since this was asked before. [`Self::peak`] does not forget it.
    fn turn(&self) -> Result<Option<usize>>;

    fn reset_peak(&self) -> Result<()>;
}

/// A buffer's memory on an accelerator.
///
/// Copies between it and the host wait for what was put into the row before they were asked for. Often that is too long:
/// what is in the row by then may have nothing to do with this memory. So the point to wait for can be noted, and is
/// valid until the next time somebody asks for the address, who may launch kernels on it.
pub(super) struct Far {
    pub on: Arc<dyn Accelerator>,
    taken: Taken,
    ready: Mutex<Option<Moment>>,
}

impl Far {
    /// Fresh memory: nothing in the row uses it yet.
    pub fn take(on: &Arc<dyn Accelerator>, bytes: usize, what: &str) -> Result<Far> {
        let taken = on.take(bytes, what)?;
        let ready = Mutex::new(Some(on.moment()?));
        Ok(Far { on: on.clone(), taken, ready })
    }

    /// For kernels.
    pub fn address(&self) -> Address {
        *self.noted() = None;
        self.taken.address
    }

    /// Nothing is launched on this memory from now on until it is asked for its address again: copies need not wait for
    /// what comes into the row later.
    pub fn note(&self) -> Result<()> {
        let now = self.on.moment()?;
        *self.noted() = Some(now);
        Ok(())
    }

    fn noted(&self) -> std::sync::MutexGuard<'_, Option<Moment>> {
        self.ready.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn ready(&self) -> Result<Moment> {
        let noted = self.noted().clone();
        noted.map_or_else(|| self.on.moment(), Ok)
    }

    /// For what does not go through the row, has ended before anything else is launched on this memory, and waits for the
    /// moment: a collective.
    pub fn beside(&self) -> Result<(Address, Moment)> {
        Ok((self.taken.address, self.ready()?))
    }

    /// Copies `bytes` to where `at` bytes have gone by; the caller has checked that they fit.
    pub fn upload(&mut self, bytes: &[u8], at: usize) -> Result<()> {
        let after = self.ready()?;
        // SAFETY: the range was checked; `self` is borrowed alone, and what the row does with it was waited for.
        unsafe { self.on.upload(bytes.as_ptr(), self.taken.address.at(at), bytes.len(), &after) }
    }

    /// The other way round.
    pub fn download(&self, at: usize, into: &mut [u8]) -> Result<()> {
        let after = self.ready()?;
        // SAFETY: the range was checked; what the row writes there was waited for.
        unsafe { self.on.download(self.taken.address.at(at), into.as_mut_ptr(), into.len(), &after) }
    }
}

impl fmt::Debug for Far {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Far({:#x})", self.taken.address.0)
    }
}

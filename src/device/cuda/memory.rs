//! A piece of the GPU's memory that is ours, as against candle's tensors: buckets, moments, staging, scratch.

use std::ops::Range;
use std::sync::Mutex;

use anyhow::{Result, ensure};

use super::event::Mark;
use super::stream::Stream;
use crate::kernels::Address;

/// Handed out on one stream, its home, and freed there when dropped: after all that is on that stream then, and after
/// what other streams were said to do with it ([`Self::used_until`]).
pub struct DeviceMemory {
    address: Address,
    bytes: usize,
    home: Stream,
    users: Mutex<Vec<Mark>>,
}

/// More marks than this are looked through for those that are reached.
const MANY_MARKS: usize = 16;

impl DeviceMemory {
    pub(super) fn take(home: &Stream, bytes: usize, what: &str) -> Result<DeviceMemory> {
        let address = Address(home.pool().take(home.raw(), bytes, what)?);
        Ok(DeviceMemory { address, bytes, home: home.clone(), users: Mutex::default() })
    }

    pub fn address(&self) -> Address {
        self.address
    }

    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The stream it was allocated on.
    pub fn home(&self) -> &Stream {
        &self.home
    }

    /// Where `range` begins; an error if it does not lie within.
    pub fn range(&self, range: &Range<usize>) -> Result<Address> {
        let Range { start, end } = *range;
        ensure!(start <= end && end <= self.bytes, "bytes {start} to {end} of {} of the GPU's", self.bytes);
        Ok(self.address.at(start))
    }

    /// Some other stream uses it until `mark`: it is not freed before. (Whether its contents can be used before is for
    /// the streams to say.)
    pub fn used_until(&self, mark: &Mark) {
        let mut users = self.users.lock().unwrap_or_else(|e| e.into_inner());
        if users.len() >= MANY_MARKS {
            users.retain(|user| !user.is_reached().unwrap_or(true));
        }
        users.push(mark.clone());
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let users = std::mem::take(self.users.get_mut().unwrap_or_else(|e| e.into_inner()));
        for user in users {
            if self.home.after(&user).is_err() {
                // The driver is broken, and so is every wait: the error is told there. Leaking is safe.
                return;
            }
        }
        // SAFETY: taken with these bytes in `take` and given back once; its users were waited for by its home stream.
        let _ = unsafe { self.home.pool().give(self.home.raw(), self.address.0, self.bytes) };
    }
}

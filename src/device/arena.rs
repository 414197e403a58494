//! Budgeted memory: every parameter, gradient and moment is allocated here, so what a tier holds and held at most is
//! known, and a budget is enforced where memory is handed out.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};
use candle_core::DType;

use super::Buffer;
use super::buffer::Mapping;

/// A named pool with an optional limit. Cheap to clone; buffers give their bytes back when dropped.
#[derive(Clone, Debug)]
pub struct Arena(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    limit: Option<usize>,
    used: AtomicUsize,
    peak: AtomicUsize,
    /// Large memory that was given back and waits for its next use: fresh pages from the system are dear.
    spare: Mutex<Vec<Mapping>>,
}

/// Bytes of an arena now and at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub used: usize,
    pub peak: usize,
}

impl Arena {
    pub fn new(name: impl Into<String>, limit: Option<usize>) -> Self {
        Arena(Arc::new(Inner {
            name: name.into(),
            limit,
            used: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
            spare: Mutex::default(),
        }))
    }

    /// A zeroed buffer of `len` elements. Errors name the arena, `what` was wanted and the limit.
    pub fn alloc(&self, dtype: DType, len: usize, what: &str) -> Result<Buffer> {
        let mut buffer = self.alloc_dirty(dtype, len, what)?;
        if buffer.is_reused() {
            super::threads::fill_zero_bytes(buffer.bytes_mut());
        }
        Ok(buffer)
    }

    /// As [`Self::alloc`], but the contents are whatever was there: for what is written whole before it is read.
    pub fn alloc_dirty(&self, dtype: DType, len: usize, what: &str) -> Result<Buffer> {
        let bytes = len * dtype.size_in_bytes();
        let charge = Charge::take(&self.0, bytes, what)?;
        Buffer::new(dtype, len, Some(charge))
    }

    pub fn usage(&self) -> Usage {
        Usage { used: self.0.used.load(Relaxed), peak: self.0.peak.load(Relaxed) }
    }

    /// Starts the peak anew from what is in use.
    pub fn reset_peak(&self) {
        self.0.peak.store(self.0.used.load(Relaxed), Relaxed);
    }
}

/// Bytes taken from an arena, given back on drop.
#[derive(Debug)]
pub(super) struct Charge {
    arena: Arc<Inner>,
    bytes: usize,
}

impl Charge {
    fn take(arena: &Arc<Inner>, bytes: usize, what: &str) -> Result<Self> {
        let used = arena.used.fetch_add(bytes, Relaxed) + bytes;
        if let Some(limit) = arena.limit
            && used > limit
        {
            arena.used.fetch_sub(bytes, Relaxed);
            bail!(
                "{what}: {bytes} bytes do not fit into the {} memory: {} of {limit} bytes are in use",
                arena.name,
                used - bytes
            );
        }
        arena.peak.fetch_max(used, Relaxed);
        Ok(Charge { arena: arena.clone(), bytes })
    }
}

impl Charge {
    /// Spare memory of at least `bytes`, the smallest there is. If all is smaller, the largest is given up, since what
    /// is about to be mapped serves in its place from now on: so an arena keeps no more pieces than were ever in use at
    /// once.
    pub(super) fn reuse(&self, bytes: usize) -> Option<Mapping> {
        let mut spare = self.arena.spare.lock().unwrap_or_else(|e| e.into_inner());
        let fits = (0..spare.len()).filter(|&i| spare[i].bytes() >= bytes).min_by_key(|&i| spare[i].bytes());
        if let Some(i) = fits {
            return Some(spare.swap_remove(i));
        }
        if let Some(i) = (0..spare.len()).max_by_key(|&i| spare[i].bytes()) {
            spare.swap_remove(i);
        }
        None
    }

    pub(super) fn keep(&self, mapping: Mapping) {
        self.arena.spare.lock().unwrap_or_else(|e| e.into_inner()).push(mapping);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.arena.used.fetch_sub(self.bytes, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_memory_is_used_again_and_zeroed() {
        let arena = Arena::new("device", None);
        let len = 1 << 20;
        let mut first = arena.alloc(DType::F32, len, "a").unwrap();
        first.as_mut_slice::<f32>().fill(1.0);
        let place = first.bytes().as_ptr();
        drop(first);
        let second = arena.alloc(DType::F32, len / 2, "b").unwrap();
        assert_eq!(second.bytes().as_ptr(), place);
        assert!(second.as_slice::<f32>().iter().all(|&x| x == 0.0));
        assert_eq!(arena.usage(), Usage { used: 2 * len, peak: 4 * len });
    }

    #[test]
    fn a_budget_is_kept_and_given_back() {
        let arena = Arena::new("device", Some(100));
        let first = arena.alloc(DType::F32, 20, "weights").unwrap();
        let refusal = arena.alloc(DType::F32, 10, "moments").unwrap_err().to_string();
        assert!(refusal.contains("moments") && refusal.contains("device"), "{refusal}");
        drop(first);
        assert_eq!(arena.usage(), Usage { used: 0, peak: 80 });
        arena.alloc(DType::BF16, 50, "moments").unwrap();
    }
}

//! Budgeted memory: every parameter, gradient and moment is allocated here, so what a tier holds and held at most is
//! known, and a budget is enforced where memory is handed out.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use anyhow::{Result, bail};
use candle_core::DType;

use super::Buffer;

/// A named pool with an optional limit. Cheap to clone; buffers give their bytes back when dropped.
#[derive(Clone, Debug)]
pub struct Arena(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    limit: Option<usize>,
    used: AtomicUsize,
    peak: AtomicUsize,
}

/// Bytes of an arena now and at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub used: usize,
    pub peak: usize,
}

impl Arena {
    pub fn new(name: impl Into<String>, limit: Option<usize>) -> Self {
        Arena(Arc::new(Inner { name: name.into(), limit, used: AtomicUsize::new(0), peak: AtomicUsize::new(0) }))
    }

    /// A zeroed buffer of `len` elements. Errors name the arena, `what` was wanted and the limit.
    pub fn alloc(&self, dtype: DType, len: usize, what: &str) -> Result<Buffer> {
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

impl Drop for Charge {
    fn drop(&mut self) {
        self.arena.used.fetch_sub(self.bytes, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

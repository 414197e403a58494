//! Communicators around communicators, for tests: one that is late now and then, so that a missing wait shows, and one
//! that writes down what was called.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use anyhow::Result;
use twox_hash::XxHash3_64;

use super::call::{Call, Kind, Scalar};
use super::{Communicator, Slice, SliceMut};

/// Sleeps before every second collective or so: which, and how long, follows from the seed, the rank and the running
/// number, so that ranks are late at different places and a failing run can be repeated.
pub struct Delayed<C> {
    inner: C,
    seed: u64,
    longest: Duration,
    sequence: AtomicU64,
}

impl<C: Communicator> Delayed<C> {
    pub fn new(inner: C, seed: u64, longest: Duration) -> Self {
        Delayed { inner, seed, longest, sequence: AtomicU64::new(0) }
    }

    fn dawdle(&self) {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let key = [self.seed, self.inner.rank() as u64, sequence];
        let draw = XxHash3_64::oneshot(key.map(u64::to_le_bytes).as_flattened());
        if draw & 1 == 1 {
            std::thread::sleep(self.longest.mul_f64((draw >> 11) as f64 / (1u64 << 53) as f64));
        }
    }
}

impl<C: Communicator> Communicator for Delayed<C> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce(&self, data: SliceMut) -> Result<()> {
        self.dawdle();
        self.inner.all_reduce(data)
    }

    fn reduce_scatter(&self, input: Slice, output: SliceMut) -> Result<()> {
        self.dawdle();
        self.inner.reduce_scatter(input, output)
    }

    fn all_gather(&self, input: Slice, output: SliceMut) -> Result<()> {
        self.dawdle();
        self.inner.all_gather(input, output)
    }

    fn broadcast(&self, data: SliceMut, root: usize) -> Result<()> {
        self.dawdle();
        self.inner.broadcast(data, root)
    }

    fn barrier(&self) -> Result<()> {
        self.dawdle();
        self.inner.barrier()
    }

    fn abort(&self, message: &str) {
        self.inner.abort(message);
    }
}

/// Writes down every call, in order.
pub struct Recorded<C> {
    inner: C,
    calls: Mutex<Vec<Call>>,
}

impl<C: Communicator> Recorded<C> {
    pub fn new(inner: C) -> Self {
        Recorded { inner, calls: Mutex::new(Vec::new()) }
    }

    /// What was called since the last time this was asked.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls())
    }

    fn calls(&self) -> MutexGuard<'_, Vec<Call>> {
        self.calls.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn note(&self, kind: Kind, scalar: Scalar, length: usize) {
        self.calls().push(Call::new(kind, scalar, length));
    }
}

impl<C: Communicator> Communicator for Recorded<C> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce(&self, data: SliceMut) -> Result<()> {
        self.note(Kind::AllReduce, data.scalar(), data.len());
        self.inner.all_reduce(data)
    }

    fn reduce_scatter(&self, input: Slice, output: SliceMut) -> Result<()> {
        self.note(Kind::ReduceScatter, output.scalar(), output.len());
        self.inner.reduce_scatter(input, output)
    }

    fn all_gather(&self, input: Slice, output: SliceMut) -> Result<()> {
        self.note(Kind::AllGather, input.scalar(), input.len());
        self.inner.all_gather(input, output)
    }

    fn broadcast(&self, data: SliceMut, root: usize) -> Result<()> {
        self.calls().push(Call { root, ..Call::new(Kind::Broadcast, data.scalar(), data.len()) });
        self.inner.broadcast(data, root)
    }

    fn barrier(&self) -> Result<()> {
        self.note(Kind::Barrier, Scalar::U8, 0);
        self.inner.barrier()
    }

    fn abort(&self, message: &str) {
        self.inner.abort(message);
    }
}

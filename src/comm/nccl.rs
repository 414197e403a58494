//! Ranks with a GPU each, over NCCL. They are told of each other through the host's communicator; from then on every
//! collective is put on a stream and a thread watches that it ends. Nothing here blocks without an end: the library is
//! used in its non-blocking mode (`nccl/library.rs`), and what hangs on the device is ended by giving the communicator
//! up, after which every wait of the host fails with the reason ([`Faults`](crate::device::cuda::Faults)).
//!
//! Note: memory. The library takes buffers of its own outside of the pool, some hundred MB with several GPUs; all of them in
//! [`Nccl::connect`].

mod library;

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use self::library::{Library, unique_id};
use super::on_device::DeviceCommunicator;
use super::watch::{Flight, Point, Trouble, Watch};
use super::{Communicator, CommunicatorExt, Operation, PeerFailure, Scalar};
use crate::Refusal;
use crate::device::Moment;
use crate::device::cuda::{Gpu, Mark, Stream, libraries};
use crate::device::trace::{self, Row};

/// How often what is under way is looked at.
const PULSE: Duration = Duration::from_millis(10);
/// The longest sleep between two looks at a call that the library has not yet put on the stream.
const NAP: Duration = Duration::from_millis(1);
/// How long after an error of the library another rank's failure may become known.
const GRACE: Duration = Duration::from_secs(1);

/// One rank's end of a group of GPUs.
pub struct Nccl {
    inner: Arc<Inner>,
    watcher: Option<JoinHandle<()>>,
}

struct Inner {
    gpu: Arc<Gpu>,
    stream: Stream,
    /// How the ranks met, and how they learn that one has failed.
    through: Arc<dyn Communicator>,
    timeout: Duration,
    library: Library,
    /// One group of operations at a time; the last one's number.
    sequence: Mutex<u64>,
    watched: Mutex<Watched>,
    /// Something was added to `watched`, or all is over.
    news: Condvar,
}

struct Watched {
    watch: Watch<Mark>,
    over: bool,
}

impl Point for Mark {
    fn is_reached(&self) -> Result<bool> {
        Mark::is_reached(self)
    }
}

impl Nccl {
    /// Joins the ranks of `through`, each with the GPU it has opened; all ranks together. A collective that has not ended
    /// `timeout` after it began ends the group with an error. Where ranks share a GPU, for tests, NCCL wants a different
    /// NCCL_HOSTID for each.
    pub fn join(gpu: &Arc<Gpu>, through: Arc<dyn Communicator>, timeout: Duration) -> Result<Nccl> {
        through.agree(libraries::load(libraries::NCCL).map_err(Refusal::error))?;
        let id = through.agree(if through.rank() == 0 { unique_id() } else { Ok(Vec::new()) })?;
        let id = through.broadcast_bytes(id, 0)?;
        let library = Library::join(gpu.context(), &id, through.rank(), through.world_size());
        let library = through.agree(library.context("the GPUs cannot be connected"))?;
        let stream = gpu.stream("collectives");
        let inner = Arc::new(Inner {
            stream: through.agree(stream)?,
            gpu: gpu.clone(),
            timeout,
            library,
            sequence: Mutex::new(0),
            watched: Mutex::new(Watched { watch: Watch::new(timeout), over: false }),
            news: Condvar::new(),
            through,
        });
        if let Err(trouble) = inner.settle("joining the group of GPUs") {
            // The others do not wait for this rank any longer.
            inner.give_up(&trouble);
            return Err(trouble.error());
        }
        let watching = inner.clone();
        let watcher =
            Builder::new().name("watch".into()).spawn(move || watching.watch()).context("starting a thread")?;
        Ok(Nccl { inner, watcher: Some(watcher) })
    }

    /// Makes every collective with as much data as a large and a small bucket have. The library connects GPUs, and takes memory
    /// for that, when a kind of collective or a way to do it is first wanted: afterwards what is left is what a run has. A
    /// collective.
    pub fn connect(&self) -> Result<()> {
        const SIZES: [usize; 2] = [4 << 20, 8 << 10];
        let (gpu, through) = (&self.inner.gpu, &self.inner.through);
        let part = |whole: usize| whole.div_ceil(through.world_size());
        let prepared = (|| {
            let memory = |elements: usize| gpu.computing().alloc_zeroed(4 * elements, "connecting GPUs");
            Ok((memory(part(SIZES[0]) * through.world_size())?, memory(part(SIZES[0]))?, gpu.computing().mark()?))
        })();
        let (whole, mine, ready) = through.agree(prepared)?;
        let (all, one) = (whole.address(), mine.address());
        for (scalar, part) in [Scalar::F32, Scalar::F16].into_iter().flat_map(|s| SIZES.map(|size| (s, part(size)))) {
            for operation in [
                Operation::all_gather(scalar, part, one, all),
                Operation::reduce_scatter(scalar, part, all, one),
                Operation::all_reduce(scalar, part * through.world_size(), all),
                Operation::broadcast(scalar, part, one, 0),
            ] {
                gpu.computing().after(&self.begin(&[operation], &[&ready], "connecting GPUs")?)?;
            }
        }
        // Errors come out here, and the memory is the pool's again.
        gpu.computing().synchronize()
    }
}

impl Inner {
    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn bind(&self) -> Result<()> {
        self.gpu.context().bind_to_thread().map_err(|error| anyhow!("the GPU's context: {error}"))
    }

    /// Waits until the library has taken what it was told last: in its non-blocking mode a call may return before.
    fn settle(&self, what: &str) -> Result<(), Trouble> {
        let begun = Instant::now();
        let mut next_pulse = PULSE;
        let mut nap = Duration::from_micros(5);
        loop {
            match self.library.state() {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(why) => return Err(self.failed(what, why)),
            }
            let waited = begun.elapsed();
            if waited >= next_pulse {
                next_pulse = waited + PULSE;
                if let Some(failure) = self.through.failed_peer() {
                    return Err(Trouble::Peer { what: what.to_string(), failure });
                }
            }
            if waited >= self.timeout {
                return Err(Trouble::TimedOut { what: what.to_string(), after: self.timeout });
            }
            std::thread::sleep(nap);
            nap = (nap * 2).min(NAP);
        }
    }

    /// What an error of the library means.
    fn failed(&self, what: &str, why: String) -> Trouble {
        let what = what.to_string();
        match self.cause() {
            Some(failure) => Trouble::Peer { what, failure },
            None => Trouble::Failed { what, why },
        }
    }

    /// The failed rank behind an error of the library: that is often a consequence, and known before its cause.
    fn cause(&self) -> Option<PeerFailure> {
        let begun = Instant::now();
        loop {
            let failure = self.through.failed_peer();
            if failure.is_some() || begun.elapsed() >= GRACE {
                return failure;
            }
            std::thread::sleep(PULSE);
        }
    }

    /// Tells everyone: the waits of this process, the other ranks, and the device.
    fn give_up(&self, trouble: &Trouble) {
        let reason = trouble.clone();
        let first = self.gpu.faults().raise(move || reason.error());
        if first && !matches!(trouble, Trouble::Peer { .. }) {
            self.through.abort(&format!("{:#}", trouble.error()));
        }
        self.library.abort();
    }

    /// The watching thread.
    fn watch(&self) {
        // An error of the context is told where it is used for something.
        let _ = self.bind();
        loop {
            {
                let mut watched = self.watched();
                while watched.watch.is_idle() && !watched.over {
                    watched = self.news.wait(watched).unwrap_or_else(|e| e.into_inner());
                }
                if watched.over {
                    return;
                }
            }
            let library = self.library.state().map(drop);
            let peer = if library.is_err() { self.cause() } else { self.through.failed_peer() };
            let trouble = self.watched().watch.look(Instant::now(), peer, library);
            if let Some(trouble) = trouble {
                self.give_up(&trouble);
                return;
            }
            std::thread::sleep(PULSE);
        }
    }

    fn begin(&self, operations: &[Operation], after: &[&Mark], what: &str) -> Result<Mark> {
        self.gpu.faults().check()?;
        operations.iter().try_for_each(|operation| operation.check(self.through.world_size()))?;
        self.bind()?;
        let mut sequence = self.sequence.lock().unwrap_or_else(|e| e.into_inner());
        *sequence += 1;
        let name = name_of(operations, *sequence, what);
        after.iter().try_for_each(|mark| self.stream.after(mark))?;
        let mark = || if trace::is_on() { self.stream.timed_mark() } else { self.stream.mark() };
        let begun = mark()?;
        let taken = self.library.enqueue(operations, &self.stream).map_err(|why| self.failed(&name, why));
        if let Err(trouble) = taken.and_then(|()| self.settle(&name)) {
            self.give_up(&trouble);
            // The first fault is the cause.
            self.gpu.faults().check()?;
            return Err(trouble.error());
        }
        let done = mark()?;
        let [from, to] = [&begun, &done].map(|mark| Moment(Arc::new(mark.clone())));
        trace::on_accelerator(Row::Collective, "GPU, NCCL", || name.clone(), (from, to), None);
        self.watched().watch.add(Flight::new(name, begun, done.clone()));
        self.news.notify_one();
        Ok(done)
    }

    /// Leaves the group together with the others.
    fn close(&self) -> Result<()> {
        self.stream.synchronize()?;
        // What this rank sends may still be on its way when its own part is done.
        self.through.barrier()?;
        self.bind()?;
        let leaving = "leaving the group of GPUs";
        let left = self.library.finalize().map_err(|why| self.failed(leaving, why)).and_then(|()| self.settle(leaving));
        left.map_err(|trouble| trouble.error())?;
        self.library.destroy();
        Ok(())
    }
}

/// `all_gather #17 (f32, 1024 elements) of down.0`.
fn name_of(operations: &[Operation], sequence: u64, what: &str) -> String {
    let mut calls: Vec<String> = operations.iter().take(3).map(|o| o.call.describe(sequence)).collect();
    if operations.len() > calls.len() {
        calls.push(format!("{} more", operations.len() - calls.len()));
    }
    format!("{} of {what}", calls.join(" with "))
}

impl DeviceCommunicator for Nccl {
    fn rank(&self) -> usize {
        self.inner.through.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.through.world_size()
    }

    fn stream(&self) -> &Stream {
        &self.inner.stream
    }

    fn begin(&self, operations: &[Operation], after: &[&Mark], what: &str) -> Result<Mark> {
        self.inner.begin(operations, after, what)
    }

    fn close(&self) -> Result<()> {
        self.inner.close()
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.inner.watched().over = true;
        self.inner.news.notify_one();
        if let Some(watcher) = self.watcher.take() {
            // A thread that panicked has told so.
            let _ = watcher.join();
        }
        self.inner.library.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Address;

    #[test]
    fn a_group_is_named_by_its_calls_and_its_segment() {
        let operation = Operation::all_gather(Scalar::F32, 1024, Address(0), Address(8));
        assert_eq!(name_of(&[operation], 17, "down.0"), "all_gather #17 (f32, 1024 elements) of down.0");
        let many = name_of(&[operation; 5], 2, "mid");
        assert!(many.ends_with("with 2 more of mid"), "{many}");
    }
}

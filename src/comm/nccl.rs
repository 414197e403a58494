//! Ranks with a GPU each, over NCCL. It is told of each other through the host's communicator; from then on every
//! collective is put on a stream and a thread watches that it ends. Nothing here blocks without an end: the library is
//! used in its non-blocking mode, and what hangs on the device is ended by giving the communicator up, after which every
//! wait of the host fails with the reason ([`Faults`](crate::device::cuda::Faults)).
//!
//! Note: memory. The library takes buffers of its own outside of the pool, some hundred MB with several GPUs.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use cudarc::nccl::{result, sys};

use super::call::{Kind, Scalar};
use super::on_device::{DeviceCommunicator, Operation};
use super::watch::{Flight, Point, Trouble, Watch};
use super::{Communicator, CommunicatorExt};
use crate::Refusal;
use crate::device::cuda::{Gpu, Mark, Stream, found, libraries};

/// How often what is under way is looked at.
const PULSE: Duration = Duration::from_millis(10);
/// The longest sleep between two looks at a call that the library has not yet put on the stream.
const NAP: Duration = Duration::from_millis(1);

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
    handle: Mutex<Handle>,
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

/// The library's communicator, until it is given up.
struct Handle(Option<sys::ncclComm_t>);

// SAFETY: the library lets any thread use a communicator, one at a time, which the lock around it sees to.
unsafe impl Send for Handle {}

impl Point for Mark {
    fn is_reached(&self) -> Result<bool> {
        Mark::is_reached(self)
    }
}

impl Nccl {
    /// Joins the ranks of `through`, each with the GPU it has opened; all ranks together. A collective that has not ended
    /// `timeout` after it began ends the group with an error. `one_gpu_for_several`: ranks may share a GPU, for tests
    /// (NCCL then wants a different NCCL_HOSTID for each).
    pub fn join(
        gpu: &Arc<Gpu>,
        through: Arc<dyn Communicator>,
        timeout: Duration,
        one_gpu_for_several: bool,
    ) -> Result<Nccl> {
        if !one_gpu_for_several {
            apart(gpu, &*through)?;
        }
        through.agree(libraries::load(libraries::NCCL).map_err(Refusal::error))?;
        let id = through.agree(if through.rank() == 0 { unique_id() } else { Ok(Vec::new()) })?;
        let id = through.broadcast_bytes(id, 0)?;
        let inner = Arc::new(Inner {
            gpu: gpu.clone(),
            stream: gpu.stream("collectives")?,
            timeout,
            handle: Mutex::new(Handle(None)),
            sequence: Mutex::new(0),
            watched: Mutex::new(Watched { watch: Watch::new(timeout), over: false }),
            news: Condvar::new(),
            through,
        });
        inner.through.agree(inner.connect(&id).context("the GPUs cannot be connected"))?;
        let watching = inner.clone();
        let watcher =
            Builder::new().name("watch".into()).spawn(move || watching.watch()).context("starting a thread")?;
        Ok(Nccl { inner, watcher: Some(watcher) })
    }
}

/// An error if two ranks were given one GPU.
fn apart(gpu: &Gpu, through: &dyn Communicator) -> Result<()> {
    let all = through.gather_bytes(&gpu.card().uuid)?;
    let uuids: Vec<[u8; 16]> = all.iter().filter_map(|bytes| bytes.as_slice().try_into().ok()).collect();
    let Some((first, second)) = found::shared_gpu(&uuids) else { return Ok(()) };
    Err(Refusal::error(format!(
        "ranks {first} and {second} were given the same GPU ({}): start at most one rank a GPU on each machine (--nproc), \
         and see that CUDA_VISIBLE_DEVICES shows every rank all GPUs or each its own",
        gpu.card().name
    )))
}

fn unique_id() -> Result<Vec<u8>> {
    let id = result::get_uniqueid().map_err(|error| anyhow!("NCCL does not start: {}", describe(error.0)))?;
    Ok(id.internal.iter().map(|&byte| byte as u8).collect())
}

fn describe(status: sys::ncclResult_t) -> String {
    use sys::ncclResult_t::*;
    let advice = match status {
        ncclSystemError => " (a call to the system failed: shared memory or sockets; NCCL_DEBUG=WARN says which)",
        ncclInternalError => " (an error in NCCL itself; NCCL_DEBUG=WARN says more)",
        ncclInvalidUsage => " (two ranks on one GPU, or versions of NCCL that differ; NCCL_DEBUG=WARN says more)",
        ncclRemoteError => " (another rank or the connection to it is gone)",
        ncclUnhandledCudaError => " (a call to CUDA failed: often no memory is left outside of the pool)",
        _ => "",
    };
    format!("{status:?}{advice}")
}

fn data_type(scalar: Scalar) -> sys::ncclDataType_t {
    match scalar {
        Scalar::F32 => sys::ncclDataType_t::ncclFloat32,
        Scalar::F64 => sys::ncclDataType_t::ncclFloat64,
        Scalar::BF16 => sys::ncclDataType_t::ncclBfloat16,
        Scalar::F16 => sys::ncclDataType_t::ncclFloat16,
        Scalar::U8 => sys::ncclDataType_t::ncclUint8,
    }
}

/// The options that NCCL_CONFIG_INITIALIZER of nccl.h sets, but not blocking: unset numbers are the smallest int.
fn options() -> sys::ncclConfig_t {
    const UNSET: i32 = i32::MIN;
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: 0xcafebeef,
        // 2.24.3, whose options these are; newer libraries fill in the rest.
        version: 22403,
        blocking: 0,
        cgaClusterSize: UNSET,
        minCTAs: UNSET,
        maxCTAs: UNSET,
        netName: std::ptr::null(),
        splitShare: UNSET,
    }
}

impl Inner {
    fn handle(&self) -> MutexGuard<'_, Handle> {
        self.handle.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn connect(&self, id: &[u8]) -> Result<()> {
        self.gpu.context().bind_to_thread().map_err(|error| anyhow!("{error}"))?;
        let mut unique = sys::ncclUniqueId { internal: [0; 128] };
        anyhow::ensure!(id.len() == unique.internal.len(), "an id of {} bytes", id.len());
        unique.internal.iter_mut().zip(id).for_each(|(to, from)| *to = *from as _);
        let mut config = options();
        let mut comm = std::ptr::null_mut();
        let (rank, world_size) = (self.through.rank() as i32, self.through.world_size() as i32);
        // SAFETY: a place for the handle, the id of this group, and options of the size they say; all outlive the call,
        // which copies them.
        let begun = unsafe { sys::ncclCommInitRankConfig(&mut comm, world_size, unique, rank, &mut config) };
        if !comm.is_null() {
            self.handle().0 = Some(comm);
        }
        if !matches!(begun, sys::ncclResult_t::ncclSuccess | sys::ncclResult_t::ncclInProgress) {
            self.abort();
            return Err(anyhow!(describe(begun)));
        }
        self.settle("joining the group of GPUs").map_err(|trouble| {
            self.abort();
            trouble.error(self.through.rank())
        })
    }

    /// Waits until the library has taken what it was told last: in its non-blocking mode a call may return before.
    fn settle(&self, what: &str) -> Result<(), Trouble> {
        let begun = Instant::now();
        let mut next_pulse = PULSE;
        let mut nap = Duration::from_micros(5);
        let what = || what.to_string();
        loop {
            match self.state() {
                Ok(sys::ncclResult_t::ncclSuccess) => return Ok(()),
                Ok(_) => {}
                Err(why) => {
                    // What the library reports is often a consequence.
                    return Err(match self.through.failed_peer() {
                        Some(failure) => Trouble::Peer { what: what(), failure },
                        None => Trouble::Failed { what: what(), why },
                    });
                }
            }
            let waited = begun.elapsed();
            if waited >= next_pulse {
                next_pulse = waited + PULSE;
                if let Some(failure) = self.through.failed_peer() {
                    return Err(Trouble::Peer { what: what(), failure });
                }
            }
            if waited >= self.timeout {
                return Err(Trouble::TimedOut { what: what(), after: self.timeout });
            }
            std::thread::sleep(nap);
            nap = (nap * 2).min(NAP);
        }
    }

    /// `ncclSuccess` or `ncclInProgress`, or what has gone wrong.
    fn state(&self) -> Result<sys::ncclResult_t, String> {
        let handle = self.handle();
        let Some(comm) = handle.0 else { return Err("the group of GPUs was given up".into()) };
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the handle is alive, and nobody else uses it while it is locked.
        let asked = unsafe { sys::ncclCommGetAsyncError(comm, &mut state) };
        for status in [asked, state] {
            if !matches!(status, sys::ncclResult_t::ncclSuccess | sys::ncclResult_t::ncclInProgress) {
                return Err(describe(status));
            }
        }
        Ok(state)
    }

    /// Puts a group of operations on the stream.
    fn enqueue(&self, operations: &[Operation]) -> Result<(), String> {
        let handle = self.handle();
        let Some(comm) = handle.0 else { return Err("the group of GPUs was given up".into()) };
        let stream: sys::cudaStream_t = self.stream.raw().cast();
        let fine = |status| match status {
            sys::ncclResult_t::ncclSuccess | sys::ncclResult_t::ncclInProgress => Ok(()),
            status => Err(describe(status)),
        };
        // SAFETY: opens a group of this thread, which is closed below whatever happens in between.
        fine(unsafe { sys::ncclGroupStart() })?;
        let begun = operations.iter().try_for_each(|Operation { call, input, output }| {
            let (from, to) = (input.0 as *const std::ffi::c_void, output.0 as *mut std::ffi::c_void);
            let (count, scalar, sum) = (call.length, data_type(call.scalar), sys::ncclRedOp_t::ncclSum);
            // SAFETY: the communicator and the stream are alive; that the addresses hold that many elements until the mark
            // is what an `Operation` says.
            fine(unsafe {
                match call.kind {
                    Kind::AllReduce => sys::ncclAllReduce(from, to, count, scalar, sum, comm, stream),
                    Kind::ReduceScatter => sys::ncclReduceScatter(from, to, count, scalar, sum, comm, stream),
                    Kind::AllGather => sys::ncclAllGather(from, to, count, scalar, comm, stream),
                    Kind::Broadcast => sys::ncclBroadcast(from, to, count, scalar, call.root as i32, comm, stream),
                    Kind::Barrier => sys::ncclResult_t::ncclInvalidUsage,
                }
            })
        });
        // SAFETY: closes the group opened above.
        begun.and(fine(unsafe { sys::ncclGroupEnd() }))
    }

    /// Ends the library's communicator and whatever of it hangs on the device. Once; later calls do nothing.
    fn abort(&self) {
        if let Some(comm) = self.handle().0.take() {
            if self.gpu.context().bind_to_thread().is_ok() {
                // SAFETY: taken out, so nobody uses it any more. Whether this succeeds changes nothing for us.
                let _ = unsafe { sys::ncclCommAbort(comm) };
            }
        }
    }

    /// Tells everyone: the waits of this process, the other ranks, and the device.
    fn give_up(&self, trouble: &Trouble) {
        let (rank, reason) = (self.through.rank(), trouble.clone());
        let first = self.gpu.faults().raise(move || reason.error(rank));
        if first && !matches!(trouble, Trouble::Peer { .. }) {
            self.through.abort(&format!("{:#}", trouble.error(rank)));
        }
        self.abort();
    }

    /// The watching thread.
    fn watch(&self) {
        // Errors of the context are told where it is used for something.
        let _ = self.gpu.context().bind_to_thread();
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
            let (peer, library) = (self.through.failed_peer(), self.state().map(drop));
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
        self.gpu.context().bind_to_thread().map_err(|error| anyhow!("{error}"))?;
        let mut sequence = self.sequence.lock().unwrap_or_else(|e| e.into_inner());
        *sequence += 1;
        let name = name_of(operations, *sequence, what);
        after.iter().try_for_each(|mark| self.stream.after(mark))?;
        let begun = self.stream.mark()?;
        let taken = self.enqueue(operations).map_err(|why| Trouble::Failed { what: name.clone(), why });
        if let Err(trouble) = taken.and_then(|()| self.settle(&name)) {
            self.give_up(&trouble);
            // The first fault is the cause.
            self.gpu.faults().check()?;
            return Err(trouble.error(self.through.rank()));
        }
        let done = self.stream.mark()?;
        self.watched().watch.add(Flight::new(name, begun, done.clone()));
        self.news.notify_one();
        Ok(done)
    }

    /// Finishes the communicator without hurry; all ranks have nothing under way.
    fn finish(&self) -> Result<()> {
        let comm = self.handle().0.context("the group of GPUs was given up")?;
        self.gpu.context().bind_to_thread().map_err(|error| anyhow!("{error}"))?;
        // SAFETY: alive, and the ranks have agreed that nobody uses it any more.
        let begun = unsafe { sys::ncclCommFinalize(comm) };
        anyhow::ensure!(
            matches!(begun, sys::ncclResult_t::ncclSuccess | sys::ncclResult_t::ncclInProgress),
            "leaving the group of GPUs: {}",
            describe(begun)
        );
        self.settle("leaving the group of GPUs").map_err(|trouble| trouble.error(self.through.rank()))?;
        if let Some(comm) = self.handle().0.take() {
            // SAFETY: taken out and finalised.
            let _ = unsafe { sys::ncclCommDestroy(comm) };
        }
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
        let inner = &self.inner;
        inner.stream.synchronize()?;
        // What this rank sends may still be on its way when its own part is done.
        inner.through.barrier()?;
        inner.finish()
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.inner.watched().over = true;
        self.inner.news.notify_one();
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
        self.inner.abort();
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

    #[test]
    fn the_options_have_the_librarys_layout() {
        // size_t, two unsigned, four ints, a pointer, an int, padded: nccl.h of 2.24.
        assert_eq!(size_of::<sys::ncclConfig_t>(), 48);
    }
}

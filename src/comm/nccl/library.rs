//! The library's own communicator, in its non-blocking mode: a call tells it what to do, and [`Library::state`] whether
//! that is done. All calls go through one lock, since it takes one thread at a time.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Result, anyhow, ensure};
use cudarc::driver::CudaContext;
use cudarc::nccl::sys::ncclResult_t as Status;
use cudarc::nccl::{result, sys};

use crate::comm::Operation;
use crate::comm::call::{Kind, Scalar};
use crate::device::cuda::Stream;

/// Bytes of what the ranks of one group have in common.
const ID_BYTES: usize = 128;

pub(super) struct Library {
    context: Arc<CudaContext>,
    handle: Mutex<Handle>,
}

/// The communicator, until it is given up or left.
struct Handle(Option<sys::ncclComm_t>);

// SAFETY: the library lets any thread use a communicator, one at a time, which the lock around it sees to.
unsafe impl Send for Handle {}

/// What the ranks of a new group are to have in common; one of them makes it.
pub(super) fn unique_id() -> Result<Vec<u8>> {
    let id = result::get_uniqueid().map_err(|error| anyhow!("NCCL does not start: {}", describe(error.0)))?;
    Ok(id.internal.iter().map(|&byte| byte as u8).collect())
}

fn describe(status: Status) -> String {
    let advice = match status {
        Status::ncclSystemError => {
            " (a call to the system failed: shared memory or sockets; NCCL_DEBUG=WARN says which)"
        }
        Status::ncclInternalError => " (an error in NCCL itself; NCCL_DEBUG=WARN says more)",
        Status::ncclInvalidUsage => {
            " (two ranks on one GPU, or versions of NCCL that differ; NCCL_DEBUG=WARN says more)"
        }
        Status::ncclRemoteError => " (another rank or the connection to it is gone)",
        Status::ncclUnhandledCudaError => " (a call to CUDA failed: often no memory is left outside of the pool)",
        _ => "",
    };
    format!("{status:?}{advice}")
}

/// Begun or done, or what is wrong.
fn accepted(status: Status) -> Result<(), String> {
    match status {
        Status::ncclSuccess | Status::ncclInProgress => Ok(()),
        status => Err(describe(status)),
    }
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

impl Library {
    /// Begins to join the group with this id, as `rank` of `world_size`.
    pub fn join(context: &Arc<CudaContext>, id: &[u8], rank: usize, world_size: usize) -> Result<Library> {
        ensure!(id.len() == ID_BYTES, "NCCL was told a group by {} bytes", id.len());
        context.bind_to_thread().map_err(|error| anyhow!("{error}"))?;
        let mut unique = sys::ncclUniqueId { internal: [0; ID_BYTES] };
        unique.internal.iter_mut().zip(id).for_each(|(to, from)| *to = *from as _);
        let mut config = options();
        let mut comm = std::ptr::null_mut();
        // SAFETY: a place for the handle, the id of this group, and options of the size they say; all outlive the call,
        // which copies them.
        let begun =
            unsafe { sys::ncclCommInitRankConfig(&mut comm, world_size as i32, unique, rank as i32, &mut config) };
        let handle = Mutex::new(Handle((!comm.is_null()).then_some(comm)));
        // Dropped, and so aborted, on an error.
        let library = Library { context: context.clone(), handle };
        accepted(begun).map_err(|why| anyhow!(why))?;
        Ok(library)
    }

    fn handle(&self) -> MutexGuard<'_, Handle> {
        self.handle.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether what was begun last is done; or what has gone wrong, with that or with anything before it.
    pub fn state(&self) -> Result<bool, String> {
        let handle = self.handle();
        let Some(comm) = handle.0 else { return Err(gone()) };
        let mut state = Status::ncclSuccess;
        // SAFETY: the handle is alive, and nobody else uses it while it is locked.
        accepted(unsafe { sys::ncclCommGetAsyncError(comm, &mut state) })?;
        accepted(state)?;
        Ok(state == Status::ncclSuccess)
    }

    /// Begins to put a group of operations on `stream`. The context is bound to this thread.
    pub fn enqueue(&self, operations: &[Operation], stream: &Stream) -> Result<(), String> {
        let handle = self.handle();
        let Some(comm) = handle.0 else { return Err(gone()) };
        let stream: sys::cudaStream_t = stream.raw().cast();
        // SAFETY: opens a group of this thread, which is closed below whatever happens in between.
        accepted(unsafe { sys::ncclGroupStart() })?;
        let begun = operations.iter().try_for_each(|Operation { call, input, output }| {
            let (from, to) = (input.0 as *const c_void, output.0 as *mut c_void);
            let (count, scalar, sum) = (call.length, data_type(call.scalar), sys::ncclRedOp_t::ncclSum);
            // SAFETY: the communicator and the stream are alive; that the addresses hold that many elements until the
            // mark is what an `Operation` says.
            accepted(unsafe {
                match call.kind {
                    Kind::AllReduce => sys::ncclAllReduce(from, to, count, scalar, sum, comm, stream),
                    Kind::ReduceScatter => sys::ncclReduceScatter(from, to, count, scalar, sum, comm, stream),
                    Kind::AllGather => sys::ncclAllGather(from, to, count, scalar, comm, stream),
                    Kind::Broadcast => sys::ncclBroadcast(from, to, count, scalar, call.root as i32, comm, stream),
                    Kind::Barrier => Status::ncclInvalidUsage,
                }
            })
        });
        // SAFETY: closes the group opened above.
        let closed = accepted(unsafe { sys::ncclGroupEnd() });
        begun.and(closed)
    }

    /// Begins to leave the group; no rank has anything under way.
    pub fn finalize(&self) -> Result<(), String> {
        let handle = self.handle();
        let Some(comm) = handle.0 else { return Err(gone()) };
        // SAFETY: alive, and nothing of it is used any more.
        accepted(unsafe { sys::ncclCommFinalize(comm) })
    }

    /// Frees what was finalised.
    pub fn destroy(&self) {
        if let Some(comm) = self.handle().0.take() {
            // SAFETY: taken out, so nobody uses it any more, and finalised. An error changes nothing for us.
            let _ = unsafe { sys::ncclCommDestroy(comm) };
        }
    }

    /// Ends whatever hangs of it on the device. Once; later calls do nothing.
    pub fn abort(&self) {
        let taken = self.handle().0.take();
        if let (Some(comm), Ok(())) = (taken, self.context.bind_to_thread()) {
            // SAFETY: taken out, so nobody uses it any more. Whether this succeeds changes nothing for us.
            let _ = unsafe { sys::ncclCommAbort(comm) };
        }
    }
}

fn gone() -> String {
    "the group of GPUs was given up".to_string()
}

impl Drop for Library {
    fn drop(&mut self) {
        self.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_have_the_librarys_layout() {
        // size_t, two unsigned, four ints, a pointer, an int, padded: nccl.h of 2.24.
        assert_eq!(size_of::<sys::ncclConfig_t>(), 48);
        assert_eq!(size_of::<sys::ncclUniqueId>(), ID_BYTES);
    }
}

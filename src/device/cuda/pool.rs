//! The GPU's memory under a hard limit. The driver's own stream-ordered pools do the work: an allocation takes what was
//! freed before it on the same stream, without waiting for the GPU, and nothing goes back to the system while the program
//! runs. A pool of ours is made the device's current one, so that candle's tensors come from it, too, and its limit holds
//! for all: parameters, activations, scratch.
//!
//! Not in it, and so not under the limit, are what the driver takes for its context, for the code of kernels, and what
//! cuBLAS takes when it starts: a few hundred MB ([`super::Gpu::outside_of_pool`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use anyhow::{Result, bail};
use cudarc::driver::sys::{self, CUmemPool_attribute as Attribute};
use cudarc::driver::{CudaContext, DriverError, result};

use super::status::{Attempt, failed};

/// The first driver that knows pools with a limit, as it numbers its CUDA versions.
const KNOWS_LIMITS: u32 = 12020;

/// What the driver takes from the system at a time, at least.
const PIECE: usize = 2 << 20;

pub(super) struct Pool {
    context: Arc<CudaContext>,
    /// None where the driver has no pools (virtual GPUs, some old systems): then memory is taken and given back at once.
    raw: Option<sys::CUmemoryPool>,
    limit: Option<usize>,
    /// Whether the driver itself keeps to the limit. If not, it is looked at when our own memory is allocated.
    enforced: bool,
    /// Our own bytes, where the driver has no pool to ask.
    taken: AtomicUsize,
    taken_at_most: AtomicUsize,
    /// The most before the present turn ([`Self::turn`]).
    before: AtomicUsize,
}

// SAFETY: the driver's pools may be used by any thread, several at once.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

/// Bytes of the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUsage {
    /// Handed out, now and at most since the last [`super::Gpu::reset_peak`].
    pub used: usize,
    pub used_peak: usize,
    /// Held from the system: what is handed out, what waits to be handed out again, and gaps.
    pub held: usize,
    pub held_peak: usize,
}

/// `CUmemPoolProps`, whose names differ between versions of the bindings and whose layout is fixed since CUDA 12.2.
#[repr(C)]
struct Properties {
    kind: u32,
    handles: u32,
    location: u32,
    device: i32,
    windows: usize,
    limit: usize,
    usage: u16,
    reserved: [u8; 54],
}
const _: () = assert!(size_of::<Properties>() == size_of::<sys::CUmemPoolProps>());

impl Pool {
    /// Makes a pool and lets everything that asks the device for stream-ordered memory take from it. `driver`: the CUDA
    /// version it knows.
    pub fn install(context: &Arc<CudaContext>, limit: Option<usize>, driver: u32) -> Result<Pool> {
        let mut pool = Pool {
            context: context.clone(),
            raw: None,
            limit,
            enforced: false,
            taken: AtomicUsize::new(0),
            taken_at_most: AtomicUsize::new(0),
            before: AtomicUsize::new(0),
        };
        if !context.has_async_alloc() {
            return Ok(pool);
        }
        context.bind_to_thread().attempt("making a pool of memory")?;
        // A limit in whole pieces of what the driver takes from the system.
        let limit = limit.filter(|_| driver >= KNOWS_LIMITS).map(|limit| limit / PIECE * PIECE);
        let limited = limit.and_then(|limit| create(context, limit).ok());
        pool.enforced = limited.is_some();
        let raw = limited.map_or_else(|| create(context, 0), Ok).attempt("making a pool of memory")?;
        pool.raw = Some(raw);
        // Kept until the program ends: memory from the system costs a stop of the GPU.
        pool.set(Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)?;
        // Memory is used again when its stream, or one that waited for it, is known to be done with it, and not whenever
        // it happens to be: so what a run takes at most does not depend on how fast the host was.
        let mut off = 0i32;
        let opportunistic = Attribute::CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC;
        // SAFETY: the pool is alive, and this attribute is an int.
        unsafe { result::mem_pool::set_attribute(raw, opportunistic, (&raw mut off).cast()) }
            .attempt("setting up the pool of memory")?;
        // SAFETY: both handles are alive.
        unsafe { result::device::set_mem_pool(context.cu_device(), raw) }.attempt("making the pool the device's")?;
        Ok(pool)
    }

    pub fn limit(&self) -> Option<usize> {
        self.limit
    }

    pub fn is_enforced(&self) -> bool {
        self.enforced
    }

    pub fn usage(&self) -> Result<PoolUsage> {
        let usage = self.usage_of_turn()?;
        Ok(PoolUsage { used_peak: usage.used_peak.max(self.before.load(Relaxed)), ..usage })
    }

    /// Ends a turn: the most that was handed out in it.
    pub fn turn(&self) -> Result<usize> {
        let most = self.usage_of_turn()?.used_peak;
        self.before.fetch_max(most, Relaxed);
        match self.raw {
            Some(_) => self.set(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)?,
            None => self.taken_at_most.store(self.taken.load(Relaxed), Relaxed),
        }
        Ok(most)
    }

    fn usage_of_turn(&self) -> Result<PoolUsage> {
        if self.raw.is_none() {
            let (used, used_peak) = (self.taken.load(Relaxed), self.taken_at_most.load(Relaxed));
            return Ok(PoolUsage { used, used_peak, held: used, held_peak: used_peak });
        }
        Ok(PoolUsage {
            used: self.get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
            used_peak: self.get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
            held: self.get(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
            held_peak: self.get(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)?,
        })
    }

    /// Starts the peaks anew from what is there.
    pub fn reset_peak(&self) -> Result<()> {
        self.before.store(0, Relaxed);
        if self.raw.is_none() {
            self.taken_at_most.store(self.taken.load(Relaxed), Relaxed);
            return Ok(());
        }
        // Zero is the only value that the driver takes here.
        self.set(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)?;
        self.set(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH, 0)
    }

    /// Gives what is not handed out back to the system.
    pub fn trim(&self) -> Result<()> {
        let Some(raw) = self.raw else { return Ok(()) };
        // SAFETY: the pool is alive.
        unsafe { result::mem_pool::trim_to(raw, 0) }.attempt("giving memory back")
    }

    /// Waits for what the GPU has to do and gives back what is free then, so that what was in pieces can be handed out whole.
    pub fn gather(&self) -> Result<()> {
        self.context.synchronize().attempt("making room")?;
        self.trim()
    }

    /// Bytes for whoever waits for `stream`. Errors name `what` was wanted, and the limit.
    pub fn take(&self, stream: sys::CUstream, bytes: usize, what: &str) -> Result<sys::CUdeviceptr> {
        // The driver hands out nothing for nothing.
        let bytes = bytes.max(1);
        if let Some(limit) = self.limit.filter(|_| !self.enforced)
            && self.usage()?.used + bytes > limit
        {
            return Err(self.does_not_fit(bytes, what));
        }
        self.context.bind_to_thread().attempt(what)?;
        let mut address: sys::CUdeviceptr = 0;
        let mut ask = || match self.raw {
            // SAFETY: a place for the address; the pool and the stream are alive.
            Some(raw) => unsafe { sys::cuMemAllocFromPoolAsync(&mut address, bytes, raw, stream) },
            // SAFETY: as above.
            None => unsafe { sys::cuMemAlloc_v2(&mut address, bytes) },
        };
        let mut status = ask();
        if status == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY && self.gather().is_ok() {
            status = ask();
        }
        match status {
            sys::CUresult::CUDA_SUCCESS => {
                let taken = self.taken.fetch_add(bytes, Relaxed) + bytes;
                self.taken_at_most.fetch_max(taken, Relaxed);
                Ok(address)
            }
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(self.does_not_fit(bytes, what)),
            error => Err(failed(format_args!("{what}: {bytes} bytes of the GPU's memory"), DriverError(error))),
        }
    }

    /// Gives back what `take` gave, once all that was put on `stream` before is done.
    ///
    /// # Safety
    /// `address` came from [`Self::take`] with `bytes`, is given back once, and nothing but what is on `stream` now, or
    /// what that waits for, uses it.
    pub unsafe fn give(&self, stream: sys::CUstream, address: sys::CUdeviceptr, bytes: usize) -> Result<()> {
        self.context.bind_to_thread().attempt("freeing memory")?;
        self.taken.fetch_sub(bytes.max(1), Relaxed);
        if self.raw.is_some() {
            // SAFETY: the caller's promise.
            return unsafe { result::free_async(address, stream) }.attempt("freeing memory");
        }
        // SAFETY: the stream is alive; then the caller's promise, and nothing uses the memory any more.
        unsafe {
            result::stream::synchronize(stream).attempt("freeing memory")?;
            result::free_sync(address).attempt("freeing memory")
        }
    }

    /// Why there is no room for what could not be handed out.
    pub fn does_not_fit(&self, bytes: usize, what: &str) -> anyhow::Error {
        let PoolUsage { used, held, .. } = self.usage().unwrap_or_default();
        let (left, _) = self.context.mem_get_info().unwrap_or_default();
        match self.limit {
            Some(limit) => anyhow::anyhow!(
                "{what}: {bytes} bytes do not fit into the device memory: {used} of {limit} bytes are in use, {held} are \
                 held with gaps and what was freed, and the GPU has {left} bytes left"
            ),
            None => anyhow::anyhow!(
                "{what}: the GPU has no {bytes} bytes of memory left; this program uses {used} bytes of it"
            ),
        }
    }

    fn get(&self, attribute: Attribute) -> Result<usize> {
        let Some(raw) = self.raw else { bail!("this driver has no pools of memory") };
        let mut value = 0u64;
        // SAFETY: the pool is alive, and the attributes asked for are 64 bits wide.
        unsafe { result::mem_pool::get_attribute(raw, attribute, (&raw mut value).cast()) }
            .attempt("asking for the memory in use")?;
        Ok(value as usize)
    }

    fn set(&self, attribute: Attribute, mut value: u64) -> Result<()> {
        let Some(raw) = self.raw else { return Ok(()) };
        // SAFETY: as in `get`.
        unsafe { result::mem_pool::set_attribute(raw, attribute, (&raw mut value).cast()) }
            .attempt("setting up the pool of memory")
    }
}

fn create(context: &CudaContext, limit: usize) -> Result<sys::CUmemoryPool, DriverError> {
    let properties = Properties {
        kind: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED as u32,
        handles: 0,
        location: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE as u32,
        device: context.cu_device(),
        windows: 0,
        limit,
        usage: 0,
        reserved: [0; 54],
    };
    // SAFETY: the structure has the layout that the driver reads, and is alive during the call.
    unsafe { result::mem_pool::create((&raw const properties).cast()) }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let (Some(raw), Ok(())) = (self.raw, self.context.bind_to_thread()) {
            // SAFETY: made here and destroyed once. What is still handed out stays valid until it is freed, and the
            // device goes back to the driver's own pool. There is nobody to tell of an error.
            let _ = unsafe { result::mem_pool::destroy(raw) };
        }
    }
}

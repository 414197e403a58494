//! Opening a GPU: everything that can be wrong is found here, before a run begins, and said in words.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use anyhow::{Context, Result, anyhow};
use candle_core::Device;
use candle_core::cuda_backend::{CudaDevice, DeviceId};
use cudarc::cublas::sys as cublas;
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, result};

use super::found::{self, Built, Card, Found};
use super::modules::Modules;
use super::pool::{Pool, PoolUsage};
use super::status::{Attempt, Faults};
use super::stream::Stream;
use super::{DeviceMemory, libraries, products, selftest};
use crate::Refusal;
use crate::kernels::product::{self, Product};
use crate::kernels::{Address, Arg, Family, Grid, Launcher, Scratch};

/// What the kernels were compiled with and for.
fn built() -> Built {
    let mut code: Vec<u32> =
        env!("DBLAUNCH_CUDA_ARCHS").split_whitespace().filter_map(|code| code.parse().ok()).collect();
    // The last one is what drivers translate, whatever the order.
    let last = code.len().saturating_sub(1);
    code[..last].sort_unstable();
    Built { toolkit: env!("DBLAUNCH_CUDA_VERSION").parse().unwrap_or(0), code }
}

/// An opened GPU and candle's device on it. Lives as long as anything computes there.
pub struct Gpu {
    ordinal: usize,
    card: Card,
    multiprocessors: u32,
    device: Device,
    candle: CudaDevice,
    computing: Stream,
    /// From the host and to it, beside the computation.
    uploads: Stream,
    downloads: Stream,
    pool: Arc<Pool>,
    faults: Faults,
    /// Held while a product is launched: cuBLAS has one handle and one scratch for all threads.
    multiplying: Mutex<()>,
    /// Whether products in fp32 may be taken in tf32.
    tf32: AtomicBool,
    modules: Modules,
    /// cuBLAS works in it as long as it is set.
    _blas_scratch: DeviceMemory,
}

/// The GPU that the rank with this place on the machine would use, or in one paragraph why it can use none. Takes none
/// of its memory.
pub fn check(local_rank: usize) -> Result<Card, String> {
    libraries::load(libraries::DRIVER)?;
    let found = probe().map_err(|error| format!("{error:#}"))?;
    let (_, card) = found::choose(&found, local_rank, &built())?;
    libraries::load(libraries::CUBLAS)?;
    libraries::load(libraries::CURAND)?;
    Ok(card.clone())
}

/// How many GPUs this process sees; none where they cannot be used.
pub fn count() -> usize {
    match libraries::load(libraries::DRIVER) {
        Ok(()) => probe().map_or(0, |found| found.cards.len()),
        Err(_) => 0,
    }
}

/// What the driver says of itself and its GPUs.
fn probe() -> Result<Found> {
    if let Err(error) = result::init() {
        return Ok(Found { refuses: Some(error.0 as u32), ..Found::default() });
    }
    let mut driver = 0;
    // SAFETY: a place for the number.
    unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut driver) }
        .result()
        .attempt("asking for the driver's version")?;
    let driver = driver as u32;
    if driver < built().toolkit {
        // It lacks functions that are asked for below (GPUs' ids came with 11.4), and is refused whatever they say.
        return Ok(Found { driver, ..Found::default() });
    }
    let count = result::device::get_count().attempt("counting GPUs")?;
    let cards = (0..count).map(card).collect::<Result<_>>()?;
    Ok(Found { driver, refuses: None, cards })
}

fn card(ordinal: i32) -> Result<Card> {
    let asking = "asking for a GPU's properties";
    let device = result::device::get(ordinal).attempt(asking)?;
    // SAFETY: `device` came from the driver just now.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) }.attempt(asking);
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(Card {
        name: result::device::get_name(device).attempt(asking)?,
        capability: (major * 10 + minor) as u32,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        uuid: result::device::get_uuid(device).attempt(asking)?.bytes.map(|byte| byte as u8),
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device) }.attempt(asking)?,
    })
}

impl Gpu {
    /// Opens the GPU of the rank with this place on the machine. `limit`: bytes of its memory that may be used, for
    /// everything but what the driver takes itself. What is wrong with the machine is a [`Refusal`].
    pub fn open(local_rank: usize, limit: Option<usize>) -> Result<Arc<Gpu>> {
        check(local_rank).map_err(Refusal::error)?;
        let found = probe()?;
        let (ordinal, card) = found::choose(&found, local_rank, &built()).map_err(Refusal::error)?;
        let cannot = |why: String| Refusal::error(format!("GPU {ordinal} ({}) cannot be opened: {why}", card.name));
        // Before candle, which does not say what the driver's answer means; both hold the same context.
        let _context =
            CudaContext::new(ordinal).attempt("making a context").map_err(|error| cannot(format!("{error:#}")))?;
        let device = Device::new_cuda_with_stream(ordinal).map_err(|error| {
            cannot(format!("{error}. Often too little of its memory is left: `nvidia-smi` shows what uses it"))
        })?;
        let candle = device.as_cuda_device()?.clone();
        // SAFETY: what tracking did is ensured by the rules in the module above (Note: streams). Nothing has been
        // allocated but by this thread, on this stream.
        unsafe { candle.disable_event_tracking() };
        let raw = candle.cuda_stream();
        let context = raw.context().clone();
        // A thread that waits for the GPU sleeps.
        context
            .set_flags(cudarc::driver::sys::CUctx_flags::CU_CTX_SCHED_BLOCKING_SYNC)
            .attempt("setting up the GPU")?;
        let pool = Arc::new(Pool::install(&context, limit, found.driver)?);
        let faults = Faults::default();
        let computing = Stream::over("computing", raw, pool.clone(), faults.clone());
        let beside = |name: &str| -> Result<Stream> {
            let raw = context.new_stream().attempt("making a stream")?;
            Ok(Stream::over(name, raw, pool.clone(), faults.clone()))
        };
        let (uploads, downloads) = (beside("uploads")?, beside("downloads")?);
        let attribute = |which| context.attribute(which).attempt("asking for a GPU's properties");
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let shared_at_most = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
        let gpu = Arc::new(Gpu {
            ordinal,
            card: card.clone(),
            multiprocessors,
            _blas_scratch: give_blas_scratch(&candle, &computing, card.capability)?,
            device,
            modules: Modules::new(context, shared_at_most),
            candle,
            computing,
            uploads,
            downloads,
            pool,
            faults,
            multiplying: Mutex::new(()),
            tf32: AtomicBool::new(false),
        });
        gpu.self_test().with_context(|| format!("GPU {ordinal} ({}) fails its self-test", gpu.card.name))?;
        register(&gpu);
        Ok(gpu)
    }

    fn self_test(&self) -> Result<()> {
        let out = self.computing.alloc_zeroed(selftest::BYTES, "the self-test")?;
        selftest::launch(self, out.address())?;
        selftest::check(self.read(&out)?.as_chunks::<4>().0.iter().map(|sum| u32::from_le_bytes(*sum)))
    }

    /// The opened GPU that a candle device is on; what ops ask when all they have is a tensor.
    pub fn of(device: &CudaDevice) -> Result<Arc<Gpu>> {
        let opened = opened().lock().unwrap_or_else(|e| e.into_inner());
        let found = opened.iter().find(|(id, _)| *id == device.id()).and_then(|(_, gpu)| gpu.upgrade());
        found.ok_or_else(|| anyhow!("a tensor is on a GPU that was not opened here"))
    }

    /// candle's device; its tensors come from the same pool.
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn candle(&self) -> &CudaDevice {
        &self.candle
    }

    /// Which of the GPUs that this process sees.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    pub fn card(&self) -> &Card {
        &self.card
    }

    /// Where candle and our kernels compute.
    pub fn computing(&self) -> &Stream {
        &self.computing
    }

    pub(super) fn uploads(&self) -> &Stream {
        &self.uploads
    }

    pub(super) fn downloads(&self) -> &Stream {
        &self.downloads
    }

    /// Another stream, for what goes on beside the computation.
    pub fn stream(&self, name: &str) -> Result<Stream> {
        let raw = self.context().new_stream().attempt("making a stream")?;
        Ok(Stream::over(name, raw, self.pool.clone(), self.faults.clone()))
    }

    pub fn context(&self) -> &Arc<CudaContext> {
        self.computing.context()
    }

    /// What all waits of the host ask for; raised when a collective is given up.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Bytes of the pool, now and at most. Tensors, buckets and scratch count.
    pub fn usage(&self) -> Result<PoolUsage> {
        self.pool.usage()
    }

    /// The most that was handed out since this was asked before; [`Self::usage`] does not forget it.
    pub fn turn(&self) -> Result<usize> {
        self.pool.turn()
    }

    pub fn reset_peak(&self) -> Result<()> {
        self.pool.reset_peak()
    }

    pub fn limit(&self) -> Option<usize> {
        self.pool.limit()
    }

    /// Whether the driver itself keeps to the limit; otherwise it is looked at when our own memory is allocated, and
    /// candle's tensors alone could pass it.
    pub fn limit_is_enforced(&self) -> bool {
        self.pool.is_enforced()
    }

    /// Lets products in fp32 be taken in tf32, or no longer.
    pub fn allow_tf32(&self, allowed: bool) {
        self.tf32.store(allowed, Ordering::Relaxed);
    }

    /// Makes room for what could not be handed out, at the cost of a stop.
    pub(super) fn gather(&self) -> Result<()> {
        self.pool.gather()
    }

    pub(super) fn does_not_fit(&self, bytes: usize, what: &str) -> anyhow::Error {
        self.pool.does_not_fit(bytes, what)
    }

    /// Gives what is not handed out back to the system.
    pub fn trim(&self) -> Result<()> {
        self.pool.trim()
    }

    /// Bytes of the GPU's memory that nobody uses, and of all of it. What the pool holds is used.
    pub fn free(&self) -> Result<(usize, usize)> {
        self.context().mem_get_info().attempt("asking for the memory in use")
    }

    /// Bytes of the GPU's memory that are in use outside of the pool: the driver's context, code, other processes.
    pub fn outside_of_pool(&self) -> Result<usize> {
        let (free, total) = self.context().mem_get_info().attempt("asking for the memory in use")?;
        Ok((total - free).saturating_sub(self.usage()?.held))
    }

    /// A copy of `memory` on the host, once everything before it on the computing stream is done. For tests and small
    /// things: it stops the host.
    pub fn read(&self, memory: &DeviceMemory) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; memory.len()];
        // SAFETY: both sides hold as many bytes; the wait below ends before either is used again.
        unsafe { self.computing.copy_to_host(bytes.as_mut_ptr(), memory.address(), bytes.len())? };
        self.computing.synchronize()?;
        Ok(bytes)
    }

    /// `bytes` in the GPU's memory, for the computing stream. For tests and small things: it stops the host.
    pub fn write(&self, bytes: &[u8], what: &str) -> Result<DeviceMemory> {
        let memory = self.computing.alloc(bytes.len(), what)?;
        // SAFETY: both sides hold as many bytes; the wait below ends before either is used again.
        unsafe { self.computing.copy_from_host(memory.address(), bytes.as_ptr(), bytes.len())? };
        self.computing.synchronize()?;
        Ok(memory)
    }
}

fn give_blas_scratch(candle: &CudaDevice, computing: &Stream, capability: u32) -> Result<DeviceMemory> {
    // Ours, so that it counts, and so that its results do not depend on what it happened to get.
    let bytes = product::scratch_bytes(capability);
    let scratch = computing.alloc(bytes, "scratch of cuBLAS")?;
    let handle = *candle.cublas_handle().handle();
    // SAFETY: the handle is alive; the memory lives until `Gpu` is dropped, which takes it away from cuBLAS before. cuBLAS
    // uses it on the computing stream only, its home.
    let status = unsafe { cublas::cublasSetWorkspace_v2(handle, scratch.address().0 as *mut _, bytes) };
    status.result().map_err(|error| anyhow!("setting up cuBLAS: {error:?}"))?;
    // SAFETY: as above.
    unsafe { products::keep_sums_wide(handle)? };
    Ok(scratch)
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.computing.cudarc().synchronize().is_err() {
            // Nothing can be closed properly after a failure of the GPU, and candle's device would panic in trying, before
            // anybody has heard of the cause. The system cleans up.
            std::mem::forget(self.candle.clone());
        }
        // Setting the stream makes cuBLAS fall back to scratch of its own; candle's device may live on.
        let handle = *self.candle.cublas_handle().handle();
        // SAFETY: the handle and the stream are alive. An error leaves a handle that nobody uses any more.
        let _ = unsafe { cublas::cublasSetStream_v2(handle, self.computing.raw().cast()) };
    }
}

impl Launcher for Gpu {
    fn launch(&self, family: Family, kernel: &str, grid: Grid, args: &[Arg]) -> Result<()> {
        grid.check(self.card.capability).with_context(|| kernel.to_string())?;
        self.modules.launch(&self.computing, family, kernel, grid, args)
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        // cuBLAS takes the thread's context.
        self.context().bind_to_thread().attempt("multiplying matrices")?;
        let _one = self.multiplying.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: candle's device keeps the handle alive, on the computing stream; the addresses are the caller's promise,
        // as a kernel's are.
        let done = unsafe { products::multiply(*self.candle.cublas_handle().handle(), product, self.allows_tf32()) };
        // cuBLAS says no more than that it failed where the GPU broke earlier; the driver says why.
        done.map_err(|error| match self.computing.mark().and_then(|mark| mark.is_reached()) {
            Ok(_) => error,
            Err(cause) => cause.context(format!("{error:#}")),
        })
    }

    fn capability(&self) -> u32 {
        self.card.capability
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn allows_tf32(&self) -> bool {
        self.tf32.load(Ordering::Relaxed)
    }

    fn scratch(&self, bytes: usize) -> Result<Scratch> {
        if bytes == 0 {
            return Ok(Scratch::new(Address::NULL, None));
        }
        let memory = self.computing.alloc(bytes, "scratch of a kernel")?;
        Ok(Scratch::new(memory.address(), Some(Box::new(memory))))
    }
}

type Opened = Mutex<Vec<(DeviceId, Weak<Gpu>)>>;

fn opened() -> &'static Opened {
    static OPENED: Opened = Mutex::new(Vec::new());
    &OPENED
}

fn register(gpu: &Arc<Gpu>) {
    let mut opened = opened().lock().unwrap_or_else(|e| e.into_inner());
    opened.retain(|(_, gpu)| gpu.strong_count() > 0);
    opened.push((gpu.candle.id(), Arc::downgrade(gpu)));
}

//! The emulated device (feature `emulate`): kernels compiled for the processor, in ordinary memory. Addresses are host
//! pointers. It is for tests: thousands of times slower than a GPU, but it sees what a GPU does not say: barriers that
//! not all threads reach, memory that is read before it is written (shared memory and scratch begin as NaNs), accesses
//! beyond a block's shared memory or an [`Values`], vectors that are not aligned, arguments of the wrong kind.
//!
//! A missing barrier shows as a wrong number in one of the [`Order`]s. See kernels/emulate/README.md.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};

use super::{Address, Arg, Family, Grid, Launcher, Scratch};

/// In which order the threads of a block, and blocks, run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Ascending,
    Descending,
    /// Shuffled by this seed.
    Shuffled(u32),
}

/// An emulated GPU of some capability.
pub struct Emulated {
    library: &'static Library,
    capability: u32,
    order: Order,
    /// Cycles that ldmatrix took in shared memory, and what it would take without bank conflicts.
    cycles: [AtomicU64; 2],
}

impl Emulated {
    /// 75 runs the code for devices before 8.0, everything else the code from 8.0 on.
    pub fn new(capability: u32, order: Order) -> Result<Self> {
        let cycles = [AtomicU64::new(0), AtomicU64::new(0)];
        Ok(Emulated { library: Library::of(capability)?, capability, order, cycles })
    }

    /// What a kernel should be tested on: every capability, every order.
    pub fn each() -> Result<Vec<Self>> {
        [
            (75, Order::Descending),
            (80, Order::Ascending),
            (86, Order::Descending),
            (89, Order::Shuffled(7)),
            (90, Order::Shuffled(9)),
        ]
        .into_iter()
        .map(|(capability, order)| Self::new(capability, order))
        .collect()
    }

    /// How many times longer than needed ldmatrix took because of bank conflicts: 1 is perfect.
    pub fn bank_conflicts(&self) -> f64 {
        let [cycles, ideal] = [0, 1].map(|i| self.cycles[i].load(Ordering::Relaxed) as f64);
        if ideal == 0.0 { 1.0 } else { cycles / ideal }
    }
}

impl Launcher for Emulated {
    /// Runs the kernel to its end, with the emulator's findings as errors.
    fn launch(&self, _: Family, kernel: &str, grid: Grid, args: &[Arg]) -> Result<()> {
        grid.check(self.capability).with_context(|| format!("{kernel} cannot be launched"))?;
        let arguments: Vec<Argument> = args.iter().map(|&arg| Argument::new(arg)).collect();
        let order = match self.order {
            Order::Ascending => 0,
            Order::Descending => 1,
            Order::Shuffled(seed) => seed.max(2),
        };
        let workers = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(4) as u32;
        let launch = Launch {
            blocks: grid.blocks,
            threads: grid.threads,
            shared: grid.shared,
            order,
            workers,
            count: arguments.len() as u32,
            arguments: arguments.as_ptr(),
        };
        let name = CString::new(kernel)?;
        let (mut cycles, mut message) = ([0u64; 2], [0 as c_char; 2048]);
        // SAFETY: `launch` has the layout of the emulator's, and everything it points to lives until the call is over;
        // the message is terminated within its room. What the kernel does with its addresses is the caller's promise,
        // as on a GPU; faults in it are caught.
        let (failed, message) = unsafe {
            let failed =
                (self.library.launch)(name.as_ptr(), &launch, cycles.as_mut_ptr(), message.as_mut_ptr(), message.len());
            (failed, CStr::from_ptr(message.as_ptr()))
        };
        self.cycles.iter().zip(cycles).for_each(|(sum, more)| _ = sum.fetch_add(more, Ordering::Relaxed));
        if failed != 0 {
            bail!("{}", message.to_string_lossy());
        }
        Ok(())
    }

    fn multiply(&self, product: &super::product::Product) -> Result<()> {
        // SAFETY: the caller's promise, as on a GPU; launches are over when they return.
        unsafe { super::product::multiply(product) }
    }

    fn capability(&self) -> u32 {
        self.capability
    }

    fn multiprocessors(&self) -> u32 {
        4
    }

    fn allows_tf32(&self) -> bool {
        false
    }

    fn scratch(&self, bytes: usize) -> Result<Scratch> {
        if bytes == 0 {
            return Ok(Scratch::new(Address::NULL, None));
        }
        let memory = Guarded::new(bytes, 0xff)?;
        Ok(Scratch::new(Address(memory.start as u64), Some(Box::new(memory))))
    }
}

/// Values in the emulated device's memory. Reading or writing beyond their end is an error of the launch, or of the
/// drop.
pub struct Values<T> {
    memory: Guarded,
    len: usize,
    kind: std::marker::PhantomData<T>,
}

impl<T: bytemuck::Pod> Values<T> {
    /// A copy of `values`.
    pub fn new(values: &[T]) -> Result<Self> {
        let memory = Guarded::new(size_of_val(values), 0)?;
        // SAFETY: the memory has this many bytes and nobody else knows it.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast(), memory.start, size_of_val(values)) };
        Ok(Values { memory, len: values.len(), kind: std::marker::PhantomData })
    }

    /// `len` values of which every byte is 0xff, which is a NaN in every dtype.
    pub fn unwritten(len: usize) -> Result<Self> {
        let memory = Guarded::new(len * size_of::<T>(), 0xff)?;
        Ok(Values { memory, len, kind: std::marker::PhantomData })
    }

    pub fn address(&self) -> Address {
        Address(self.memory.start as u64)
    }

    /// What is there now.
    pub fn get(&self) -> Vec<T> {
        self.memory.check();
        let mut values = vec![T::zeroed(); self.len];
        // SAFETY: launches are over when they return, and T is any bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.memory.start,
                values.as_mut_ptr().cast(),
                size_of_val(values.as_slice()),
            );
        }
        values
    }
}

/// Memory that ends where a page begins that nobody may touch, but for what the alignment to 256 bytes (of scratch) or
/// 16 takes, which is checked.
struct Guarded {
    pages: *mut u8,
    all: usize,
    start: *mut u8,
    bytes: usize,
}

/// What is written between the end and the page.
const CANARY: u8 = 0xa5;
const PAGE: usize = 4096;
/// Bytes that the start is a multiple of.
const ALIGNMENT: usize = 16;

// SAFETY: it owns its pages.
unsafe impl Send for Guarded {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Guarded {}

impl Guarded {
    fn new(bytes: usize, fill: u8) -> Result<Self> {
        let room = bytes.next_multiple_of(ALIGNMENT);
        let all = room.next_multiple_of(PAGE) + PAGE;
        // SAFETY: new pages, which nobody else has; what is written lies before the last of them.
        unsafe {
            let pages = libc::mmap(
                std::ptr::null_mut(),
                all,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if pages == libc::MAP_FAILED {
                bail!("no memory for {bytes} bytes of an emulated device: {}", std::io::Error::last_os_error());
            }
            let pages: *mut u8 = pages.cast();
            libc::mprotect(pages.add(all - PAGE).cast::<c_void>(), PAGE, libc::PROT_NONE);
            let start = pages.add(all - PAGE - room);
            std::ptr::write_bytes(pages, CANARY, all - PAGE);
            std::ptr::write_bytes(start, fill, bytes);
            Ok(Guarded { pages, all, start, bytes })
        }
    }

    /// Nothing was written around it.
    fn check(&self) {
        let end = self.all - PAGE;
        // SAFETY: all pages but the last are readable.
        let memory = unsafe { std::slice::from_raw_parts(self.pages, end) };
        let start = self.start as usize - self.pages as usize;
        let whole = |part: &[u8]| part.iter().all(|&b| b == CANARY);
        assert!(whole(&memory[..start]), "a kernel wrote before the start of its memory");
        assert!(whole(&memory[start + self.bytes..]), "a kernel wrote past the end of its memory");
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check();
        }
        // SAFETY: the pages are its own.
        unsafe { libc::munmap(self.pages.cast(), self.all) };
    }
}

/// kernels/emulate/emulator.h's Argument.
#[repr(C)]
struct Argument {
    kind: u32,
    unused: u32,
    bits: u64,
}

impl Argument {
    fn new(arg: Arg) -> Self {
        let (kind, bits) = match arg {
            Arg::Address(address) => (0, address.0),
            Arg::I32(value) => (1, value as u32 as u64),
            Arg::U32(value) => (2, value as u64),
            Arg::I64(value) => (3, value as u64),
            Arg::U64(value) => (4, value),
            Arg::F32(value) => (5, value.to_bits() as u64),
        };
        Argument { kind, unused: 0, bits }
    }
}

/// kernels/emulate/launch.cpp's Launch.
#[repr(C)]
struct Launch {
    blocks: [u32; 3],
    threads: u32,
    shared: u32,
    order: u32,
    workers: u32,
    count: u32,
    arguments: *const Argument,
}

type LaunchFunction = unsafe extern "C" fn(*const c_char, *const Launch, *mut u64, *mut c_char, usize) -> c_int;

/// The kernels as the build script compiled them.
struct Library {
    launch: LaunchFunction,
}

impl Library {
    fn of(capability: u32) -> Result<&'static Self> {
        static LIBRARIES: [OnceLock<Result<Library, String>>; 2] = [const { OnceLock::new() }; 2];
        let (at, path) = match capability {
            ..80 => (0, env!("EMULATED_KERNELS_75")),
            _ => (1, env!("EMULATED_KERNELS_80")),
        };
        let library = LIBRARIES[at].get_or_init(|| Self::open(path));
        library.as_ref().map_err(|e| anyhow::anyhow!("the emulated kernels: {e}"))
    }

    fn open(path: &str) -> Result<Self, String> {
        let path = CString::new(path).map_err(|e| e.to_string())?;
        // SAFETY: the library is ours, and its function has this signature; it stays open.
        unsafe {
            let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            if library.is_null() {
                return Err(CStr::from_ptr(libc::dlerror()).to_string_lossy().into_owned());
            }
            let launch = libc::dlsym(library, c"emulator_launch".as_ptr());
            if launch.is_null() {
                return Err(format!("no emulator_launch in {path:?}"));
            }
            Ok(Library { launch: std::mem::transmute::<*mut c_void, LaunchFunction>(launch) })
        }
    }
}

#[cfg(test)]
mod tests;

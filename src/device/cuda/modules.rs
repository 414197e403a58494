//! The compiled kernels, embedded in the program, and launching them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, RwLock};

use anyhow::{Result, anyhow};
use cudarc::driver::sys::CUfunction_attribute as FunctionAttribute;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use super::status::{Attempt, failed};
use super::stream::Stream;
use crate::kernels::{Arg, Family, Grid};

include!(concat!(env!("OUT_DIR"), "/fat_binaries.rs"));

/// Dynamic shared memory that every kernel may ask for without saying so before.
const SHARED_FOR_ALL: u32 = 48 << 10;

/// The name of a family's source, without `.cu`.
fn file(family: Family) -> &'static str {
    match family {
        Family::Attention => "attention",
        Family::Conv2d => "conv2d",
        Family::Norms => "norms",
        Family::Glue => "glue",
        Family::Optimizer => "optimizer",
        Family::Reduce => "reduce",
        Family::Selftest => "selftest",
    }
}

/// Loaded modules and found kernels, each when it is first launched.
pub(super) struct Modules {
    context: Arc<CudaContext>,
    /// Dynamic shared memory that a kernel can be given on this GPU.
    shared_at_most: u32,
    loaded: RwLock<HashMap<Family, Loaded>>,
}

struct Loaded {
    module: Arc<CudaModule>,
    kernels: HashMap<Box<str>, Kernel>,
}

struct Kernel {
    function: CudaFunction,
    /// Dynamic shared memory that the driver was told it may ask for.
    shared: u32,
}

impl Modules {
    pub fn new(context: Arc<CudaContext>, shared_at_most: u32) -> Modules {
        Modules { context, shared_at_most, loaded: RwLock::default() }
    }

    /// Launches on `stream`; errors of the launch itself only.
    pub fn launch(&self, stream: &Stream, family: Family, kernel: &str, grid: Grid, args: &[Arg]) -> Result<()> {
        {
            let loaded = self.loaded.read().unwrap_or_else(|e| e.into_inner());
            let known = loaded.get(&family).and_then(|loaded| loaded.kernels.get(kernel));
            if let Some(known) = known.filter(|known| known.shared >= grid.shared) {
                return start(stream, kernel, &known.function, grid, args);
            }
        }
        // What is asked of the driver below takes the thread's context; launching sets it itself.
        self.context.bind_to_thread().attempt("loading kernels")?;
        let mut loaded = self.loaded.write().unwrap_or_else(|e| e.into_inner());
        let loaded = match loaded.entry(family) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(place) => place.insert(Loaded { module: self.load(family)?, kernels: HashMap::new() }),
        };
        let known = loaded.find(kernel, family)?;
        if grid.shared > known.shared {
            self.allow_shared(known, kernel, grid.shared)?;
        }
        start(stream, kernel, &known.function, grid, args)
    }

    fn load(&self, family: Family) -> Result<Arc<CudaModule>> {
        let name = file(family);
        let binary = FAT_BINARIES.iter().find(|(known, _)| *known == name);
        let (_, binary) = binary.ok_or_else(|| anyhow!("the program was built without the kernels of {name}.cu"))?;
        // Copied, since what is embedded has no alignment.
        self.context
            .load_module(Ptx::from_binary(binary.to_vec()))
            .attempt(format_args!("loading the kernels of {name}.cu"))
    }

    fn allow_shared(&self, kernel: &mut Kernel, name: &str, bytes: u32) -> Result<()> {
        if bytes > self.shared_at_most {
            return Err(anyhow!(
                "the kernel {name} asks for {bytes} bytes of shared memory, and this GPU gives at most {}",
                self.shared_at_most
            ));
        }
        let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let told = kernel.function.set_attribute(attribute, bytes as i32);
        told.attempt(format_args!("giving the kernel {name} {bytes} bytes of shared memory"))?;
        kernel.shared = bytes;
        Ok(())
    }
}

impl Loaded {
    fn find(&mut self, kernel: &str, family: Family) -> Result<&mut Kernel> {
        Ok(match self.kernels.entry(kernel.into()) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(place) => {
                let found = self.module.load_function(kernel);
                let function = found.attempt(format_args!("looking for the kernel {kernel} in {}.cu", file(family)))?;
                place.insert(Kernel { function, shared: SHARED_FOR_ALL })
            }
        })
    }
}

fn start(stream: &Stream, name: &str, function: &CudaFunction, grid: Grid, args: &[Arg]) -> Result<()> {
    let mut launch = stream.cudarc().launch_builder(function);
    for arg in args {
        match arg {
            Arg::Address(address) => launch.arg(&address.0),
            Arg::I32(value) => launch.arg(value),
            Arg::U32(value) => launch.arg(value),
            Arg::I64(value) => launch.arg(value),
            Arg::U64(value) => launch.arg(value),
            Arg::F32(value) => launch.arg(value),
        };
    }
    let [x, y, z] = grid.blocks;
    let config = LaunchConfig { grid_dim: (x, y, z), block_dim: (grid.threads, 1, 1), shared_mem_bytes: grid.shared };
    // SAFETY: that the arguments are what the kernel takes, and the memory is as large as it goes, is what the wrappers in
    // `kernels/` see to; they are the only callers, and the emulator checks every access of theirs in the tests.
    let launched = unsafe { launch.launch(config) };
    if let Err(error) = launched {
        return Err(failed(
            format_args!("launching {name} with {:?} blocks of {} threads", grid.blocks, grid.threads),
            error,
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_embedded_as_fat_binaries() {
        let (_, binary) = FAT_BINARIES.iter().find(|(name, _)| *name == file(Family::Selftest)).unwrap();
        // The magic number of the format.
        assert_eq!(binary[..4], [0x50, 0xed, 0x55, 0xba]);
    }
}

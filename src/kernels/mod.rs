//! Row 0: our CUDA kernels (`kernels/*.cu`) as Rust functions. A wrapper takes addresses and sizes, chooses a launch
//! configuration and launches through a [`Launcher`]; it knows no tensors and no weights. The same wrappers and the
//! same `.cu` sources run on a GPU (feature `cuda`, in `device/cuda`) and on the processor (feature `emulate`,
//! [`emulated`]), where their tests compare them with `ops`. Errors are those of the launch itself: what a kernel does
//! wrong on a GPU comes out when the stream is waited for.

pub mod attention;
pub mod conv2d;
mod dry;
#[cfg(feature = "emulate")]
pub mod emulated;
pub mod glue;
pub mod norms;
pub mod optimizer;
pub mod product;
pub mod reduce;
mod sizes;
#[cfg(all(test, any(feature = "cuda", feature = "emulate")))]
pub(crate) mod testing;

pub use dry::Dry;

use std::any::Any;

use anyhow::{Result, bail};
use candle_core::DType;

/// An address in the memory of the device that computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub u64);

impl Address {
    /// No memory: an operand that is left out.
    pub const NULL: Address = Address(0);

    /// The address `bytes` further on.
    pub fn at(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
    }

    /// Whether it is a multiple of `bytes`.
    pub fn aligned(self, bytes: u64) -> bool {
        self.0.is_multiple_of(bytes)
    }
}

/// An argument of a kernel. Its kind must be that of the parameter: pointer, int, unsigned, long long, unsigned long
/// long, float.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    Address(Address),
    I32(i32),
    U32(u32),
    I64(i64),
    U64(u64),
    F32(f32),
}

macro_rules! from {
    ($($kind:ident: $type:ty),*) => {
        $(impl From<$type> for Arg {
            fn from(value: $type) -> Arg {
                Arg::$kind(value)
            }
        })*
    };
}
from!(Address: Address, I32: i32, U32: u32, I64: i64, U64: u64, F32: f32);

/// How many threads a kernel is launched with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    pub blocks: [u32; 3],
    /// Of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, bytes.
    pub shared: u32,
}

impl Grid {
    /// Refuses what no device of this capability can launch. (Launchers ask; it is no excuse to leave the choice of a
    /// configuration to them.)
    pub fn check(&self, capability: u32) -> Result<()> {
        let [x, y, z] = self.blocks;
        if x == 0 || y == 0 || z == 0 || x > i32::MAX as u32 || y > 65535 || z > 65535 {
            bail!("a grid of {x} x {y} x {z} blocks");
        }
        if self.threads == 0 || self.threads > 1024 {
            bail!("blocks of {} threads", self.threads);
        }
        let most = shared_memory(capability);
        if self.shared > most {
            bail!(
                "{} bytes of shared memory; a device of capability {capability} gives {most} to a block",
                self.shared
            );
        }
        Ok(())
    }
}

/// Bytes of shared memory that a block can have if its kernel opts in (CUDA C++ Programming Guide, table "Technical
/// specifications per compute capability").
pub fn shared_memory(capability: u32) -> u32 {
    match capability {
        ..80 => 64 << 10,
        80 | 87 => 163 << 10,
        90 | 100 | 103 => 227 << 10,
        _ => 99 << 10,
    }
}

/// A file of kernels, which is one module on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    Attention,
    Conv2d,
    Norms,
    Glue,
    Optimizer,
    Reduce,
    /// What a GPU has to show before it is trusted.
    Selftest,
}

/// Where kernels run, in the order in which they are launched.
pub trait Launcher: Send + Sync {
    /// Launches on the stream that computes; errors of the launch itself only.
    fn launch(&self, family: Family, kernel: &str, grid: Grid, args: &[Arg]) -> Result<()>;

    /// A matrix product, in the same order.
    fn multiply(&self, product: &product::Product) -> Result<()>;

    /// Major and minor, times 10: 75, 80, 86, 89, 90.
    fn capability(&self) -> u32;

    fn multiprocessors(&self) -> u32;

    /// Whether factors of products in f32 may be rounded to tf32 (from 8.0, for tensor cores): in [`Self::multiply`] and
    /// in convolutions.
    fn allows_tf32(&self) -> bool;

    /// Scratch that is valid until the kernels launched after it on this stream are done (stream-ordered), aligned to
    /// 256 bytes, with any content. No bytes are no memory.
    fn scratch(&self, bytes: usize) -> Result<Scratch>;
}

/// Memory for kernels' intermediate results. Dropping it after the launches that use it is right: what is launched
/// later may have it.
pub struct Scratch {
    address: Address,
    _memory: Option<Box<dyn Any + Send>>,
}

impl Scratch {
    /// The memory at `address`, which goes when `memory` is dropped.
    pub fn new(address: Address, memory: Option<Box<dyn Any + Send>>) -> Self {
        Scratch { address, _memory: memory }
    }

    pub fn address(&self) -> Address {
        self.address
    }
}

/// The end of a kernel's name that stands for a dtype of activations.
pub fn suffix(dtype: DType) -> Result<&'static str> {
    Ok(match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        other => bail!("no kernels for {}", other.as_str()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_are_checked_against_the_device() {
        let grid = |blocks, threads, shared| Grid { blocks, threads, shared };
        assert!(grid([1 << 20, 65535, 1], 1024, 64 << 10).check(75).is_ok());
        assert!(grid([1, 65536, 1], 32, 0).check(90).is_err());
        assert!(grid([1, 0, 1], 32, 0).check(90).is_err());
        assert!(grid([1, 1, 1], 1056, 0).check(90).is_err());
        for (capability, most) in [(75, 64), (80, 163), (86, 99), (89, 99), (90, 227)] {
            assert!(grid([1, 1, 1], 32, most << 10).check(capability).is_ok());
            assert!(grid([1, 1, 1], 32, (most << 10) + 1).check(capability).is_err());
        }
    }
}

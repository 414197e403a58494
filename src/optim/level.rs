//! The choice of an instruction set at run time.

use std::sync::LazyLock;

use super::lanes::{Kernel, Lanes, Portable};
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};

/// An instruction set that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

static BEST: LazyLock<Level> = LazyLock::new(|| Level::available()[0]);

impl Level {
    /// Those that this CPU has, the best first.
    pub fn available() -> Vec<Level> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("f16c");
            if avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512vl") {
                levels.push(Level::Avx512);
            }
            if avx2 {
                levels.push(Level::Avx2);
            }
        }
        levels.push(Level::Portable);
        levels
    }

    pub fn best() -> Level {
        *BEST
    }

    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: there is no level but those that `available` has found.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => Avx512::vectorize(kernel),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => Avx2::vectorize(kernel),
                Level::Portable => Portable::vectorize(kernel),
            }
        }
    }
}

//! What a status of the driver means to whoever runs the program, and the fault that ends all waiting.

use std::fmt;
use std::sync::{Arc, Mutex};

use anyhow::{Error, Result, anyhow};
use cudarc::driver::{DriverError, sys::CUresult};

/// An error of the driver with what was attempted, and where it is known what helps, that.
pub(super) fn failed(what: impl fmt::Display, error: DriverError) -> Error {
    use CUresult::*;
    let advice = match error.0 {
        CUDA_ERROR_ECC_UNCORRECTABLE => {
            ": the GPU's memory has an error that cannot be corrected; restart the machine, and if it comes again have the \
             card replaced (`nvidia-smi -q -d ECC` counts them). The last checkpoint is whole"
        }
        CUDA_ERROR_ILLEGAL_ADDRESS | CUDA_ERROR_MISALIGNED_ADDRESS | CUDA_ERROR_LAUNCH_FAILED => {
            ": a kernel that was launched earlier has gone wrong. CUDA_LAUNCH_BLOCKING=1 makes the message name the one"
        }
        CUDA_ERROR_OUT_OF_MEMORY => ": the GPU has no memory left",
        CUDA_ERROR_NO_BINARY_FOR_GPU | CUDA_ERROR_INVALID_PTX | CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            ": this program has no code for this GPU or this driver"
        }
        CUDA_ERROR_LAUNCH_TIMEOUT => {
            ": the system stopped a kernel that took too long, as it does on a GPU that also drives a screen"
        }
        CUDA_ERROR_DEVICE_UNAVAILABLE | CUDA_ERROR_DEVICE_NOT_LICENSED => {
            ": another process holds the GPU for itself alone (`nvidia-smi -q -d COMPUTE`)"
        }
        _ => "",
    };
    anyhow!("{what}: {}{advice}", describe(error))
}

/// `CUDA_ERROR_INVALID_VALUE (invalid argument)`.
pub(super) fn describe(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => format!("{:?} ({})", error.0, text.to_string_lossy()),
        Err(_) => format!("{:?}", error.0),
    }
}

/// Adds what was attempted to an error of the driver.
pub(super) trait Attempt<T> {
    fn attempt(self, what: impl fmt::Display) -> Result<T>;
}

impl<T> Attempt<T> for Result<T, DriverError> {
    fn attempt(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|error| failed(what, error))
    }
}

/// Makes the error that waiting ends with; an error cannot be copied.
type Reason = Arc<dyn Fn() -> Error + Send + Sync>;

/// Something that has gone wrong beside the computation, so that what the GPU does from then on is of no use: a
/// collective that was given up. Every wait of the host asks for it.
#[derive(Clone, Default)]
pub struct Faults(Arc<Mutex<Option<Reason>>>);

impl Faults {
    /// Only the first fault is kept: it is the cause of others. Whether this one was it.
    pub fn raise(&self, reason: impl Fn() -> Error + Send + Sync + 'static) -> bool {
        let mut fault = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let first = fault.is_none();
        fault.get_or_insert_with(|| Arc::new(reason));
        first
    }

    /// The fault as an error, if there was one.
    pub fn check(&self) -> Result<()> {
        let fault = self.0.lock().unwrap_or_else(|e| e.into_inner()).clone();
        fault.map_or(Ok(()), |reason| Err(reason()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_fault_is_what_all_waits_are_told() {
        let faults = Faults::default();
        assert!(faults.check().is_ok());
        assert!(faults.raise(|| anyhow!("the cause")));
        assert!(!faults.raise(|| anyhow!("a consequence")));
        assert_eq!(faults.clone().check().unwrap_err().to_string(), "the cause");
    }
}

//! What a rank computes on: the processor, or its GPU. Opened once, before anything is allocated there.

use std::sync::Arc;

use anyhow::Result;
use candle_core::Device;

use super::{Accelerator, Memory};

/// A compute device, opened. Cheap to clone; stays open as long as a clone or memory of it is there.
#[derive(Clone)]
pub struct Hardware {
    device: Device,
    accelerator: Option<Arc<dyn Accelerator>>,
    #[cfg(feature = "cuda")]
    gpu: Option<Arc<super::cuda::Gpu>>,
}

impl Hardware {
    pub fn cpu() -> Hardware {
        Hardware {
            device: Device::Cpu,
            accelerator: None,
            #[cfg(feature = "cuda")]
            gpu: None,
        }
    }

    /// The GPU of the rank with this place on the machine; `limit` bytes of its memory may be used for everything but
    /// what the driver takes itself, and `needs` will be. A [`crate::Refusal`] where there is none that can be used.
    #[cfg(feature = "cuda")]
    pub fn gpu(local_rank: usize, limit: Option<usize>, needs: usize) -> Result<Hardware> {
        let gpu = super::cuda::Gpu::open(local_rank, limit)?;
        has_left(&gpu, needs, "")?;
        let accelerator: Arc<dyn Accelerator> = gpu.clone();
        super::trace::watch(&accelerator);
        Ok(Hardware { device: gpu.device().clone(), accelerator: Some(accelerator), gpu: Some(gpu) })
    }

    #[cfg(not(feature = "cuda"))]
    pub fn gpu(local_rank: usize, _limit: Option<usize>, _needs: usize) -> Result<Hardware> {
        super::gpu(local_rank).map_err(crate::Refusal::error)?;
        anyhow::bail!("this build of dblaunch has no GPU support")
    }

    /// A [`crate::Refusal`] if a GPU has less of its memory left than the run `needs`, now that `since`.
    pub fn has_left(&self, needs: usize, since: &str) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            return has_left(gpu, needs, since);
        }
        let _ = (needs, since);
        Ok(())
    }

    /// candle's device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The opened GPU, if it is one.
    #[cfg(feature = "cuda")]
    pub fn opened(&self) -> Option<&Arc<super::cuda::Gpu>> {
        self.gpu.as_ref()
    }

    /// Lets a GPU's products in fp32 be taken in tf32.
    pub fn allow_tf32(&self) {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            gpu.allow_tf32(true);
        }
    }

    /// What tells its GPU from all others, and the GPU's name.
    pub fn identity(&self) -> Option<([u8; 16], &str)> {
        #[cfg(feature = "cuda")]
        return self.gpu.as_ref().map(|gpu| (gpu.card().uuid, gpu.card().name.as_str()));
        #[cfg(not(feature = "cuda"))]
        None
    }

    /// The two tiers of its memory, with limits in bytes.
    pub fn memory(&self, device: Option<usize>, host: Option<usize>) -> Memory {
        match &self.accelerator {
            Some(accelerator) => Memory::beside(accelerator.clone(), device, host),
            None => Memory::new(device, host),
        }
    }
}

#[cfg(feature = "cuda")]
fn has_left(gpu: &super::cuda::Gpu, needs: usize, since: &str) -> Result<()> {
    let (free, total) = gpu.free()?;
    // What the run needs has the scratch in it that the pool already holds.
    let free = free + gpu.usage()?.held;
    if free >= needs {
        return Ok(());
    }
    let mib = |bytes: usize| bytes >> 20;
    Err(crate::Refusal::error(format!(
        "GPU {} ({}) has {} MiB left of {} MiB{since}, and the run needs {} MiB: close what else uses the GPU (`nvidia-smi` \
         shows it), or set memory.vram = \"{}MiB\", so that less is planned for",
        gpu.ordinal(),
        gpu.card().name,
        mib(free),
        mib(total),
        mib(needs),
        mib(free)
    )))
}

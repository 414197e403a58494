//! The memory of a rank: a device tier and a host tier, each with its budget. Where the CPU computes, the device tier is
//! the process's own memory, activations included, and the host tier a second arena beside it.

use std::sync::Arc;

use super::{Accelerator, Arena, Place, Usage, activations, device_peak};

/// The two tiers that are memory; the third is a file.
#[derive(Clone, Debug)]
pub struct Memory {
    pub device: Arena,
    pub host: Arena,
}

/// What a rank's memory holds and held at most.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Arenas of the device tier, and each below it.
    pub device: Usage,
    pub device_parts: Vec<(String, Usage)>,
    pub host: Usage,
    pub host_parts: Vec<(String, Usage)>,
    /// `None` where they are not counted.
    pub activations: Option<Usage>,
    /// Most of the device tier's arenas and the activations together; only of the arenas where activations are not counted.
    pub device_peak: usize,
    /// Whether an accelerator has counted it: all that anyone takes there, kernels' scratch too.
    pub counted_there: bool,
}

impl Memory {
    /// Limits in bytes: of the device tier (arenas and activations together), and of the host tier's arenas.
    pub fn new(device: Option<usize>, host: Option<usize>) -> Self {
        Memory { device: Arena::with_activations("device", device), host: Arena::new("host", host) }
    }

    /// The same where an accelerator computes: the device tier is its memory, whose own limit tensors and scratch share,
    /// and the host tier is in pages that its copies find quickly.
    pub fn beside(accelerator: Arc<dyn Accelerator>, device: Option<usize>, host: Option<usize>) -> Self {
        Memory {
            device: Arena::of_accelerator("device", device, accelerator.clone()),
            host: Arena::beside("host", host, accelerator),
        }
    }

    /// The arena for what is called `name` and rests in `place`. What rests in a file passes through the host's memory.
    pub fn arena(&self, place: Place, name: &str) -> Arena {
        match place {
            Place::Device => self.device.child(name),
            Place::Host | Place::Nvme => self.host.child(name),
        }
    }

    pub fn held(&self) -> Held {
        let device = self.device.usage();
        let accelerator = self.device.accelerator();
        // An accelerator's tensors are not on the heap.
        let activations = activations().filter(|_| accelerator.is_none());
        // A driver that does not say leaves the arenas' own count.
        let counted = accelerator.and_then(|accelerator| accelerator.peak().ok().flatten());
        Held {
            device,
            device_parts: self.device.parts(),
            host: self.host.usage(),
            host_parts: self.host.parts(),
            activations,
            counted_there: counted.is_some(),
            device_peak: match activations {
                Some(_) => device_peak(),
                None => counted.unwrap_or(device.peak),
            },
        }
    }

    /// Starts all peaks anew, and counts activations from what the heap holds now.
    pub fn count_from_here(&self) {
        self.device.reset_peak();
        self.host.reset_peak();
        super::count_activations_from_here();
        if let Some(accelerator) = self.device.accelerator() {
            // A peak that goes on counting from before is too high, never too low.
            let _ = accelerator.reset_peak();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    #[test]
    fn what_rests_in_a_file_passes_through_the_host() {
        let memory = Memory::new(None, Some(1 << 20));
        let _a = memory.arena(Place::Device, "parameters").alloc(DType::F32, 10, "a").unwrap();
        let _b = memory.arena(Place::Nvme, "optimizer").alloc(DType::F32, 20, "b").unwrap();
        let held = memory.held();
        assert_eq!((held.device.used, held.host.used, held.host_parts[0].0.as_str()), (40, 80, "optimizer"));
        assert!(memory.arena(Place::Host, "parameters").alloc(DType::U8, 1 << 20, "c").is_err());
    }
}

//! Cards by name, and this machine: sizes and bandwidths as their makers state them. Nothing is measured.

use crate::comm::GpuCollectives;
use crate::config::DeviceKind;
use crate::device::{FoundGpu, Place};
use crate::kernels::Dry;

/// What a run computes and stores with, as far as the planner cares. Bytes, bytes a second, operations a second.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    pub name: String,
    /// Memory of the compute device.
    pub device: u64,
    /// Memory of the machine.
    pub host: u64,
    /// The compute device is the machine's processor: both tiers are the same memory.
    pub shared: bool,
    /// Products in fp32, and in bf16 or fp16, as far as they are reached in practice.
    pub flops: f64,
    pub half_flops: f64,
    /// Of the compute device's memory.
    pub device_bandwidth: f64,
    /// Between device and host, each way.
    pub bus: f64,
    /// Of the machine's memory, as a CPU optimizer reaches it.
    pub host_bandwidth: f64,
    /// Of the drive: reading, writing.
    pub drive: [f64; 2],
    /// Between ranks, each way.
    pub between_ranks: f64,
    /// The kind of GPU that ops launch kernels on; none where the processor computes.
    pub kernels: Option<Dry>,
}

/// A card as its maker states it.
struct Card {
    name: &'static str,
    gib: u64,
    /// TFLOPS in fp32, and of the tensor cores in half precision with sums in fp32.
    tflops: [f64; 2],
    /// GB/s of its memory, and of its bus each way.
    bandwidths: [f64; 2],
    /// Compute capability (times 10) and multiprocessors.
    kind: [u32; 2],
}

const fn card(name: &'static str, gib: u64, tflops: [f64; 2], bandwidths: [f64; 2], kind: [u32; 2]) -> Card {
    Card { name, gib, tflops, bandwidths, kind }
}

const CARDS: [Card; 12] = [
    card("rtx2060-6gb", 6, [6.5, 25.8], [336.0, 12.0], [75, 30]),
    card("rtx3060-12gb", 12, [12.7, 25.5], [360.0, 24.0], [86, 28]),
    card("rtx3070-8gb", 8, [20.3, 40.6], [448.0, 24.0], [86, 46]),
    card("rtx3090-24gb", 24, [35.6, 71.0], [936.0, 24.0], [86, 82]),
    card("rtx4060-8gb", 8, [15.1, 30.2], [272.0, 12.0], [89, 24]),
    card("rtx4060ti-16gb", 16, [22.1, 44.1], [288.0, 12.0], [89, 34]),
    card("rtx4090-24gb", 24, [82.6, 165.2], [1008.0, 24.0], [89, 128]),
    card("t4-16gb", 16, [8.1, 65.0], [320.0, 12.0], [75, 40]),
    card("a100-40gb", 40, [19.5, 312.0], [1555.0, 24.0], [80, 108]),
    card("a100-80gb", 80, [19.5, 312.0], [2039.0, 24.0], [80, 108]),
    card("h100-80gb", 80, [67.0, 989.0], [3350.0, 50.0], [90, 132]),
    card("h200-141gb", 141, [67.0, 989.0], [4800.0, 50.0], [90, 132]),
];

/// Parts of the stated operations that training reaches: in fp32, in half precision.
const REACHED: [f64; 2] = [0.55, 0.35];
/// What the driver and its libraries take of a card.
const DRIVER: u64 = 640 << 20;
/// What NCCL takes of one beside that where ranks are several: a part of the card, within bounds. It takes the more
/// the faster the GPUs are connected (10 MB for each of 2 to 32 channels and each neighbour, NVIDIA/nccl issue 1685),
/// and the large cards are. A run looks at what is left once it is connected.
const NCCL: (u64, u64, u64) = (32, 256 << 20, 1536 << 20);
/// A desktop's memory and a usual NVMe drive.
const HOST_BANDWIDTH: f64 = 30e9;
const DRIVE: [f64; 2] = [2.5e9, 1.8e9];

/// The names that [`Machine::named`] knows.
pub fn card_names() -> impl Iterator<Item = &'static str> {
    CARDS.iter().map(|card| card.name)
}

impl Machine {
    /// A machine with this card and `host` bytes of memory.
    pub fn named(name: &str, host: u64) -> Option<Machine> {
        let card = CARDS.iter().find(|card| card.name == name)?;
        Some(Machine {
            name: card.name.to_string(),
            device: (card.gib << 30) - DRIVER,
            host,
            shared: false,
            flops: card.tflops[0] * 1e12 * REACHED[0],
            half_flops: card.tflops[1] * 1e12 * REACHED[1],
            device_bandwidth: card.bandwidths[0] * 1e9,
            bus: card.bandwidths[1] * 1e9,
            host_bandwidth: HOST_BANDWIDTH,
            drive: DRIVE,
            between_ranks: card.bandwidths[1] * 1e9 / 2.0,
            kernels: Some(Dry { capability: card.kind[0], multiprocessors: card.kind[1] }),
        })
    }

    /// A machine that computes on its `cores`, with `memory` bytes.
    pub fn of_cores(cores: usize, memory: u64) -> Machine {
        // A core of a server: 2.5 GHz, two products of 16 numbers a cycle, half of which are reached.
        let flops = cores as f64 * 80e9;
        Machine {
            name: format!("this machine's {cores} cores"),
            device: memory,
            host: memory,
            shared: true,
            flops,
            half_flops: flops * 0.8,
            device_bandwidth: HOST_BANDWIDTH,
            bus: HOST_BANDWIDTH / 3.0,
            host_bandwidth: HOST_BANDWIDTH,
            drive: DRIVE,
            between_ranks: HOST_BANDWIDTH / 4.0,
            kernels: None,
        }
    }

    /// What this machine computes on: its GPU, if `on` says so and there is one, or its cores.
    pub fn this(on: DeviceKind) -> Machine {
        match (on, crate::device::gpu(0)) {
            (DeviceKind::Cuda, Ok(gpu)) => Machine::of_gpu(&gpu, memory_bytes()),
            _ => Machine::without_card(),
        }
    }

    /// A machine with this GPU and `host` bytes of memory: as the card of its name, or the nearest one, with the memory that
    /// its driver says it has.
    pub fn of_gpu(gpu: &FoundGpu, host: u64) -> Machine {
        let said: String = gpu.name.to_lowercase().chars().filter(|c| c.is_ascii_alphanumeric()).collect();
        let model = |card: &Card| card.name.split('-').next().unwrap_or_default();
        let off = |card: &Card| (card.gib << 30).abs_diff(gpu.memory);
        // The longest name, since "rtx4060" is in "rtx4060ti"; of those, the nearest memory.
        let known = CARDS.iter().filter(|card| said.contains(model(card)));
        let like = known.min_by_key(|card| (usize::MAX - model(card).len(), off(card)));
        let like = like.or_else(|| CARDS.iter().min_by_key(|card| off(card))).map_or("rtx3060-12gb", |card| card.name);
        let device = gpu.memory.saturating_sub(DRIVER);
        let machine = Machine::named(like, host).unwrap_or_else(Machine::without_card);
        let kernels = Some(Dry { capability: gpu.capability, multiprocessors: gpu.multiprocessors });
        Machine { name: gpu.name.clone(), device, kernels, ..machine }
    }

    /// This machine without a card.
    fn without_card() -> Machine {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Machine::of_cores(cores, memory_bytes())
    }

    /// Bytes of the device's memory that one of so many ranks can plan with.
    pub(super) fn device_for(&self, ranks: usize, by: GpuCollectives) -> u64 {
        let (part, least, most) = NCCL;
        let connected = ranks > 1 && !self.shared && by != GpuCollectives::Host;
        self.device - if connected { (self.device / part).clamp(least, most).min(self.device) } else { 0 }
    }

    /// How fast a state that rests in `place` is read and written by what updates it.
    pub(super) fn bandwidth(&self, place: Place) -> f64 {
        match place {
            Place::Device => self.device_bandwidth,
            Place::Host | Place::Nvme => self.host_bandwidth,
        }
    }
}

/// The machine's memory, as far as this process may use it.
pub fn memory_bytes() -> u64 {
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    // Where there is no /proc, a guess that budgets can replace.
    let total = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
    });
    let total = total.unwrap_or(16 << 30);
    limit.map_or(total, |limit: u64| limit.min(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_known_by_name_and_each_once() {
        let mut names: Vec<_> = card_names().collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CARDS.len());
        let card = Machine::named("rtx3060-12gb", 32 << 30).unwrap();
        assert!(card.device > 11 << 30 && card.device < 12 << 30 && !card.shared);
        assert!(Machine::named("rtx9999", 1).is_none());
        assert!(Machine::this(DeviceKind::Cpu).shared && memory_bytes() > 1 << 28);
    }

    #[test]
    fn several_ranks_leave_room_for_what_connects_them() {
        let card = |name: &str| Machine::named(name, 1).unwrap();
        let for_ranks = |name: &str, ranks| card(name).device_for(ranks, GpuCollectives::Auto);
        assert_eq!(for_ranks("rtx3070-8gb", 1), card("rtx3070-8gb").device);
        assert_eq!(for_ranks("rtx3070-8gb", 2), card("rtx3070-8gb").device - (256 << 20));
        assert_eq!(for_ranks("h200-141gb", 8), card("h200-141gb").device - (1536 << 20));
        assert_eq!(card("rtx3070-8gb").device_for(2, GpuCollectives::Host), card("rtx3070-8gb").device);
        let cores = Machine::of_cores(2, 1 << 30);
        assert_eq!(cores.device_for(2, GpuCollectives::Auto), cores.device);
    }

    #[test]
    fn a_gpu_is_planned_for_as_the_card_of_its_name() {
        let gpu = |name: &str, gib: u64| {
            Machine::of_gpu(
                &FoundGpu { name: name.to_string(), memory: gib << 30, capability: 86, multiprocessors: 28 },
                1,
            )
        };
        let like = |name: &str| Machine::named(name, 1).unwrap();
        let same = |a: Machine, b: Machine| assert_eq!((a.flops, a.bus, a.device), (b.flops, b.bus, b.device));
        same(gpu("NVIDIA GeForce RTX 4060 Ti", 16), like("rtx4060ti-16gb"));
        same(gpu("NVIDIA GeForce RTX 4060 Laptop GPU", 8), like("rtx4060-8gb"));
        same(gpu("NVIDIA H200", 141), like("h200-141gb"));
        same(gpu("NVIDIA A100-SXM4-80GB", 80), like("a100-80gb"));
        let unknown = gpu("NVIDIA Something 9", 25);
        assert_eq!((unknown.name.as_str(), unknown.shared), ("NVIDIA Something 9", false));
        assert!(unknown.device > 24 << 30 && unknown.flops > 1e12);
    }

    #[test]
    fn machines_have_memory() {
        assert!(Machine::without_card().host > 1 << 28);
    }
}

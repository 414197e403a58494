//! The command line of `dblaunch bench`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{MOST_COUNT, count};
use crate::comm::MAX_RANKS;

/// Most of a side of latents: pictures of 16384 pixels.
const MOST_LATENT: u64 = 2048;

#[derive(Clone, Debug, Subcommand)]
pub enum BenchCommand {
    /// What each rank holds while SD 1.5's UNet trains
    Memory(MemoryArgs),
    /// How long forward, backward and update of one level of SD 1.5's UNet take
    Layers {
        #[arg(long, default_value = "1", value_parser = count(MOST_COUNT))]
        batch: NonZeroUsize,
        /// Side of the latents; 64 for pictures of 512 pixels
        #[arg(long, default_value_t = 64, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(8..=MOST_LATENT))]
        latent: usize,
        #[arg(long, default_value = "3", value_parser = count(MOST_COUNT))]
        repeats: NonZeroUsize,
        #[arg(long, value_enum, default_value_t = BenchDtype::F32)]
        dtype: BenchDtype,
    },
    /// How fast AdamW updates weights, beside a loop that only reads and writes the same
    Adamw {
        #[arg(long, default_value = "100000000", value_parser = count(MOST_COUNT))]
        elements: NonZeroUsize,
        #[arg(long, default_value = "5", value_parser = count(MOST_COUNT))]
        repeats: NonZeroUsize,
    },
    /// Whether GPUs, the ways to them and between them work, and how fast (builds with the feature cuda)
    Gpu {
        /// Ranks, each with a GPU of its own
        #[arg(long, default_value = "1", value_parser = count(MAX_RANKS))]
        nproc: NonZeroUsize,
        /// Bytes of a GPU's memory to use at most
        #[arg(long, default_value_t = 2 << 30, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1 << 30..))]
        limit: usize,
        /// Let the last rank fail in the end, to see that the others do not wait for it
        #[arg(long)]
        fail: bool,
    },
    /// How fast those kernels are whose limit is memory, beside a copy on the same GPU (builds with the feature cuda)
    Kernels {
        /// Bytes of the GPU's memory to use at most
        #[arg(long, default_value_t = 2 << 30, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1 << 30..))]
        limit: usize,
    },
    /// How long a step takes with all states on the host, beside what bounds it: the step with all of them on the GPU, the
    /// way between, and the host's optimizer (builds with the feature cuda)
    Offload {
        /// Side of the latents; 64 for pictures of 512 pixels
        #[arg(long, default_value_t = 64, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(8..=MOST_LATENT))]
        latent: usize,
        /// Steps of each; the first is not counted
        #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(2..))]
        steps: u64,
        /// A folder for a recording of the steps with all states on the host
        #[arg(long)]
        profile: Option<PathBuf>,
    },
    /// Take a GPU's memory but for some, and keep it until standard input ends, so that others find a small GPU (builds
    /// with the feature cuda)
    Hold {
        /// Bytes to leave free
        #[arg(long)]
        leave: usize,
    },
    /// Run single ops forward and backward on recorded inputs, for `benches/half_torch.py`
    Ops {
        /// A safetensors file with the inputs; the ops are in its metadata
        from: PathBuf,
        /// Where the results go
        into: PathBuf,
        #[arg(long, value_enum, default_value_t = BenchDevice::Cpu)]
        device: BenchDevice,
    },
    /// How fast state goes to a drive and comes back, in a temporary file
    Disk {
        /// Folder on the drive
        #[arg(long)]
        dir: PathBuf,
        /// What is written and read each time
        #[arg(long, default_value_t = 1 << 30, value_parser = clap::value_parser!(u64).range(1..=1 << 50))]
        bytes: u64,
        #[arg(long, default_value = "3", value_parser = count(MOST_COUNT))]
        rounds: NonZeroUsize,
        /// Wait for a line of standard input before each pass, to take turns with another program
        #[arg(long)]
        wait: bool,
    },
}

#[derive(Args, Clone, Debug)]
pub struct MemoryArgs {
    /// Ranks on this machine
    #[arg(long, default_value = "1", value_parser = count(MAX_RANKS))]
    pub nproc: NonZeroUsize,
    /// ZeRO stage
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=3))]
    pub stage: u8,
    /// Where it computes: on the CPU, or each rank on its GPU
    #[arg(long, value_enum, default_value_t = BenchDevice::Cpu)]
    pub device: BenchDevice,
    /// Train the text encoder, too
    #[arg(long)]
    pub text_encoder: bool,
    /// Bytes of the device's memory to use at most
    #[arg(long)]
    pub vram: Option<usize>,
    /// Bytes of the host's memory to use at most
    #[arg(long)]
    pub ram: Option<usize>,
    /// Rows of a rank's micro-batch
    #[arg(long, default_value = "1", value_parser = count(MOST_COUNT))]
    pub batch: NonZeroUsize,
    /// Side of the latents; 64 for pictures of 512 pixels
    #[arg(long, default_value_t = 16, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(8..=MOST_LATENT))]
    pub latent: usize,
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// What segments leave behind on the way forward
    #[arg(long, value_enum, default_value_t = BenchKeep::Inputs)]
    pub keep: BenchKeep,
    /// A folder for a recording of all steps but the first
    #[arg(long)]
    pub profile: Option<PathBuf>,
    /// Where parameters rest
    #[arg(long, value_enum, default_value_t = BenchPlace::Device)]
    pub parameters: BenchPlace,
    /// Where sums of gradients rest
    #[arg(long, value_enum, default_value_t = BenchPlace::Device)]
    pub gradients: BenchPlace,
    /// Where optimizer state rests
    #[arg(long, value_enum, default_value_t = BenchPlace::Device)]
    pub optimizer: BenchPlace,
    /// A folder for what rests on nvme
    #[arg(long)]
    pub nvme_dir: Option<PathBuf>,
    /// 8-bit optimizer state
    #[arg(long)]
    pub adam8bit: bool,
    /// bf16 master weights
    #[arg(long)]
    pub master_bf16: bool,
    /// Sums of gradients in bf16
    #[arg(long)]
    pub gradients_bf16: bool,
    /// What ops compute in
    #[arg(long, value_enum, default_value_t = BenchDtype::F32)]
    pub dtype: BenchDtype,
    /// Bound on the gradients' norm; 0: none, and updates begin under the backward
    #[arg(long, default_value_t = 1.0)]
    pub max_grad_norm: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BenchPlace {
    Device,
    Host,
    Nvme,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum BenchDtype {
    F32,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BenchDevice {
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BenchKeep {
    /// Their inputs: they run again on the way back
    Inputs,
    /// Everything that the way back needs
    Graph,
    /// Their inputs, on the host
    Host,
}

//! What offloading costs: a step with all states on the host, beside the three things of which it can be no faster than the
//! slowest, measured in the same run; and that it computes the same to the last bit.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use serde_json::{Value, json};

use super::adamw::seconds_an_element;
use super::gpu::ways;
use super::memory::{MemoryCase, memory};
use crate::config::DeviceKind;
use crate::device::Place;
use crate::device::cuda::Gpu;
use crate::launch::Rank;
use crate::optim::StateKind;
use crate::segment::Keep;
use crate::train::arrange::Formats;
use crate::zero::{Placement, Stage};

/// What a step with everything offloaded may take of the slowest of the three.
const AIM: f64 = 1.25;

/// Steps of SD 1.5's UNet in bf16 with all graphs kept, one row; prints one JSON line.
pub fn offload(rank: &Rank, latent: usize, steps: u64, profile: Option<PathBuf>) -> Result<()> {
    let case = |place: Place, profile: Option<PathBuf>| MemoryCase {
        stage: Stage::Replicated,
        device: DeviceKind::Cuda,
        text_encoder: false,
        limits: [None; 2],
        batch: 1,
        latent,
        steps,
        keep: Keep::Graph,
        placement: Placement { parameters: place, gradients: place, optimizer: place },
        formats: Formats { compute: DType::BF16, master: DType::F32, gradients: DType::F32, state: StateKind::F32 },
        nvme_dir: None,
        // No bound on the norm: updates begin under the backward.
        max_grad_norm: 0.0,
        profile,
    };
    let (to_gpu, from_gpu) = ways(&*Gpu::open(0, None)?)?;
    let on_device = memory(rank, &case(Place::Device, None))?;
    let on_host = memory(rank, &case(Place::Host, profile))?;
    for key in ["losses", "norms"] {
        let [device, host] = [&on_device, &on_host].map(|rows| rows.first().map(|row| &row[key]));
        ensure!(device == host, "offloaded it computes something else: {key} {host:?} instead of {device:?}");
    }
    let (device, host) = (typical(&on_device)?, typical(&on_host)?);
    let (_, denoiser) = super::shape::sd15();
    let parameters = denoiser.graph.parameters() as f64;
    // bf16 copies come for the forward and for the backward; gradients leave in fp32.
    let bus = (2.0 * 2.0 * parameters / to_gpu).max(4.0 * parameters / from_gpu);
    let optimizer = parameters * seconds_an_element()?;
    let bound = device.max(bus).max(optimizer);
    println!(
        "{}",
        json!({
            "seconds": {"offloaded": host, "on_device": device, "bus": bus, "host_optimizer": optimizer},
            "offloaded_by_the_slowest": host / bound,
            "aim": format!("at most {AIM}"),
            "held": host / bound <= AIM,
        })
    );
    Ok(())
}

/// The median step but for the first.
fn typical(rows: &[Value]) -> Result<f64> {
    let seconds = rows.first().and_then(|row| row["seconds"].as_array()).context("no steps")?;
    let mut seconds: Vec<f64> = seconds.iter().skip(1).filter_map(Value::as_f64).collect();
    seconds.sort_unstable_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().context("one step is not enough")
}

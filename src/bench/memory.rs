//! What a rank holds while it trains SD 1.5's UNet: the arenas' own ledger and the system's resident size.

use std::time::Instant;

use anyhow::Result;
use candle_core::DType;
use serde_json::json;

use super::shape;
use crate::comm::{Slice, SliceMut};
use crate::device::peak_rss_bytes;
use crate::launch::Rank;
use crate::model::Denoiser;
use crate::segment::Keep;
use crate::train::network::{Build, Network};
use crate::train::step::Then;
use crate::zero::{Ranks, Stage};

const MIB: f64 = (1 << 20) as f64;

/// Trains `steps` steps of one row a rank on `latent` x `latent` latents with recompute, fp32, AdamW, and prints per
/// rank what parameters, gradients and moments took: owned, and at most.
pub fn memory(rank: &Rank, stage: Stage, latent: usize, steps: u64) -> Result<()> {
    let comm = rank.communicator.clone();
    let ranks = Ranks { comm: comm.clone(), stage, reduce_dtype: DType::F32 };
    let (config, Denoiser { graph, slots }) = shape::sd15();
    let parameters = graph.parameters();
    let mut sizes: Vec<usize> = graph.nodes.iter().map(|n| n.params.layout().padded_len(comm.world_size())).collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let build = Build::on_device(&ranks, DType::F32, Keep::Inputs, &graph)?;
    let states = build.tiers.device.clone();
    let mut network = Network::load(graph, build, &shape::Made)?;
    let owned = states.usage().map(|usage| usage.used as f64);
    let mut seconds = 0.0;
    for step in 1..=steps {
        let started = Instant::now();
        let inputs = shape::unet_inputs(&config, &slots, latent, comm.rank() as u64)?;
        let rows = comm.world_size() as f64;
        network.forward_backward(Some(inputs), Then::Norm, |prediction| {
            Ok((prediction / (prediction.elem_count() as f64 * rows))?)
        })?;
        let norm = network.reduce()?;
        network.update(step, crate::train::step::clip_factor(norm, 1.0), |_| shape::group())?;
        // The last step's: the first one also touches every page for the first time.
        seconds = started.elapsed().as_secs_f64();
    }
    let peaks = states.usage().map(|usage| usage.peak as f64);
    let mine = [owned[0], owned[1], owned[2], peaks[0], peaks[1], peaks[2], peak_rss_bytes() as f64, seconds];
    let mut all = vec![0f64; mine.len() * comm.world_size()];
    comm.all_gather(Slice::F64(&mine), SliceMut::F64(&mut all))?;
    if comm.rank() == 0 {
        let two_segments = 4 * (sizes[0] + sizes[1]);
        print(parameters, stage, latent, two_segments as f64, &all.chunks_exact(mine.len()).collect::<Vec<_>>());
    }
    Ok(())
}

fn print(parameters: usize, stage: Stage, latent: usize, two_segments: f64, ranks: &[&[f64]]) {
    println!(
        "SD 1.5's UNet, {parameters} parameters, fp32, AdamW, recompute, {latent}x{latent} latents, stage {}, {} ranks (MiB)",
        stage as u8,
        ranks.len()
    );
    println!(
        "rank  parameters  gradients  optimizer | above: parameters  gradients | two segments | peak rss  rss - arenas  s, last step"
    );
    for (rank, r) in ranks.iter().enumerate() {
        let mib = |bytes: f64| bytes / MIB;
        println!(
            "{rank:4}  {:10.1}  {:9.1}  {:9.1} | {:17.1}  {:9.1} | {:12.1} | {:8.1}  {:12.1}  {:12.2}",
            mib(r[0]),
            mib(r[1]),
            mib(r[2]),
            mib(r[3] - r[0]),
            mib(r[4] - r[1]),
            mib(two_segments),
            mib(r[6]),
            mib(r[6] - r[3] - r[4] - r[5]),
            r[7]
        );
    }
    let rows: Vec<_> =
        ranks.iter().map(|r| json!({"owned": r[..3], "peak": r[3..6], "peak_rss": r[6], "seconds": r[7]})).collect();
    println!(
        "{}",
        json!({"stage": stage as u8, "ranks": ranks.len(), "latent": latent, "parameters": parameters, "rows": rows})
    );
}

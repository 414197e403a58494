//! One rank's part of `dblaunch sample`.

use std::fs;

use anyhow::{Context, Result};
use candle_core::DType;

use super::counted;
use super::latents;
use super::output;
use super::plan::Plan;
use crate::comm::{Communicator, CommunicatorExt, SliceMut, each_its_own};
use crate::config::DeviceKind;
use crate::device::{Compute, Hardware};
use crate::launch::{Event, Rank, shares_gpu};
use crate::model;
use crate::pipeline::{Frozen, Prompts};
use crate::sample::{Decoder, Ending, Noise, Request, Sampling};
use crate::train::fresh_seed;
use crate::zero::{ParamStore, Ranks, Tiers};

/// Makes this rank's share of the pictures. A collective, like everything in it.
pub fn run(plan: &Plan, rank: &Rank) -> Result<Ending> {
    let comm = &*rank.communicator;
    let seed = agree_on_seed(plan.seed, comm)?;
    let made = match comm.rank() {
        0 => fs::create_dir_all(&plan.out).with_context(|| format!("creating {}", plan.out.display())),
        _ => Ok(()),
    };
    comm.agree(made)?;
    let opened = &plan.opened;
    let hardware = comm.agree(match plan.device {
        DeviceKind::Cpu => Ok(Hardware::cpu()),
        DeviceKind::Cuda => Hardware::gpu(rank.world.local_rank, None, 0),
    })?;
    if !shares_gpu() {
        each_its_own(comm, hardware.identity())?;
    }
    let compute = Compute { device: hardware.device().clone(), dtype: plan.dtype };
    let prompts = encode(plan, &hardware, &compute)?;
    let denoiser = model::denoiser(&opened.configs.unet, None, false, compute.dtype);
    let ranks = Ranks { comm: rank.communicator.clone(), stage: plan.stage, reduce_dtype: DType::F32 };
    let segments = denoiser.graph.nodes.iter().map(|n| (&n.params, None));
    let tiers = Tiers::on(&hardware)?;
    let store = ParamStore::load(&ranks, compute.dtype, &tiers, segments, &opened.weights)?;
    let mut decoder = Decoder::load(&opened.configs.vae, &opened.weights.pipeline, &compute, tiers, plan.tiling)?;
    let noise = match &plan.given {
        Some(given) => Noise::Given(given.clone()),
        None => Noise::from_seed(seed),
    };
    let request =
        Request { pictures: &plan.prompts.pictures, prompts: &prompts, settings: plan.settings, noise: &noise };
    let sampling = Sampling {
        graph: &denoiser.graph,
        store: &store,
        slots: denoiser.slots,
        unet: &opened.configs.unet,
        compute: &compute,
        scheduler: &opened.scheduler,
        rank,
    };
    let mut kept: Vec<(usize, Vec<f32>)> = Vec::new();
    let ending = sampling.pictures(&request, &mut decoder, |made| {
        let text = output::parameters(plan, &made.picture, seed);
        crate::sample::write_png(&output::file(&plan.out, &made.picture), &made.image, Some(&text))?;
        if plan.save_latents {
            kept.push((made.index, made.latents));
        }
        Ok(())
    })?;
    if ending == Ending::Done {
        finish(plan, comm, &kept)?;
        let (pictures, out) = (counted(plan.prompts.pictures.len(), "picture"), plan.out.display());
        let seed = if plan.given.is_some() { String::new() } else { format!(" (seed {seed})") };
        rank.say(&format!("{pictures} in {out}{seed}"));
        rank.events.send(&Event::Done);
    }
    Ok(ending)
}

/// The command line's seed, else one that rank 0 draws; the same on all ranks. A collective.
fn agree_on_seed(asked: Option<u64>, comm: &dyn Communicator) -> Result<u64> {
    let mut bytes = asked.unwrap_or_else(fresh_seed).to_le_bytes();
    comm.broadcast(SliceMut::U8(&mut bytes), 0)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The prompts as a text encoder in fp32 has them; it is dropped afterwards unless there are very many.
fn encode(plan: &Plan, hardware: &Hardware, compute: &Compute) -> Result<Prompts> {
    let opened = &plan.opened;
    let encoder = model::text_encoder(&opened.configs.text, false, DType::F32);
    let frozen = Frozen::load(encoder.graph, DType::F32, &Tiers::on(hardware)?, &opened.weights)?;
    let width = opened.configs.text.hidden_size;
    Prompts::frozen(frozen, encoder.slots, width, plan.tokens.clone(), compute)
}

/// The files that hold all pictures, written by rank 0. A collective.
fn finish(plan: &Plan, comm: &dyn Communicator, kept: &[(usize, Vec<f32>)]) -> Result<()> {
    let mut whole: Vec<f32> = Vec::new();
    let pictures = plan.prompts.pictures.len();
    let shape = [pictures, plan.opened.configs.unet.in_channels, plan.settings.height, plan.settings.width];
    if plan.save_latents {
        let picture = shape[1..].iter().product::<usize>();
        whole.resize(pictures * picture, 0.0);
        let mine = pack(kept);
        for bytes in comm.gather_bytes(&mine)? {
            for one in bytes.chunks_exact(8 + 4 * picture) {
                let (index, values) = one.split_at(8);
                let index = u64::from_le_bytes(index.try_into().context("eight bytes")?) as usize;
                let numbers = values.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x));
                whole[index * picture..][..picture].iter_mut().zip(numbers).for_each(|(to, from)| *to = from);
            }
        }
    }
    let write = || {
        if plan.save_latents {
            latents::write(&plan.out.join(output::LATENTS), &whole, shape)?;
        }
        if plan.grid {
            output::write_grid(&plan.out, &plan.prompts.pictures, plan.prompts.rows)?;
        }
        Ok(())
    };
    let written = if comm.rank() == 0 { write() } else { Ok(()) };
    comm.agree(written)
}

/// Pictures' places and latents as bytes.
fn pack(kept: &[(usize, Vec<f32>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (index, latents) in kept {
        bytes.extend_from_slice(&(*index as u64).to_le_bytes());
        bytes.extend_from_slice(bytemuck::cast_slice(latents));
    }
    bytes
}

//! What a rank holds while it trains SD 1.5's UNet, wherever its states rest: the arenas' own ledger, the activations,
//! and the system's resident size.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::DType;
use serde_json::{Value, json};

use super::shape;
use crate::comm::{CommunicatorExt, GpuCollectives, connect};
use crate::config::DeviceKind;
use crate::device::nvme::wear_note;
use crate::device::{Compute, Hardware, Usage, peak_rss_bytes};
use crate::launch::Rank;
use crate::model::Denoiser;
use crate::segment::Keep;
use crate::track::Profiler;
use crate::train::arrange::{Formats, tiers};
use crate::train::network::{Build, Network};
use crate::train::optimizer::StepScale;
use crate::train::step::{Then, clip_factor};
use crate::zero::{Placement, Ranks, Stage, Tiers};

/// Of a collective between GPUs.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What is measured.
#[derive(Clone, Debug)]
pub struct MemoryCase {
    pub stage: Stage,
    /// Where it computes.
    pub device: DeviceKind,
    /// Whether the text encoder trains, too.
    pub text_encoder: bool,
    /// Bytes of the device's memory that may be used, and of the host's.
    pub limits: [Option<usize>; 2],
    /// Rows of a rank's micro-batch.
    pub batch: usize,
    /// Side of the latents.
    pub latent: usize,
    pub steps: u64,
    /// What segments leave behind on the way forward.
    pub keep: Keep,
    pub placement: Placement,
    pub formats: Formats,
    /// For what rests on a drive.
    pub nvme_dir: Option<PathBuf>,
    /// 0: no clipping, and every segment is updated as soon as its gradients are complete.
    pub max_grad_norm: f64,
    /// A folder for a recording of the steps after the first.
    pub profile: Option<PathBuf>,
}

/// Trains `steps` steps with AdamW, and prints what each rank took at most, and how long. A row for each rank.
pub fn memory(rank: &Rank, case: &MemoryCase) -> Result<Vec<Value>> {
    let hardware = rank.communicator.agree(match case.device {
        DeviceKind::Cpu => Ok(Hardware::cpu()),
        DeviceKind::Cuda => Hardware::gpu(rank.world.local_rank, case.limits[0], 0),
    })?;
    let (comm, note) = connect(rank.communicator.clone(), &hardware, GpuCollectives::Auto, TIMEOUT)?;
    note.iter().for_each(|note| rank.say(note));
    let ranks = Ranks { comm: comm.clone(), stage: case.stage, reduce_dtype: DType::F32 };
    let dtype = case.formats.compute;
    let (config, Denoiser { graph, slots }) = shape::sd15_in(dtype, case.text_encoder);
    let parameters = graph.parameters();
    let compute = Compute { device: hardware.device().clone(), dtype };
    let memory = hardware.memory(case.limits[0], case.limits[1]);
    let tiers = tiers(&graph, &ranks, case.placement, case.formats, &memory, case.nvme_dir.as_deref());
    let tiers = comm.agree(tiers)?;
    let keep = vec![case.keep; graph.nodes.len()];
    let build = Build { ranks, dtype, keep, tiers: tiers.clone(), state: case.formats.state, seed: 0 };
    let mut network = Network::load(graph, build, &shape::Made)?;
    let owned = states(&tiers).map(|usage| usage.used);
    memory.count_from_here();
    let loaded = tiers.drive.as_ref().map_or(0, |drive| drive.traffic().written_bytes);
    let (mut seconds, mut parts) = (Vec::new(), Vec::new());
    let mut profiler = Profiler::new(case.profile.as_ref().and_then(|_| NonZeroU32::new(case.steps as u32 - 1)));
    let group = |_: &str| shape::group();
    for step in 1..=case.steps {
        let recorded = profiler.step(&*comm, step)?;
        let started = Instant::now();
        let inputs = shape::unet_inputs(&config, &slots, &compute, (case.batch, case.latent), comm.rank() as u64)?;
        let ranks = comm.world_size() as f64;
        let then = match case.max_grad_norm > 0.0 {
            true => Then::Norm,
            false => Then::Update(StepScale { step, grad_scale: 1.0 }, &group),
        };
        let mut forward = 0.0;
        network.forward_backward(Some(inputs), then, |prediction| {
            forward = started.elapsed().as_secs_f64();
            Ok((prediction / (prediction.elem_count() as f64 * ranks))?)
        })?;
        let backward = started.elapsed().as_secs_f64() - forward;
        let norm = network.reduce()?;
        if case.max_grad_norm > 0.0 {
            network.update(step, clip_factor(norm, case.max_grad_norm), group)?;
        }
        if step == case.steps {
            network.settle()?;
        }
        // A GPU has been told all of it, and does it still.
        compute.device.synchronize()?;
        drop(recorded);
        // Where states rest off the device the forward waits for the last step's update.
        let all = started.elapsed().as_secs_f64();
        parts.push(json!({"forward": forward, "backward": backward, "update": all - forward - backward}));
        seconds.push(all);
    }
    let held = memory.held();
    let peaks = states(&tiers).map(|usage| usage.peak);
    let row = json!({
        "owned": owned,
        "peak": peaks,
        "activations": held.activations.map(|usage| usage.peak),
        "device": held.device_peak,
        "device_with_gaps": with_gaps(&hardware)?,
        "host": held.host.peak,
        "drive": tiers.drive.as_ref().map(|drive| drive.traffic().written_bytes - loaded),
        "peak_rss": peak_rss_bytes(),
        "seconds": seconds,
        "parts": parts,
        "drive_busy": tiers.drive.as_ref().map(|drive| drive.traffic().busy_seconds),
        "drive_read": tiers.drive.as_ref().map(|drive| drive.traffic().read_bytes),
    });
    let rows = comm.gather_strings(&row.to_string())?;
    let rows = rows.iter().map(|row| serde_json::from_str(row)).collect::<Result<Vec<Value>, _>>()?;
    if comm.rank() == 0 {
        print(parameters, case, &tiers, &rows);
    }
    if let Some(folder) = &case.profile
        && let Some(table) = profiler.finish(&*comm, folder, true)?
    {
        println!("{table}");
    }
    comm.leave()?;
    Ok(rows)
}

/// What a GPU's driver held from the system at most, with what was free and gaps.
#[cfg(feature = "cuda")]
fn with_gaps(hardware: &Hardware) -> Result<Option<usize>> {
    hardware.opened().map(|gpu| Ok(gpu.usage()?.held_peak)).transpose()
}

#[cfg(not(feature = "cuda"))]
fn with_gaps(_hardware: &Hardware) -> Result<Option<usize>> {
    Ok(None)
}

/// Parameters, gradients and optimizer state: on the device, then on the host.
fn states(tiers: &Tiers) -> [Usage; 6] {
    let [[a, b, c], [d, e, f]] = [&tiers.device, &tiers.host].map(|states| states.usage());
    [a, b, c, d, e, f]
}

fn print(parameters: usize, case: &MemoryCase, tiers: &Tiers, rows: &[Value]) {
    let Placement { parameters: p, gradients: g, optimizer: o } = case.placement;
    let Formats { compute, master, gradients, state, .. } = case.formats;
    println!(
        "SD 1.5's UNet{5}, {parameters} parameters, {1:?} kept, batch {2}, {0}x{0} latents, stage {3}, {4} ranks; parameters on {p}, gradients \
         on {g}, optimizer on {o}; compute {compute:?}, masters {master:?}, gradients {gradients:?}, state {state:?}; MB (10^6)",
        case.latent,
        case.keep,
        case.batch,
        case.stage as u8,
        rows.len(),
        if case.text_encoder { " and text encoder" } else { "" }
    );
    println!("rank  tier    parameters  gradients  optimizer  activations     peak | peak rss  s, last step");
    for (rank, row) in rows.iter().enumerate() {
        let mb = |value: &Value| value.as_f64().unwrap_or(0.0) / 1e6;
        let states = |from: usize| [0, 1, 2].map(|i| mb(&row["peak"][from + i]));
        let seconds = row["seconds"].as_array().and_then(|all| all.last()).and_then(Value::as_f64).unwrap_or(0.0);
        for (tier, from, activations) in [("device", 0, mb(&row["activations"])), ("host", 3, 0.0)] {
            let [p, g, o] = states(from);
            print!("{rank:4}  {tier:6}  {p:10.1}  {g:9.1}  {o:9.1}  {activations:11.1}  {:7.1}", mb(&row[tier]));
            match tier {
                "device" => println!(" |"),
                _ => println!(" | {:8.1}  {seconds:12.2}", mb(&row["peak_rss"])),
            }
        }
        if let Some(written) = row["drive"].as_u64() {
            let steps = case.steps;
            println!("{rank:4}  drive   {}", wear_note(written / steps, steps));
        }
    }
    if let Some(drive) = &tiers.drive {
        println!("drive: {:?}", drive.tuning());
    }
    let case = json!({"stage": case.stage as u8, "latent": case.latent, "parameters": parameters, "rows": rows});
    println!("{case}");
}

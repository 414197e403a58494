//! What a rank holds while it trains SD 1.5's UNet, wherever its states rest: the arenas' own ledger, the activations,
//! and the system's resident size.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};
use serde_json::{Value, json};

use super::shape;
use crate::comm::{Communicator, CommunicatorExt, GpuCollectives, connect};
use crate::config::DeviceKind;
use crate::device::nvme::wear_note;
use crate::device::{Compute, Hardware, Usage, on_host, peak_rss_bytes};
use crate::launch::Rank;
use crate::model::Denoiser;
use crate::segment::Keep;
use crate::track::Profiler;
use crate::train::arrange::{Formats, tiers};
use crate::train::network::{Build, Network};
use crate::train::optimizer::StepScale;
use crate::train::step::{Inputs, Then, clip_factor};
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

/// Trains `steps` steps with AdamW, and prints what each rank took at most, and how long. A row for each rank. An error if
/// a loss or a norm is not a finite number, or if a rank beside a GPU took more of the host's memory than it may.
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
    let resident = resident_bytes();
    let tiers = tiers(&graph, &ranks, case.placement, case.formats, &memory, case.nvme_dir.as_deref());
    let tiers = comm.agree(tiers)?;
    let keep = vec![case.keep; graph.nodes.len()];
    let build = Build { ranks, dtype, keep, tiers: tiers.clone(), state: case.formats.state, seed: 0 };
    let mut network = Network::load(graph, build, &shape::Made)?;
    let host = HostMemory { arena_is_resident: resident_bytes() - resident >= memory.held().host.used as i64 / 2 };
    let owned = states(&tiers).map(|usage| usage.used);
    memory.count_from_here();
    let loaded = tiers.drive.as_ref().map_or(0, |drive| drive.traffic().written_bytes);
    let mut profiler = Profiler::new(case.profile.as_ref().and_then(|_| NonZeroU32::new(case.steps as u32 - 1)));
    let inputs = || shape::unet_inputs(&config, &slots, &compute, (case.batch, case.latent), comm.rank() as u64);
    let steps = trained(&mut network, case, &*comm, &compute, inputs, &mut profiler)?;
    let held = memory.held();
    let row = json!({
        "owned": owned,
        "peak": states(&tiers).map(|usage| usage.peak),
        "activations": held.activations.map(|usage| usage.peak),
        "device": held.device_peak,
        "device_with_gaps": with_gaps(&hardware)?,
        "host": held.host.peak,
        "drive": tiers.drive.as_ref().map(|drive| drive.traffic().written_bytes - loaded),
        "peak_rss": peak_rss_bytes(),
        "arena_is_resident": host.arena_is_resident,
        "host_together": host.together(held.host.peak),
        "losses": steps.losses,
        "norms": steps.norms,
        "seconds": steps.seconds,
        "parts": steps.parts,
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
    within(case, &rows)?;
    comm.leave()?;
    Ok(rows)
}

/// What came of steps, and how long they took.
#[derive(Default)]
struct Steps {
    /// Half the mean square of what the network predicts.
    losses: Vec<f64>,
    norms: Vec<f64>,
    seconds: Vec<f64>,
    parts: Vec<Value>,
}

fn trained(
    network: &mut Network,
    case: &MemoryCase,
    comm: &dyn Communicator,
    compute: &Compute,
    inputs: impl Fn() -> Result<Inputs>,
    profiler: &mut Profiler,
) -> Result<Steps> {
    let mut steps = Steps::default();
    let group = |_: &str| shape::group();
    for step in 1..=case.steps {
        let recorded = profiler.step(comm, step)?;
        let started = Instant::now();
        let inputs = inputs()?;
        let ranks = comm.world_size() as f64;
        let then = match case.max_grad_norm > 0.0 {
            true => Then::Norm,
            false => Then::Update(StepScale { step, grad_scale: 1.0 }, &group),
        };
        let (mut forward, mut predicted) = (0.0, None);
        network.forward_backward(Some(inputs), then, |prediction| {
            forward = started.elapsed().as_secs_f64();
            predicted = Some(prediction.detach());
            Ok((prediction / (prediction.elem_count() as f64 * ranks))?)
        })?;
        let backward = started.elapsed().as_secs_f64() - forward;
        // Until here a GPU was only told what to do; the norm is waited for.
        let norm = network.reduce()?;
        let waiting = started.elapsed().as_secs_f64() - forward - backward;
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
        let update = all - forward - backward - waiting;
        steps.parts.push(json!({"forward": forward, "backward": backward, "waiting": waiting, "update": update}));
        steps.seconds.push(all);
        steps.norms.push(norm);
        steps.losses.push(comm.agree(loss(step, predicted.context("nothing was predicted")?))?);
    }
    Ok(steps)
}

/// The network is to predict zeros. (Of gradients that are not finite the norm tells.)
fn loss(step: u64, prediction: Tensor) -> Result<f64> {
    let values = on_host(&prediction)?.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    let squares = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
    let loss = squares / values.len() as f64 / 2.0;
    ensure!(loss.is_finite(), "step {step}: the loss is {loss}");
    Ok(loss)
}

/// What a rank takes of the host's memory: its resident size, and the arena beside it where that is not in it. For
/// drivers differ in whether page-locked memory is counted as the process's own; whether it is shows in how far the
/// resident size has grown when the states have been laid out, which are gigabytes.
struct HostMemory {
    arena_is_resident: bool,
}

impl HostMemory {
    fn together(&self, arena: usize) -> u64 {
        match self.arena_is_resident {
            true => peak_rss_bytes().max(arena as u64),
            false => peak_rss_bytes() + arena as u64,
        }
    }
}

/// The resident size of this process now; 0 where the system does not say.
fn resident_bytes() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok());
    kilobytes.unwrap_or(0) << 10
}

/// An error if a rank beside a GPU took more of the host's memory than the limit of the arena there, all counted. (Beside
/// a CPU what computes is in it, too, for which that limit is not meant.)
fn within(case: &MemoryCase, rows: &[Value]) -> Result<()> {
    let (DeviceKind::Cuda, Some(most)) = (case.device, case.limits[1]) else { return Ok(()) };
    for (rank, row) in rows.iter().enumerate() {
        let took = row["host_together"].as_u64().unwrap_or(u64::MAX);
        ensure!(took <= most as u64, "rank {rank} took {took} bytes of the host's memory, of {most} that it may take");
    }
    Ok(())
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
    if case.device == DeviceKind::Cuda {
        rows.iter().enumerate().for_each(|(rank, row)| print_host(rank, row));
    }
    let case = json!({"stage": case.stage as u8, "latent": case.latent, "parameters": parameters, "rows": rows});
    println!("{case}");
}

/// What the host did and held beside a GPU.
fn print_host(rank: usize, row: &Value) {
    let mb = |key: &str| row[key].as_f64().unwrap_or(0.0) / 1e6;
    let within = if row["arena_is_resident"] == true { "of the resident" } else { "beside the resident" };
    println!(
        "{rank:4}  host    {:.1} in all: {:.1} page-locked {within} {:.1}",
        mb("host_together"),
        mb("host"),
        mb("peak_rss")
    );
    let parts = row["parts"].as_array().map_or(&[][..], Vec::as_slice);
    let typical = |keys: &[&str]| {
        let sum = |part: &Value| keys.iter().filter_map(|key| part[key].as_f64()).sum::<f64>();
        let mut sums: Vec<f64> = parts.iter().skip(1).map(sum).collect();
        sums.sort_unstable_by(f64::total_cmp);
        sums.get(sums.len() / 2).copied().unwrap_or(f64::NAN) * 1e3
    };
    // A GPU that is faster than the host has nothing left to do when it has been told all.
    println!(
        "{rank:4}  host    {:.1} ms to launch forward and backward, then {:.1} ms of waiting for them; the step {:.1} ms",
        typical(&["forward", "backward"]),
        typical(&["waiting"]),
        typical(&["forward", "backward", "waiting", "update"])
    );
}

//! From a plan to a trainer: opens the model, the pictures and the checkpoint, and loads what this rank keeps.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use candle_core::DType;

use super::arrange::{self, Formats};
use super::items::Sampler;
use super::network::{Build, Network};
use super::prompts::Texts;
use super::rows::{RowMaker, RowSettings};
use super::trainer::Trainer;
use super::vae::Encoder;
use super::validation::Validation;
use crate::checkpoint::{self, Checkpoint, Position, SegmentRecord};
use crate::comm::{self, Communicator, CommunicatorExt, SliceMut, Traced};
use crate::config::{DeviceKind, LrKind as PlannedKind, ReduceDtype, Resume, RunPlan, Steps, Toggle};
use crate::data::{Dataset, DatasetOptions};
use crate::device::{Compute, Hardware, Memory, Place};
use crate::diffusion::sampler::SamplerConfig;
use crate::diffusion::{Draws, NoiseSchedule, Record};
use crate::launch::{Event, Rank, shares_gpu};
use crate::model::{self, Component, Denoiser};
use crate::optim::{LossScale, LrKind, LrSchedule, StateKind};
use crate::pipeline::{Configs, PipelineWeights, Prompts};
use crate::plan::Decision;
use crate::sample::Settings;
use crate::track::{Profiler, Trackers};
use crate::zero::{Placement, Ranks, Tiers};

/// Builds a trainer that stands where the run begins or resumes. Collective.
pub fn build<'a>(
    plan: &'a RunPlan,
    decision: Decision,
    model_dir: &Path,
    configs: Configs,
    rank: &'a Rank,
    hardware: &Hardware,
) -> Result<Trainer<'a>> {
    let comm = communicator(plan, &decision, rank, hardware)?;
    let resumed = match resume_folder(plan)? {
        Some(folder) => Some(Checkpoint::open(&folder)?),
        None => None,
    };
    let seed = agree_on_seed(plan.train.seed, resumed.as_ref(), &*comm)?;
    let weights = Arc::new(PipelineWeights::open(model_dir, plan.model.variant.as_deref().unwrap_or(""))?);
    let pictures = decision.prediction.bytes.pictures;
    let options = DatasetOptions { decode_bytes: Some(pictures.decoding), ..plan.dataset_options(false) };
    let dataset = Dataset::open(&options)?;
    let schedule = NoiseSchedule::from_json(&model_dir.join("scheduler").join("scheduler_config.json"))?;
    let limit = |bytes: Option<u64>| bytes.map(|bytes| bytes as usize);
    let memory = hardware.memory(limit(decision.device_limit), limit(decision.host_limit));
    let pictures_room = match pictures.on_host {
        0 => None,
        bytes => Some(memory.host.child("activations").reserved(bytes, "pictures, and latents that are kept")?),
    };
    let frozen = Tiers::within(memory.clone(), Placement::DEVICE, None, None)?;
    let frozen = Tiers { prefetch: plan.zero.prefetch, ..frozen };
    let compute = compute(plan, hardware);

    // First, so that a text encoder that does not train is gone before the network comes.
    let Texts { prompts, numbers, of_validation } =
        Texts::read(plan, dataset.captions(), model_dir, &configs, &weights, &frozen, &compute)?;
    let building = Building { plan, decision: &decision, configs: &configs, weights: &weights, comm: &comm };
    let (network, slots) = building.network(resumed.as_ref(), &compute, seed, &memory)?;
    let validation = validation(plan, model_dir, &configs, of_validation, seed)?;
    let batch_items = plan.train.batch_size.saturating_mul(comm.world_size()) as u64;
    let epoch_items = dataset.len() as u64;
    let replay = match &plan.replay {
        Some(replay) => Some((Record::open(&replay.draws)?, replay.pixels)),
        None => None,
    };
    let steps = match &replay {
        Some((record, _)) => Steps::replayed(record, dataset.len(), &plan.train)?,
        None => Steps::of(dataset.len(), &plan.train, comm.world_size()),
    };
    let total_steps = steps.total as u64;
    let mut position = resumed.as_ref().map_or(Position::default(), |c| c.manifest.position);
    if position.items_in_epoch >= epoch_items {
        // There are fewer images than there were.
        (position.epoch, position.items_in_epoch) = (position.epoch + 1, 0);
    }
    let draws = Draws::new(seed);
    say_where_it_begins(plan, resumed.as_ref(), seed, total_steps, rank);
    let kept_scale = resumed.as_ref().and_then(|c| c.manifest.loss_scale);
    let scaling = plan.train.loss_scale.map(|policy| LossScale::new(policy, kept_scale));
    let rows = RowMaker {
        vae: Encoder::load(&configs.vae, &weights, &frozen, decision.placement.parameters != Place::Device, &compute)?,
        dataset,
        schedule,
        draws,
        prompts: numbers,
        replay,
        settings: RowSettings {
            prior_weight: plan.prior.as_ref().map(|p| p.loss_weight),
            snr_gamma: plan.train.snr_gamma,
            snr_velocity: plan.train.snr_velocity,
            offset_noise: plan.train.offset_noise,
            resolution: plan.data.resolution,
            cache_latents: plan.data.cache_latents != Toggle::Off,
        },
        cached_moments: HashMap::new(),
        _room: pictures_room,
    };
    memory.count_from_here();
    Ok(Trainer {
        plan,
        decision,
        memory,
        rank,
        network,
        slots,
        unet: configs.unet,
        weights,
        compute,
        prompts,
        validation,
        rows,
        sampler: Sampler::new(draws, epoch_items, batch_items),
        trackers: Trackers::closed(),
        profiler: Profiler::default(),
        position,
        total_steps,
        schedule: lr_schedule(plan, total_steps),
        scaling,
        seed,
        comm,
    })
}

/// Where and in what precision the plan computes.
pub(super) fn compute(plan: &RunPlan, hardware: &Hardware) -> Compute {
    Compute { device: hardware.device().clone(), dtype: arrange::compute_dtype(plan) }
}

/// Opens what this rank computes on, with the plan's limit, and sees that no other rank has the same. A collective.
pub(super) fn hardware(plan: &RunPlan, decision: &Decision, rank: &Rank) -> Result<Hardware> {
    let opened = match plan.model.device {
        DeviceKind::Cpu => Ok(Hardware::cpu()),
        DeviceKind::Cuda => {
            let limit = decision.device_limit.map(|bytes| bytes as usize);
            Hardware::gpu(rank.world.local_rank, limit, decision.prediction.bytes.device.room)
        }
    };
    let hardware = rank.communicator.agree(opened)?;
    if plan.train.allow_tf32 {
        hardware.allow_tf32();
    }
    if !shares_gpu() {
        comm::each_its_own(&*rank.communicator, hardware.identity())?;
    }
    Ok(hardware)
}

/// The ranks, and how their GPUs do collectives; a refusal if that leaves too little of a GPU's memory. A collective.
fn communicator(
    plan: &RunPlan,
    decision: &Decision,
    rank: &Rank,
    hardware: &Hardware,
) -> Result<Arc<dyn Communicator>> {
    let timeout = Duration::from_secs_f64(plan.zero.timeout_seconds);
    let (comm, note) = comm::connect(rank.communicator.clone(), hardware, plan.zero.collectives, timeout)?;
    if let Some(note) = note {
        rank.say(&note);
    }
    if comm.world_size() > 1 {
        comm.agree(hardware.has_left(decision.prediction.bytes.device.room, ", connected to the others"))?;
    }
    Ok(Arc::new(Traced::new(comm)))
}

/// Which components train.
pub fn trained(plan: &RunPlan) -> &'static [Component] {
    match plan.model.train_text_encoder {
        true => &[Component::Unet, Component::TextEncoder],
        false => &[Component::Unet],
    }
}

/// The folder to resume from, if any. `latest` with nothing found starts afresh, as in the peers.
fn resume_folder(plan: &RunPlan) -> Result<Option<PathBuf>> {
    match &plan.checkpoint.resume {
        Resume::No => Ok(None),
        Resume::Latest => checkpoint::latest(&plan.output.dir),
        Resume::Folder(folder) => Ok(Some(folder.clone())),
    }
}

/// The configuration's seed, else the checkpoint's, else one that rank 0 draws; the same on all ranks. A collective.
fn agree_on_seed(configured: Option<u64>, resumed: Option<&Checkpoint>, comm: &dyn Communicator) -> Result<u64> {
    let mut bytes = [0u8; 8];
    if comm.rank() == 0 {
        let seed = configured.or(resumed.map(|c| c.manifest.seed)).unwrap_or_else(fresh_seed);
        bytes = seed.to_le_bytes();
    }
    comm.broadcast(SliceMut::U8(&mut bytes), 0)?;
    Ok(u64::from_le_bytes(bytes))
}

/// A seed that nobody chose, small enough for TOML's signed integers.
pub(crate) fn fresh_seed() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    twox_hash::XxHash3_64::oneshot_with_seed(u64::from(std::process::id()), &since.as_nanos().to_le_bytes()) >> 16
}

/// What trains: the UNet, with the text encoder in front of it if that trains, too.
pub fn trained_graph(plan: &RunPlan, configs: &Configs, dtype: DType) -> Denoiser {
    let text = plan.model.train_text_encoder.then_some(&configs.text);
    model::denoiser(&configs.unet, text, plan.data.text_encoder_use_attention_mask, dtype)
}

/// What a network is built from.
struct Building<'a> {
    plan: &'a RunPlan,
    decision: &'a Decision,
    configs: &'a Configs,
    weights: &'a PipelineWeights,
    comm: &'a Arc<dyn Communicator>,
}

impl Building<'_> {
    fn network(
        &self,
        resumed: Option<&Checkpoint>,
        compute: &Compute,
        seed: u64,
        memory: &Memory,
    ) -> Result<(Network, model::DenoiserSlots)> {
        let Building { plan, decision, weights, comm, .. } = self;
        let Denoiser { graph, slots } = trained_graph(plan, self.configs, compute.dtype);
        for &component in trained(plan) {
            let wanted = model::wanted(&graph, component);
            weights.component(component).check(&wanted)?;
        }
        if let Some(checkpoint) = resumed {
            let records = graph.nodes.iter().map(|n| SegmentRecord::new(&n.name, n.params.layout()));
            checkpoint.check(&records.collect::<Vec<_>>())?;
        }
        let reduce_dtype = match plan.zero.reduce_dtype {
            ReduceDtype::F32 => DType::F32,
            ReduceDtype::Bf16 => DType::BF16,
            ReduceDtype::F16 => DType::F16,
        };
        let ranks = Ranks { comm: (*comm).clone(), stage: decision.zero_stage(), reduce_dtype };
        let formats = Formats::of(plan, compute.dtype);
        let folder = plan.zero.nvme_dir.as_deref();
        let tiers = arrange::tiers(&graph, &ranks, decision.placement, formats, memory, folder);
        let tiers = Tiers { prefetch: plan.zero.prefetch, ..comm.agree(tiers)? };
        let keep = decision.keep.clone();
        let build = Build { ranks, dtype: compute.dtype, keep, tiers, state: formats.state, seed };
        let source: &dyn crate::zero::WeightSource = match resumed {
            Some(checkpoint) => checkpoint,
            None => *weights,
        };
        let network = Network::load(graph, build, source)?;
        if let Some(checkpoint) = resumed {
            for i in 0..network.store.len() {
                for record in network.optimizer.records(i) {
                    let layout = *record.layout();
                    record.write(|bytes| checkpoint.read_state(network.store.name(i), &layout, bytes))??;
                }
            }
        }
        Ok((network, slots))
    }
}

/// What validations have in common, where there are any.
fn validation(
    plan: &RunPlan,
    model_dir: &Path,
    configs: &Configs,
    prompts: Option<Prompts>,
    seed: u64,
) -> Result<Option<Validation>> {
    let (Some(asked), Some(prompts)) = (&plan.validation, prompts) else { return Ok(None) };
    let scheduler = SamplerConfig::read(&model_dir.join("scheduler/scheduler_config.json"))?;
    let kind = match asked.sampler {
        Some(kind) => kind,
        None => scheduler.default_kind()?,
    };
    let side = plan.data.resolution;
    let settings = Settings {
        steps: asked.steps,
        guidance_scale: asked.guidance_scale,
        // What fits in training fits here, where nothing is kept for a way back.
        batch_size: plan.train.batch_size,
        ..Settings::of(kind, &configs.unet).with_size(side, side, &configs.vae)?
    };
    let texts = Validation::texts(asked);
    let seed = asked.seed.unwrap_or(seed);
    Ok(Some(Validation { texts, prompts, vae: configs.vae.clone(), scheduler, settings, seed }))
}

/// Tells the user what a resumed run goes on from and what has changed meanwhile.
fn say_where_it_begins(plan: &RunPlan, resumed: Option<&Checkpoint>, seed: u64, total_steps: u64, rank: &Rank) {
    let say = |what: String| rank.events.send(&Event::Message(what));
    let Some(Checkpoint { path, manifest, .. }) = resumed else {
        if plan.checkpoint.resume != Resume::No {
            say(format!("no checkpoint in {} yet: the run begins at the first step", plan.output.dir.display()));
        }
        return;
    };
    let done = manifest.position.step;
    say(format!("going on from {}, after step {done}", path.display()));
    let (was, now) = (manifest.learning_rate, plan.optimizer.learning_rate);
    // Not to the bit: the number has been through a text.
    if (was - now).abs() > 1e-12 * was.abs() {
        say(format!("optimizer.learning_rate is {now:e} from here on; it was {was:e}"));
    }
    let (was, now) = (manifest.state.kind(), Formats::of(plan, arrange::compute_dtype(plan)).state);
    if was != now {
        let bits = |kind| if kind == StateKind::Bits8 { "8 bits" } else { "32 bits" };
        say(format!(
            "the optimizer's moments are converted: they were kept in {}, and are now in {}",
            bits(was),
            bits(now)
        ));
    }
    if seed != manifest.seed {
        say(format!("train.seed is {seed} from here on; it was {}", manifest.seed));
    }
    if done >= total_steps {
        say(format!("all {total_steps} steps are done: only the pipeline is written"));
    }
}

fn lr_schedule(plan: &RunPlan, total_steps: u64) -> LrSchedule {
    let kind = match plan.lr_schedule.kind {
        PlannedKind::Constant => LrKind::Constant,
        PlannedKind::ConstantWithWarmup => LrKind::ConstantWithWarmup,
        PlannedKind::Linear => LrKind::Linear,
        PlannedKind::Cosine => LrKind::Cosine,
        PlannedKind::CosineWithRestarts => LrKind::CosineWithRestarts { cycles: plan.lr_schedule.cycles as u64 },
        PlannedKind::Polynomial => LrKind::Polynomial { power: plan.lr_schedule.power },
    };
    let warmup_steps = plan.lr_schedule.warmup_steps as u64;
    LrSchedule { kind, warmup_steps, total_steps, base_rate: plan.optimizer.learning_rate }
}

//! The run: optimizer steps until the last one, with their metrics, checkpoints and the ways a run can end early.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor};

use super::items::{Items, Sampler};
use super::loss::Loss;
use super::network::Network;
use super::optimizer::StepScale;
use super::rows::{PixelDifference, RowMaker, Rows};
use super::samples::Samples;
use super::scaling::Overflowed;
use super::step::{Group, Inputs, Then, clip_factor};
use super::validation::Validation;
use crate::checkpoint::{self, Position};
use crate::comm::{Communicator, CommunicatorExt, Slice, SliceMut};
use crate::config::{Resume, RunPlan};
use crate::device::{Compute, Memory, peak_rss_bytes};
use crate::launch::{Event, Rank};
use crate::model::{DenoiserSlots, UnetConfig, time_features};
use crate::optim::{AdamW, LossScale, LrSchedule};
use crate::pipeline::{PipelineWeights, Prompts};
use crate::plan::{Compared, Decision};
use crate::sample;
use crate::track::{Kept, MicroRow, Profiler, StepRow, Trackers};
use crate::zero::{Partition, Placement};

/// How a run ended, errors aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Done,
    /// The user asked for it; a checkpoint was written if the configuration says so.
    Interrupted,
}

/// A run in progress on this rank.
pub struct Trainer<'a> {
    pub plan: &'a RunPlan,
    /// Stage, tiers and what segments keep.
    pub decision: Decision,
    pub memory: Memory,
    pub rank: &'a Rank,
    pub comm: Arc<dyn Communicator>,
    pub network: Network,
    pub slots: DenoiserSlots,
    pub unet: UnetConfig,
    pub weights: Arc<PipelineWeights>,
    pub compute: Compute,
    pub prompts: Prompts,
    pub validation: Option<Validation>,
    pub rows: RowMaker,
    pub sampler: Sampler,
    pub trackers: Trackers,
    pub profiler: Profiler,
    pub position: Position,
    pub total_steps: u64,
    pub schedule: LrSchedule,
    /// Under fp16.
    pub scaling: Option<LossScale>,
    pub seed: u64,
}

/// What the ranks tell each other after a micro-batch.
struct MicroReport {
    loss: f64,
    pixels: PixelDifference,
}

impl Trainer<'_> {
    /// Opens the trackers on rank 0, once the output folder is there.
    pub fn begin(&mut self) -> Result<()> {
        let Position { step, micro_step, .. } = self.position;
        let kept = if self.goes_on_here() { Kept { step, micro_step } } else { Kept::default() };
        if self.comm.rank() == 0 {
            Samples::of(&self.plan.output.dir).begin((kept.step > 0).then_some(kept.step))?;
        }
        let output = &self.plan.output;
        self.trackers = Trackers::open(&output.dir, &output.trackers, kept, self.comm.rank() == 0)?;
        self.trackers.config(&self.resolved_config()?)
    }

    /// The configuration with everything that was left to the run, as TOML.
    pub fn resolved_config(&self) -> Result<String> {
        let mut resolved = self.plan.clone();
        resolved.train.seed = Some(self.seed);
        resolved.zero.stage = Some(self.decision.stage);
        let Placement { parameters, gradients, optimizer } = self.decision.placement;
        resolved.zero.offload_params = Some(parameters);
        resolved.zero.offload_gradients = Some(gradients);
        resolved.zero.offload_optimizer = Some(optimizer);
        resolved.to_toml()
    }

    /// Says what memory was planned and what it came to, and writes both to `memory.json`. A collective.
    pub fn report_memory(&self) -> Result<()> {
        let mine = self.decision.compare(&self.memory.held(), self.comm.rank());
        let everyone = self.comm.gather_strings(&serde_json::to_string(&mine)?)?;
        if self.comm.rank() > 0 {
            return Ok(());
        }
        let ranks =
            everyone.iter().map(|text| serde_json::from_str(text)).collect::<Result<Vec<Vec<Compared>>, _>>()?;
        // Ranks differ by a row or two; the fullest one is told of.
        let fullest = ranks.iter().max_by_key(|rank| rank.iter().map(|c| c.measured).max());
        if let Some(rank) = fullest {
            self.rank.events.send(&Event::Message(Decision::sentence(rank)));
        }
        let path = self.plan.output.dir.join("memory.json");
        let text = serde_json::to_string_pretty(&serde_json::json!({ "decision": self.decision, "ranks": ranks }))?;
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// Whether the rows that are there are this run's: where it goes on from a checkpoint beside them.
    fn goes_on_here(&self) -> bool {
        let Resume::Folder(folder) = &self.plan.checkpoint.resume else { return true };
        let beside = folder.join("..").canonicalize();
        beside.is_ok_and(|beside| self.plan.output.dir.canonicalize().is_ok_and(|own| own == beside))
    }

    /// Trains to the last step, or until the user interrupts.
    pub fn train(&mut self) -> Result<Ending> {
        let ending = self.steps()?;
        self.profile(true)?;
        if let Some(state) = self.scaling.as_ref().map(LossScale::state).filter(|state| state.skipped > 0) {
            let (skipped, scale) = (state.skipped, state.scale);
            let said =
                format!("attempts at steps skipped because fp16 overflowed: {skipped}; the loss scale is {scale}");
            self.rank.events.send(&Event::Message(said));
        }
        Ok(ending)
    }

    fn steps(&mut self) -> Result<Ending> {
        if self.validate()? == sample::Ending::Interrupted {
            return Ok(Ending::Interrupted);
        }
        while self.position.step < self.total_steps {
            let number = self.position.step + 1;
            let span = self.profiler.step(&*self.comm, number)?;
            self.step().with_context(|| format!("step {number}"))?;
            drop(span);
            self.profile(false)?;
            if self.anyone_interrupted()? {
                if self.plan.checkpoint.on_interrupt {
                    self.save()?;
                }
                return Ok(Ending::Interrupted);
            }
            if self.position.step < number {
                // Skipped: nothing is due that was not before.
                continue;
            }
            let every = self.plan.checkpoint.every.map_or(0, |n| n as u64);
            let saves = every > 0 && self.position.step.is_multiple_of(every);
            if saves {
                self.save()?;
            }
            if self.validate()? == sample::Ending::Interrupted {
                if self.plan.checkpoint.on_interrupt && !saves {
                    self.save()?;
                }
                return Ok(Ending::Interrupted);
            }
        }
        Ok(Ending::Done)
    }

    /// One optimizer step: micro-batches until enough are accumulated or the epoch ends, then the update; or an attempt at
    /// one, which leaves `position.step` as it is, where fp16 overflowed.
    fn step(&mut self) -> Result<()> {
        let started = Instant::now();
        let (mut losses, mut images) = (0.0, 0usize);
        let accumulation = self.plan.train.accumulation;
        let rate = self.rate();
        let mut micro_batches = 0;
        let step = self.position.step + 1;
        let factor = self.schedule.factor(self.position.step);
        let optimizer = self.plan.optimizer.clone();
        let group = |segment: &str| group(&optimizer, segment, factor);
        let at_once = self.updates_at_once();
        let mut overflowed = None;
        loop {
            let micro_step = self.position.micro_step;
            let record = self.rows.replay.as_ref().map(|(record, _)| record);
            let items = self.sampler.next(&mut self.position, record)?;
            let last = micro_batches + 1 == accumulation || items.ends_epoch;
            let then = match (last, at_once) {
                (false, _) => Then::Accumulate,
                (true, false) => Then::Norm,
                (true, true) => Then::Update(StepScale { step, grad_scale: 1.0 }, &group),
            };
            let report = self.micro_batch(&items, micro_step, then)?;
            self.trackers.micro_step(&self.micro_row(micro_step, &report, rate))?;
            losses += report.loss;
            images += items.items.len() * if self.rows.settings.prior_weight.is_some() { 2 } else { 1 };
            micro_batches += 1;
            if !report.loss.is_finite() && overflowed.is_none() {
                overflowed = Some(Overflowed { items, micro_step });
            }
            if last {
                break;
            }
        }
        let scale = self.loss_scale();
        let norm = self.norm(overflowed)?;
        if let Some(norm) = norm {
            if !at_once {
                self.save_first_gradients(scale)?;
                let clip = clip_factor(norm, self.plan.train.max_grad_norm.unwrap_or(0.0));
                self.network.update(step, clip / scale as f32, group)?;
            }
            self.position.step = step;
        }
        let seconds = started.elapsed().as_secs_f64();
        let row = StepRow {
            step,
            loss: losses / micro_batches as f64,
            grad_norm: norm.unwrap_or(f64::INFINITY),
            lr: rate,
            seconds,
            images_per_second: images as f64 / seconds,
            peak_vram_bytes: self.memory.held().device_peak as u64,
            peak_rss_bytes: peak_rss_bytes(),
            skipped: norm.is_none(),
            loss_scale: self.scaling.is_some().then_some(scale),
        };
        self.trackers.step(&row)?;
        self.rank.events.send(&Event::Step {
            step: self.position.step,
            total: self.total_steps,
            loss: row.loss,
            lr: row.lr,
            images_per_second: row.images_per_second,
            skipped: row.skipped,
        });
        Ok(())
    }

    /// Whether the coming step's update depends on nothing that only the whole backward tells.
    fn updates_at_once(&self) -> bool {
        let saves_gradients =
            self.position.step == 0 && self.plan.replay.as_ref().is_some_and(|r| r.save_gradients.is_some());
        self.plan.train.max_grad_norm.is_none() && self.compute.dtype != DType::F16 && !saves_gradients
    }

    /// Writes the profile where one was asked for and is complete, or the run is at its `end`, and shows its table.
    fn profile(&mut self, end: bool) -> Result<()> {
        if let Some(table) = self.profiler.finish(&*self.comm, &self.plan.output.dir, end)? {
            self.rank.say(&table);
        }
        Ok(())
    }

    /// The rate of the coming step, of the UNet's group.
    fn rate(&self) -> f64 {
        self.plan.optimizer.learning_rate * self.schedule.factor(self.position.step)
    }

    fn micro_row(&self, micro_step: u64, report: &MicroReport, lr: f64) -> MicroRow {
        let compared = report.pixels.count > 0.0;
        MicroRow {
            micro_step,
            step: self.position.step + 1,
            loss: report.loss,
            lr,
            pixels_max_levels: compared.then_some(report.pixels.max),
            pixels_mean_levels: compared.then_some(report.pixels.sum / report.pixels.count),
        }
    }

    /// Forward and backward of one micro-batch: this rank's rows here, the others' there.
    fn micro_batch(&mut self, items: &Items, micro_step: u64, then: Then) -> Result<MicroReport> {
        let partition = Partition::new(self.comm.rank(), self.comm.world_size());
        let local = partition.items(items.items.len());
        if local.is_empty() {
            self.network.forward_backward(None, then, |_| bail!("a rank without rows has no loss"))?;
            return self.agree(0.0, PixelDifference::default(), String::new());
        }
        let rows = self.rows.rows(&items.items, local, micro_step)?;
        let inputs = self.inputs(&rows)?;
        let scale = self.loss_scale() as f32;
        let mut loss = Loss::new(&rows, self.plan.train.accumulation, scale, &self.compute.device)?;
        self.network.forward_backward(Some(inputs), then, |prediction| loss.gradient(prediction))?;
        let (loss, trouble) = loss.value()?;
        self.agree(loss, rows.pixels, trouble)
    }

    /// The graph's inputs for these rows.
    pub(super) fn inputs(&self, rows: &Rows) -> Result<Inputs> {
        let (channels, h, w) = rows.latent;
        let features = time_features(rows.timesteps.iter().map(|&t| t as f32), &self.unet);
        let width = features.len() / rows.len();
        let tensor = |values: Vec<f32>, shape: &[usize]| -> Result<Tensor> {
            Ok(Tensor::from_vec(values, shape, &self.compute.device)?.to_dtype(self.compute.dtype)?)
        };
        let mut slots = vec![
            (self.slots.sample, tensor(rows.sample.clone(), &[rows.len(), channels, h, w])?),
            (self.slots.time_features, tensor(features, &[rows.len(), width])?),
        ];
        slots.extend(self.prompts.slots(&self.slots.conditioning, &rows.prompts, &self.compute.device)?);
        Ok(Inputs { slots, prediction: self.slots.prediction })
    }

    /// Adds up the ranks' losses; stops all of them, saying where, if the sum is not finite (but under fp16). A collective.
    fn agree(&self, loss: f64, pixels: PixelDifference, trouble: String) -> Result<MicroReport> {
        let mine = [loss, pixels.max, pixels.sum, pixels.count];
        let mut all = vec![0f64; mine.len() * self.comm.world_size()];
        self.comm.all_gather(Slice::F64(&mine), SliceMut::F64(&mut all))?;
        let mut report = MicroReport { loss: 0.0, pixels: PixelDifference::default() };
        for rank in all.chunks_exact(mine.len()) {
            report.loss += rank[0];
            report.pixels.max = report.pixels.max.max(rank[1]);
            report.pixels.sum += rank[2];
            report.pixels.count += rank[3];
        }
        if report.loss.is_finite() || self.scaling.is_some() {
            return Ok(report);
        }
        let everyone = self.comm.gather_strings(&trouble)?;
        let rows = everyone.into_iter().filter(|rows| !rows.is_empty()).collect::<Vec<_>>().join(", ");
        bail!(
            "the loss of micro-batch {} is {}: {rows}. Lower optimizer.learning_rate, add warm-up \
             (lr_schedule.warmup_steps), or look at these images; {}",
            self.position.micro_step - 1,
            report.loss,
            match checkpoint::latest(&self.plan.output.dir)? {
                Some(path) => format!("{} is from before this step", path.display()),
                None => "there is no checkpoint from before this step".to_string(),
            }
        );
    }

    /// Whether any rank was told to stop; a collective.
    fn anyone_interrupted(&self) -> Result<bool> {
        self.comm.any(self.rank.interrupt.interrupted())
    }

    /// `replay.save_gradients`: the reduced gradients of the first step, before clipping and without the loss scale. A
    /// collective.
    fn save_first_gradients(&self, scale: f64) -> Result<()> {
        let path = self.plan.replay.as_ref().and_then(|r| r.save_gradients.as_ref());
        match path {
            Some(path) if self.position.step == 0 => {
                super::export::save_gradients(&self.network, scale, &self.weights, &*self.comm, path)
            }
            _ => Ok(()),
        }
    }

    /// Writes `checkpoint-N/`; a collective.
    fn save(&self) -> Result<()> {
        let path = checkpoint::save(
            &*self.comm,
            &checkpoint::Saving {
                output_dir: &self.plan.output.dir,
                store: &self.network.store,
                optimizer: &self.network.optimizer,
                position: self.position,
                seed: self.seed,
                stage: self.decision.stage,
                learning_rate: self.plan.optimizer.learning_rate,
                loss_scale: self.scaling.as_ref().map(LossScale::state),
                keep: self.plan.checkpoint.keep,
            },
        )
        .with_context(|| format!("writing the checkpoint of step {}", self.position.step))?;
        self.rank.events.send(&Event::CheckpointWritten { step: self.position.step, path });
        Ok(())
    }
}

/// How a segment is updated: the text encoder has its own rate and decay.
fn group(plan: &crate::config::OptimizerPlan, segment: &str, factor: f64) -> Group {
    let (rate, weight_decay) = match segment.starts_with("text_encoder.") {
        true => (plan.text_encoder_learning_rate, plan.text_encoder_weight_decay),
        false => (plan.learning_rate, plan.weight_decay),
    };
    let adamw = AdamW { beta1: plan.beta1, beta2: plan.beta2, epsilon: plan.epsilon, weight_decay };
    Group { adamw, rate: rate * factor }
}

//! A rank's whole run: set up, train, leave the trained pipeline behind.

use std::fs;
use std::num::NonZeroU32;
use std::path::Path;

use anyhow::{Context, Result};
use bytesize::ByteSize;

use super::class_images;
use super::export::{self, Export};
use super::setup;
use super::trainer::{Ending, Trainer};
use crate::checkpoint;
use crate::comm::{CommunicatorExt, SliceMut};
use crate::config::RunPlan;
use crate::device::Place;
use crate::device::nvme::wear_note;
use crate::launch::{Event, Rank, report_failure};
use crate::pipeline::Configs;
use crate::plan::command::decide;
use crate::sample;
use crate::track::Profiler;

/// Trains as `plan` says, from the model in `model_dir`. A collective, like everything in it. Nothing is written before
/// all that can be refused was looked at. `profile`: steps to record, for `profile.json`.
pub fn run(plan: &RunPlan, model_dir: &Path, rank: &Rank, profile: Option<NonZeroU32>) -> Result<Ending> {
    let configs = Configs::read(model_dir)?;
    let decision = decide(plan, model_dir, &configs, &*rank.communicator)?;
    let hardware = setup::hardware(plan, &decision, rank)?;
    if class_images::complete(plan, &decision, model_dir, rank, &hardware)? == sample::Ending::Interrupted {
        return Ok(Ending::Interrupted);
    }
    let mut trainer = setup::build(plan, decision, model_dir, configs, rank, &hardware)?;
    let ended = lead(&mut trainer, plan, model_dir, profile);
    if let Err(error) = &ended {
        // Before memory and device are given back, which takes time, and may fail, too, if the device has.
        report_failure(error);
    }
    ended
}

/// From the first step, or where the run goes on, to the pipeline.
fn lead(trainer: &mut Trainer, plan: &RunPlan, model_dir: &Path, profile: Option<NonZeroU32>) -> Result<Ending> {
    trainer.profiler = Profiler::new(profile);
    let _held = trainer.comm.agree(prepare_output(trainer))?;
    let begun = trainer.begin();
    trainer.comm.agree(begun)?;
    let start = Event::Start { total_steps: trainer.total_steps, done_steps: trainer.position.step };
    trainer.rank.events.send(&start);
    say_where_state_rests(trainer);
    let before = Written::of(trainer);
    let ending = trainer.train()?;
    say_what_was_written(trainer, before)?;
    if ending == Ending::Done {
        let export = Export {
            model_dir,
            variant: plan.model.variant.as_deref().unwrap_or(""),
            trained: setup::trained(plan),
            output: &plan.output,
        };
        export::export(&trainer.network, &trainer.weights, &*trainer.comm, &export).context("writing the pipeline")?;
        trainer.report_memory()?;
        trainer.rank.events.send(&Event::Done);
    }
    trainer.comm.leave()?;
    Ok(ending)
}

/// Rank 0's file on the drive, if there is one.
fn say_where_state_rests(trainer: &Trainer) {
    let tiers = trainer.network.store.tiers();
    let Some(drive) = &tiers.drive else { return };
    let what = match (tiers.placement.parameters, tiers.placement.optimizer) {
        (Place::Nvme, Place::Nvme) => "parameters and optimizer state rest",
        (Place::Nvme, _) => "parameters rest",
        _ => "optimizer state rests",
    };
    let ranks = match trainer.comm.world_size() {
        1 => "",
        _ => ", and the other ranks' beside it",
    };
    let size = ByteSize(drive.bytes()).display().iec();
    trainer.rank.say(&format!("{what} in {}{ranks}: {size}, {}", drive.path().display(), drive.tuning()));
}

/// What all ranks have written to their state files before some step.
#[derive(Clone, Copy)]
struct Written {
    step: u64,
    bytes: u64,
}

impl Written {
    /// This rank's alone.
    fn of(trainer: &Trainer) -> Written {
        let drive = trainer.network.store.tiers().drive.as_ref();
        Written { step: trainer.position.step, bytes: drive.map_or(0, |drive| drive.traffic().written_bytes) }
    }
}

/// What the steps since `before` have written on all ranks, and what that does to the drive. A collective.
fn say_what_was_written(trainer: &Trainer, before: Written) -> Result<()> {
    if trainer.network.store.tiers().drive.is_none() {
        return Ok(());
    }
    // The last update may still be on its way.
    trainer.comm.agree(trainer.network.settle())?;
    let after = Written::of(trainer);
    let mut bytes = [(after.bytes - before.bytes) as f64];
    trainer.comm.all_reduce(SliceMut::F64(&mut bytes))?;
    let steps = after.step - before.step;
    if steps > 0 {
        trainer.rank.say(&wear_note((bytes[0] / steps as f64) as u64, steps));
    }
    Ok(())
}

/// Rank 0 makes the output folder and takes it for this run, clears what another run left if this one starts afresh (the
/// configuration allowed it), and records the resolved configuration. The folder is this run's as long as what is given back
/// lives.
fn prepare_output(trainer: &Trainer) -> Result<Option<fs::File>> {
    if trainer.comm.rank() > 0 {
        return Ok(None);
    }
    let dir = &trainer.plan.output.dir;
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let held = checkpoint::hold(dir)?;
    let step = trainer.position.step;
    for path in checkpoint::clear_leftovers(dir, step)? {
        let what = match step {
            0 => format!("removed {}, of the run that was here", path.display()),
            _ => format!("removed {}: the run goes on from step {step}", path.display()),
        };
        trainer.rank.events.send(&Event::Message(what));
    }
    let index = dir.join("model_index.json");
    if step == 0 && index.exists() {
        // What is left of the other run's pipeline is none without its index.
        fs::remove_file(&index).with_context(|| format!("removing {}", index.display()))?;
    }
    let path = dir.join("config.toml");
    fs::write(&path, trainer.resolved_config()?).with_context(|| format!("writing {}", path.display()))?;
    Ok(held)
}

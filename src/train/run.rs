//! A rank's whole run: set up, train, leave the trained pipeline behind.

use std::fs;
use std::num::NonZeroU32;
use std::path::Path;

use anyhow::{Context, Result};

use super::class_images;
use super::export::{self, Export};
use super::setup;
use super::trainer::{Ending, Trainer};
use crate::checkpoint;
use crate::comm::CommunicatorExt;
use crate::config::RunPlan;
use crate::launch::{Event, Rank};
use crate::pipeline::Configs;
use crate::plan::command::decide;
use crate::sample;
use crate::track::Profiler;

/// Trains as `plan` says, from the model in `model_dir`. A collective, like everything in it. Nothing is written before
/// all that can be refused was looked at. `profile`: steps to record, for `profile.json`.
pub fn run(plan: &RunPlan, model_dir: &Path, rank: &Rank, profile: Option<NonZeroU32>) -> Result<Ending> {
    let configs = Configs::read(model_dir)?;
    let decision = decide(plan, model_dir, &configs, &*rank.communicator)?;
    if class_images::complete(plan, &decision, model_dir, rank)? == sample::Ending::Interrupted {
        return Ok(Ending::Interrupted);
    }
    let mut trainer = setup::build(plan, decision, model_dir, configs, rank)?;
    trainer.profiler = Profiler::new(profile);
    trainer.comm.agree(prepare_output(&trainer))?;
    let begun = trainer.begin();
    trainer.comm.agree(begun)?;
    let start = Event::Start { total_steps: trainer.total_steps, done_steps: trainer.position.step };
    rank.events.send(&start);
    let ending = trainer.train()?;
    if ending == Ending::Done {
        let export = Export {
            model_dir,
            variant: plan.model.variant.as_deref().unwrap_or(""),
            trained: setup::trained(plan),
            output: &plan.output,
        };
        export::export(&trainer.network, &trainer.weights, &*trainer.comm, &export).context("writing the pipeline")?;
        trainer.report_memory()?;
        rank.events.send(&Event::Done);
    }
    Ok(ending)
}

/// Rank 0 makes the output folder, clears what another run left if this one starts afresh (the configuration allowed
/// it), and records the resolved configuration.
fn prepare_output(trainer: &Trainer) -> Result<()> {
    if trainer.comm.rank() > 0 {
        return Ok(());
    }
    let dir = &trainer.plan.output.dir;
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
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
    fs::write(&path, trainer.resolved_config()?).with_context(|| format!("writing {}", path.display()))
}

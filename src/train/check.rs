//! The whole check of a request: the configuration's own, then what only the model's and the pictures' readers can tell.

use std::path::Path;

use anyhow::Result;

use super::setup::{self, Configs};
use super::weights::PipelineWeights;
use crate::Refusal;
use crate::checkpoint::{Checkpoint, SegmentRecord};
use crate::config::{self, Report, RunPlan};
use crate::data::Dataset;
use crate::diffusion::{NoiseSchedule, Record};
use crate::model::{self, Component, PipelineExport};

/// Everything that can be wrong with the request, found before anything is started or written, all at once. Ok is what
/// will run.
pub fn check(path: &Path, overrides: &[String], world_size: usize) -> Result<Report> {
    let report = config::check(path, overrides, world_size)?;
    let plan = &report.plan;
    let Some(model_dir) = &report.facts.model_dir else { return Ok(report) };
    let mut problems = Vec::new();
    let mut absorb = |result: Result<()>| -> Result<()> {
        match result.map_err(|error| error.downcast::<Refusal>()) {
            Ok(()) => Ok(()),
            Err(Ok(refusal)) => {
                problems.extend(refusal.problems);
                Ok(())
            }
            Err(Err(error)) => Err(error),
        }
    };
    absorb(model(plan, model_dir))?;
    absorb(setup::tokens(plan, model_dir).map(drop))?;
    absorb(Dataset::open(&setup::dataset_options(plan, true)).map(drop))?;
    if let Some(replay) = &plan.replay {
        absorb(Record::open(&replay.draws).map(drop))?;
    }
    match problems.is_empty() {
        true => Ok(report),
        false => Err(Refusal { problems }.into()),
    }
}

/// The configurations, the weights against them, the export, and the checkpoint to resume from.
fn model(plan: &RunPlan, model_dir: &Path) -> Result<()> {
    let configs = Configs::read(model_dir)?;
    NoiseSchedule::from_json(&model_dir.join("scheduler").join("scheduler_config.json"))?;
    let variant = plan.model.variant.as_deref().unwrap_or("");
    let weights = PipelineWeights::open(model_dir, variant)?;
    let text = model::text_encoder(&configs.text, false, candle_core::DType::F32);
    let denoiser = model::denoiser(&configs.unet, None, false, candle_core::DType::F32);
    let vae = model::vae_encoder(&configs.vae);
    let graphs =
        [(Component::TextEncoder, &text.graph), (Component::Unet, &denoiser.graph), (Component::Vae, &vae.graph)];
    let mut problems = Vec::new();
    for (component, graph) in graphs {
        match weights.component(component).check(&model::wanted(graph, component)).map_err(|e| e.downcast::<Refusal>())
        {
            Ok(()) => {}
            Err(Ok(refusal)) => problems.extend(refusal.problems),
            Err(Err(error)) => return Err(error),
        }
    }
    if !problems.is_empty() {
        return Err(Refusal { problems }.into());
    }
    let (trained, skip_text_encoder) = (setup::trained(plan), plan.output.skip_save_text_encoder);
    PipelineExport { model_dir, variant, trained, skip_text_encoder }.check()?;
    if let Some(folder) = setup::resume_folder(plan)? {
        let whole = setup::trained_graph(plan, &configs, candle_core::DType::F32);
        let records = whole.graph.nodes.iter().map(|n| SegmentRecord::new(&n.name, n.params.layout()));
        Checkpoint::open(&folder)?.check(&records.collect::<Vec<_>>())?;
    }
    Ok(())
}

//! Which model: a pipeline's folder, one on the Hub, or a checkpoint together with the model its run began from.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::DType;
use serde_json::Value;

use crate::checkpoint::{self, Checkpoint, SegmentRecord};
use crate::config::{self, ModelSource};
use crate::data::ClipTokenizer;
use crate::diffusion::sampler::SamplerConfig;
use crate::model::{self, Component};
use crate::pipeline::{Configs, PipelineWeights};
use crate::sample::check_weights;
use crate::zero::WeightSource;
use crate::{Refusal, hub, input_file};

/// Where a model's parts are.
#[derive(Clone, Debug)]
pub struct Model {
    /// The pipeline: all parts, but for the weights that the checkpoint holds.
    pub folder: PathBuf,
    pub variant: String,
    /// Trained weights.
    pub checkpoint: Option<PathBuf>,
    /// Whether these include the text encoder's.
    trained_text_encoder: bool,
    /// As the user named it.
    pub name: String,
}

/// A model's parts but for the weights' numbers, looked through.
pub struct Opened {
    pub configs: Configs,
    pub tokenizer: ClipTokenizer,
    pub scheduler: SamplerConfig,
    pub weights: Weights,
}

/// A pipeline's weights, the trained ones from a checkpoint if there is one.
pub struct Weights {
    pub pipeline: PipelineWeights,
    checkpoint: Option<Checkpoint>,
    trained_text_encoder: bool,
}

impl WeightSource for Weights {
    fn read(&self, name: &str, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        let trained = match Component::of(name) {
            Some(Component::Unet) => true,
            Some(Component::TextEncoder) => self.trained_text_encoder,
            _ => false,
        };
        match &self.checkpoint {
            Some(checkpoint) if trained => WeightSource::read(checkpoint, name, range, into),
            _ => self.pipeline.read(name, range, into),
        }
    }
}

impl Model {
    /// Finds the model; fetches it if it is on the Hub. Errors are [`Refusal`]s.
    pub fn find(path: &Path, variant: Option<&str>, revision: Option<&str>) -> Result<Model> {
        let name = path.display().to_string();
        if path.join("manifest.json").is_file() {
            return of_checkpoint(path, name);
        }
        let source = ModelSource::of(path.to_path_buf(), revision.map(str::to_string));
        if let ModelSource::Folder(folder) = &source {
            let wanted = "name a pipeline's folder in diffusers' layout, a model's id on the Hub, or a run's checkpoint-N folder";
            if !folder.is_dir() {
                let what = if folder.exists() { "this is no folder" } else { "there is no such folder" };
                return Err(Refusal::error(format!("{name}: {what}: {wanted}")));
            }
            if !folder.join("model_index.json").is_file() {
                let hint = match checkpoint::latest(folder)? {
                    Some(newest) => format!("; the run that writes here has left {}", newest.display()),
                    None => String::new(),
                };
                return Err(Refusal::error(format!("{name}: there is no model_index.json in it: {wanted}{hint}")));
            }
        }
        let folder = hub::resolve(&source, variant)?;
        let variant = variant.unwrap_or_default().to_string();
        Ok(Model { folder, variant, checkpoint: None, trained_text_encoder: false, name })
    }

    /// Opens every part, and refuses with all that is missing or does not fit together.
    pub fn open(&self) -> Result<Opened> {
        let mut problems = Vec::new();
        keep(check_index(&self.folder), &mut problems);
        let configs = keep(Configs::read(&self.folder), &mut problems);
        let tokenizer = keep(ClipTokenizer::open(&self.folder.join("tokenizer"), None), &mut problems);
        let scheduler_file = self.folder.join("scheduler").join("scheduler_config.json");
        let scheduler = keep(SamplerConfig::read(&scheduler_file), &mut problems);
        let pipeline = keep(PipelineWeights::open(&self.folder, &self.variant), &mut problems);
        let checkpoint = match &self.checkpoint {
            Some(path) => keep(Checkpoint::open(path), &mut problems).map(Some),
            None => Some(None),
        };
        if let (Some(configs), Some(tokenizer)) = (&configs, &tokenizer) {
            keep(check_tokenizer(&self.folder, configs, tokenizer), &mut problems);
        }
        if let (Some(configs), Some(pipeline)) = (&configs, &pipeline) {
            keep(check_fit(configs, pipeline), &mut problems);
        }
        if let (Some(configs), Some(Some(checkpoint))) = (&configs, &checkpoint) {
            let text = self.trained_text_encoder.then_some(&configs.text);
            let graph = model::denoiser(&configs.unet, text, false, DType::F32).graph;
            let records = graph.nodes.iter().map(|n| SegmentRecord::new(&n.name, n.params.layout()));
            keep(checkpoint.check(&records.collect::<Vec<_>>()), &mut problems);
        }
        match (configs, tokenizer, scheduler, pipeline, checkpoint) {
            (Some(configs), Some(tokenizer), Some(scheduler), Some(pipeline), Some(checkpoint))
                if problems.is_empty() =>
            {
                let weights = Weights { pipeline, checkpoint, trained_text_encoder: self.trained_text_encoder };
                Ok(Opened { configs, tokenizer, scheduler, weights })
            }
            _ => Err(Refusal { problems }.into()),
        }
    }
}

/// The model that a checkpoint's run began from, through the configuration that lies beside it.
fn of_checkpoint(path: &Path, name: String) -> Result<Model> {
    let config = path.join("..").join("config.toml");
    if !config.is_file() {
        return Err(Refusal::error(format!(
            "{name} is a checkpoint, and its run's config.toml, which names the model that it began from, is not beside it: \
             leave the checkpoint in the run's output folder"
        )));
    }
    let plan = config::load(&config, &[], 1)?;
    if let ModelSource::Folder(folder) = &plan.model.source
        && !folder.is_dir()
    {
        return Err(Refusal::error(format!(
            "{name} is a checkpoint of a run that began from {}, which is not there: put that model back, or set \
             model.path in {} to where it is now",
            folder.display(),
            config.display()
        )));
    }
    Ok(Model {
        folder: hub::resolve(&plan.model.source, plan.model.variant.as_deref())?,
        variant: plan.model.variant.unwrap_or_default(),
        checkpoint: Some(path.to_path_buf()),
        trained_text_encoder: plan.model.train_text_encoder,
        name,
    })
}

/// The value, or its error's problems.
fn keep<T>(result: Result<T>, problems: &mut Vec<String>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            match error.downcast::<Refusal>() {
                Ok(refusal) => problems.extend(refusal.problems),
                Err(error) => problems.push(format!("{error:#}")),
            }
            // Two parts may stumble over the same file.
            problems.dedup();
            None
        }
    }
}

/// The pipeline's class, and that it has the parts that pictures take.
fn check_index(folder: &Path) -> Result<()> {
    let path = folder.join("model_index.json");
    let shown = path.display();
    let text = input_file::text(&path)
        .map_err(|error| Refusal::error(format!("{shown}: this file cannot be read ({error}): restore it")))?;
    let index: Value = serde_json::from_str(&text)
        .map_err(|error| Refusal::error(format!("{shown}: this is not JSON ({error}): restore the file")))?;
    let class = index["_class_name"].as_str().unwrap_or("missing");
    if class != "StableDiffusionPipeline" {
        return Err(Refusal::error(format!(
            "{shown}: its _class_name is {class}, and only StableDiffusionPipeline (Stable Diffusion 1.x and 2.x) is there yet: use such a model"
        )));
    }
    let parts = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"];
    let missing: Vec<&str> = parts.into_iter().filter(|part| !index[*part][1].is_string()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Refusal::error(format!(
        "{shown}: it names no {}, without which there are no pictures: use a whole pipeline (one that was saved with \
         output.skip_save_text_encoder has no text encoder)",
        missing.join(" and no ")
    )))
}

/// Every network's tensors against its configuration.
fn check_fit(configs: &Configs, weights: &PipelineWeights) -> Result<()> {
    let mut problems = Vec::new();
    let unet = model::denoiser(&configs.unet, None, false, DType::F32).graph;
    let text = model::text_encoder(&configs.text, false, DType::F32).graph;
    for (component, graph) in [(Component::Unet, &unet), (Component::TextEncoder, &text)] {
        keep(weights.component(component).check(&model::wanted(graph, component)), &mut problems);
    }
    keep(check_weights(&configs.vae, weights), &mut problems);
    if configs.unet.in_channels != configs.vae.latent_channels {
        problems.push(format!(
            "unet/config.json: in_channels = {}, but vae/config.json: latent_channels = {}: only models that make pictures \
             from text alone are there yet (no inpainting)",
            configs.unet.in_channels, configs.vae.latent_channels
        ));
    }
    if problems.is_empty() { Ok(()) } else { Err(Refusal { problems }.into()) }
}

/// The text encoder has a row for each of the tokenizer's ids and a position for each of a prompt's.
fn check_tokenizer(folder: &Path, configs: &Configs, tokenizer: &ClipTokenizer) -> Result<()> {
    let (tokens, length) = (tokenizer.vocab_size(), tokenizer.max_length());
    if tokens <= configs.text.vocab_size && length <= configs.text.max_positions {
        return Ok(());
    }
    Err(Refusal::error(format!(
        "{}: {tokens} tokens and prompts of {length}, and the text encoder takes {} and {}: they do not belong together, restore the model's own files",
        folder.join("tokenizer").display(),
        configs.text.vocab_size,
        configs.text.max_positions
    )))
}

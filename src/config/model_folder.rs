//! Whether a pipeline folder in diffusers' layout can be trained: the classes it names, each component's
//! configuration, that its weight files fit that configuration, and that a whole pipeline can be written of it at the
//! end. The components' own rules are `model`'s; this asks for all of them at once.

use std::path::Path;

use anyhow::Result;
use candle_core::DType;
use serde_json::Value;

use super::RunPlan;
use crate::checkpoint::SegmentRecord;
use crate::data::ClipTokenizer;
use crate::diffusion::NoiseSchedule;
use crate::model::{self, Component, ComponentWeights, PipelineExport, TextConfig, UnetConfig, VaeConfig};
use crate::segment::SegmentGraph;
use crate::{Refusal, input_file};

/// The components that training needs, and the classes that can be trained; any scheduler's noise schedule will do.
const CLASSES: [(&str, &[&str]); 5] = [
    ("unet", &["UNet2DConditionModel"]),
    ("vae", &["AutoencoderKL"]),
    ("text_encoder", &["CLIPTextModel"]),
    ("tokenizer", &["CLIPTokenizer", "CLIPTokenizerFast"]),
    ("scheduler", &[]),
];

/// What was learnt of a pipeline folder.
#[derive(Clone, Debug, Default)]
pub struct ModelFacts {
    /// The pipeline's class.
    pub class: String,
    pub unet_parameters: u64,
    pub text_encoder_parameters: u64,
    /// Bytes of the weight files of all components that do not train.
    pub frozen_bytes: u64,
    /// Segments with their tensors, as a checkpoint of this model and these trained parts has them.
    pub(super) segments: Vec<SegmentRecord>,
}

/// Looks through `folder`; what is missing or wrong is added to `problems`, each naming the file.
pub(super) fn inspect(folder: &Path, plan: &RunPlan, problems: &mut Vec<String>) -> ModelFacts {
    let mut facts = ModelFacts::default();
    let Some(index) = keep(model_index(folder), problems) else { return facts };
    facts.class = index["_class_name"].as_str().unwrap_or_default().to_string();
    if facts.class != "StableDiffusionPipeline" {
        problems.push(format!(
            "{}: its _class_name is {}, and only StableDiffusionPipeline (Stable Diffusion 1.x and 2.x) can be trained yet: use such a model",
            folder.join("model_index.json").display(),
            if facts.class.is_empty() { "missing" } else { &facts.class }
        ));
        return facts;
    }
    let before = problems.len();
    classes(folder, &index, problems);
    if problems.len() > before {
        return facts;
    }
    keep(NoiseSchedule::from_json(&folder.join("scheduler/scheduler_config.json")), problems);
    let (unet, text) = networks(folder, plan, &mut facts, problems);
    tokenizer(folder, plan, text.as_ref(), problems);
    if let (Some(unet), Some(text)) = (&unet, &text) {
        keep(model::check_text_width(unet, text), problems);
    }
    let trained: &[Component] = match plan.model.train_text_encoder {
        true => &[Component::Unet, Component::TextEncoder],
        false => &[Component::Unet],
    };
    if problems.len() == before {
        let variant = plan.model.variant.as_deref().unwrap_or("");
        let skip_text_encoder = plan.output.skip_save_text_encoder;
        keep(PipelineExport { model_dir: folder, variant, trained, skip_text_encoder }.check(), problems);
    }
    facts.frozen_bytes = frozen_bytes(folder, &index, trained);
    facts
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
            None
        }
    }
}

fn model_index(folder: &Path) -> Result<Value> {
    let path = folder.join("model_index.json");
    let text = input_file::text(&path).map_err(|error| {
        let why = match error.kind() {
            std::io::ErrorKind::NotFound => "there is no such file".to_string(),
            _ => format!("this file cannot be read ({error})"),
        };
        Refusal::error(format!(
            "{}: {why}: a model is a folder in diffusers' layout, with model_index.json and a folder for each part; \
             diffusers' scripts/convert_original_stable_diffusion_to_diffusers.py makes one of a single checkpoint file",
            path.display()
        ))
    })?;
    let broken = |error| Refusal::error(format!("{}: this is not JSON ({error}): restore the file", path.display()));
    serde_json::from_str(&text).map_err(broken)
}

fn classes(folder: &Path, index: &Value, problems: &mut Vec<String>) {
    for (name, classes) in CLASSES {
        let class = index[name][1].as_str();
        if class.is_none_or(|class| !classes.is_empty() && !classes.contains(&class)) {
            problems.push(format!(
                "{}: its {name} is {}, and {} is what can be trained: use a model that has one",
                folder.join("model_index.json").display(),
                class.unwrap_or("missing"),
                if classes.is_empty() { "a scheduler of diffusers".to_string() } else { classes.join(" or ") }
            ));
        }
    }
}

/// The three networks: configurations, and weights that fit them. Nothing is loaded.
fn networks(
    folder: &Path,
    plan: &RunPlan,
    facts: &mut ModelFacts,
    problems: &mut Vec<String>,
) -> (Option<UnetConfig>, Option<TextConfig>) {
    let of = |component: Component| folder.join(component.name());
    let mask = plan.data.text_encoder_use_attention_mask;
    let unet = keep(UnetConfig::read(&of(Component::Unet)), problems);
    let text = keep(TextConfig::read(&of(Component::TextEncoder)), problems);
    let vae = keep(VaeConfig::read(&of(Component::Vae)), problems);
    let mut weights = |component, graph: Option<&SegmentGraph>| {
        let variant = plan.model.variant.as_deref().unwrap_or("");
        let weights = keep(ComponentWeights::open(&of(component), variant, component), problems);
        if let (Some(weights), Some(graph)) = (weights, graph) {
            keep(weights.check(&model::wanted(graph, component)), problems);
        }
    };
    if let Some(vae) = vae {
        weights(Component::Vae, Some(&model::vae_encoder(&vae).graph));
    } else {
        weights(Component::Vae, None);
    }
    let encoder = text.as_ref().map(|text| model::text_encoder(text, mask, DType::F32).graph);
    weights(Component::TextEncoder, encoder.as_ref());
    facts.text_encoder_parameters = encoder.map_or(0, |graph| graph.parameters() as u64);
    let in_training = text.as_ref().filter(|_| plan.model.train_text_encoder);
    let denoiser = unet.as_ref().map(|unet| model::denoiser(unet, in_training, mask, DType::F32).graph);
    weights(Component::Unet, denoiser.as_ref());
    if let Some(graph) = denoiser {
        let text_encoder = in_training.map_or(0, |_| facts.text_encoder_parameters);
        facts.unet_parameters = graph.parameters() as u64 - text_encoder;
        facts.segments = graph.nodes.iter().map(|n| SegmentRecord::new(&n.name, n.params.layout())).collect();
    }
    (unet, text)
}

/// The tokenizer, and that the text encoder has a row for each of its ids and a position for each of a prompt's.
fn tokenizer(folder: &Path, plan: &RunPlan, text: Option<&TextConfig>, problems: &mut Vec<String>) {
    let folder = folder.join("tokenizer");
    let Some(tokenizer) = keep(ClipTokenizer::open(&folder, plan.data.tokenizer_max_length), problems) else { return };
    let Some(text) = text else { return };
    if tokenizer.vocab_size() > text.vocab_size {
        problems.push(format!(
            "{}: it has {} tokens, and the text encoder knows {}: they do not belong together, restore the model's own files",
            folder.display(),
            tokenizer.vocab_size(),
            text.vocab_size
        ));
    }
    if tokenizer.max_length() > text.max_positions {
        problems.push(format!(
            "{}: prompts of {} tokens are asked for, and the text encoder takes at most {}: write tokenizer_max_length = {} under [data]",
            folder.display(),
            tokenizer.max_length(),
            text.max_positions,
            text.max_positions
        ));
    }
}

/// Bytes of the safetensors files that the pipeline at the end will have copies of, and perhaps a little more.
fn frozen_bytes(folder: &Path, index: &Value, trained: &[Component]) -> u64 {
    let components = index.as_object().into_iter().flatten().filter(|(_, class)| class[1].is_string());
    let copied = components.filter(|(name, _)| !trained.iter().any(|component| component.name() == *name));
    let files = copied.flat_map(|(name, _)| std::fs::read_dir(folder.join(name)).into_iter().flatten().flatten());
    let weights = files.filter(|file| file.path().extension().is_some_and(|end| end == "safetensors"));
    // Follows links, which is what the Hub's cache is made of.
    weights.filter_map(|file| std::fs::metadata(file.path()).ok()).map(|file| file.len()).sum()
}

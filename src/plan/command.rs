//! `dblaunch plan`: the plan of a configuration for this machine or a card by name, as a table. Neither photographs nor
//! weights are needed, only the model's configurations; those of the published Stable Diffusions are known by name.

use std::path::Path;

use anyhow::Result;

use super::Decision;
use super::cards::{Machine, card_names, memory_bytes};
use super::facts::{Facts, Surroundings};
use super::table::Table;
use crate::Refusal;
use crate::config::{self, ModelSource, RunPlan, Toggle};
use crate::data::{self, ClipTokenizer, Footprint, Row};
use crate::device::threads;
use crate::hub;
use crate::model::{self, TextConfig, UnetConfig, VaeConfig};
use crate::pipeline::Configs;

/// What is asked on the command line beside the configuration.
#[derive(Clone, Debug)]
pub struct Asked<'a> {
    pub config: &'a Path,
    pub overrides: &'a [String],
    pub world_size: usize,
    /// Budgets that replace those of `[memory]`, as they were written.
    pub vram: Option<&'a str>,
    pub ram: Option<&'a str>,
    pub card: Option<&'a str>,
}

/// The table, as text.
///
/// # Errors
/// A [`Refusal`] if the configuration is wrong, the card is not known, or nothing fits.
pub fn plan(asked: &Asked) -> Result<String> {
    let mut plan = config::load(asked.config, asked.overrides, asked.world_size)?;
    let size = |flag: &str, text: &str| {
        config::parse_size(text).map_err(|what| Refusal::error(format!("--{flag} {text}: {what}")))
    };
    if let Some(text) = asked.vram {
        plan.memory.vram = Some(size("vram", text)?);
    }
    if let Some(text) = asked.ram {
        plan.memory.ram = Some(size("ram", text)?);
    }
    let machine = machine(&plan, asked.card)?;
    let (configs, tokens) = configs(&plan)?;
    let around = Surroundings::of(&plan, tokens, asked.world_size);
    let ranks_threads = (threads::threads() / asked.world_size).max(1);
    let facts = threads::with_threads(ranks_threads, || Facts::of(&plan, &configs, around, machine.kernels))?;
    let decision = Decision::of(&plan, &facts, asked.world_size, &machine)?;
    let table = Table {
        decision: &decision,
        machine: &machine,
        world_size: asked.world_size,
        trained: facts.parameters,
        rows: facts.rows,
    };
    Ok(table.to_string())
}

/// The named card with as much memory as `[memory] ram` says or this machine has; or this machine.
fn machine(plan: &RunPlan, card: Option<&str>) -> Result<Machine> {
    let Some(name) = card else { return Ok(Machine::this(plan.model.device)) };
    Machine::named(name, plan.memory.ram.unwrap_or_else(memory_bytes)).ok_or_else(|| {
        let known: Vec<&str> = card_names().collect();
        Refusal::error(format!("--card {name}: there is no such card in the list; it has {}", known.join(", ")))
    })
}

/// The model's configurations, and how many tokens a prompt has.
fn configs(plan: &RunPlan) -> Result<(Configs, usize)> {
    let published = match &plan.model.source {
        ModelSource::Hub { id, .. } => published(id),
        ModelSource::Folder(_) => None,
    };
    if let Some(configs) = published {
        model::check_text_width(&configs.unet, &configs.text)?;
        let tokens = plan.data.tokenizer_max_length.unwrap_or(configs.text.max_positions);
        return Ok((configs, tokens));
    }
    let folder = hub::resolve(&plan.model.source, plan.model.variant.as_deref())?;
    let configs = Configs::read(&folder)?;
    let tokens = tokens(plan, &folder, &configs);
    Ok((configs, tokens))
}

/// How many tokens a prompt has: the tokenizer's own length, where it can be read.
pub fn tokens(plan: &RunPlan, model_dir: &Path, configs: &Configs) -> usize {
    let tokenizer = ClipTokenizer::open(&model_dir.join("tokenizer"), plan.data.tokenizer_max_length);
    tokenizer.map_or(configs.text.max_positions, |tokenizer| tokenizer.max_length())
}

/// Models whose shapes are known, so that nothing has to be fetched to plan for them.
fn published(id: &str) -> Option<Configs> {
    let (_, name) = id.rsplit_once('/')?;
    let (unet, text) = match name {
        "stable-diffusion-v1-5" | "stable-diffusion-v1-4" | "stable-diffusion-v1-3" => {
            (UnetConfig::sd15_shape(), TextConfig::sd15_shape())
        }
        "stable-diffusion-2" | "stable-diffusion-2-base" | "stable-diffusion-2-1" | "stable-diffusion-2-1-base" => {
            (UnetConfig::sd21_shape(), TextConfig::sd21_shape())
        }
        _ => return None,
    };
    Some(Configs { unet, text, vae: VaeConfig::sd_shape() })
}

/// Photographs that are not there are taken for so many, of such a width and height: as today's cameras take them.
const UNSEEN: usize = 8;
const CAMERA: (usize, usize) = (4000, 6000);

impl Surroundings {
    /// What pictures and latents will be kept and what decoding takes, from the pictures' headers. Of pictures that are not
    /// there, photographs are taken for a camera's, and class pictures for squares, as those that the run makes are.
    pub fn of(plan: &RunPlan, tokens: usize, world_size: usize) -> Self {
        let r = plan.data.resolution;
        let caches = plan.data.cache_latents != Toggle::Off;
        let options = plan.dataset_options(false);
        let mut around = Surroundings { tokens, items: 1, latents_kept: 0, pictures_bytes: 0, decoding: 0 };
        let mut folders = vec![(plan.data.instance_dir.as_path(), usize::MAX, UNSEEN, Row::Instance)];
        if let Some(prior) = &plan.prior {
            folders.push((prior.class_dir.as_path(), prior.num_class_images, prior.num_class_images, Row::Class));
        }
        for (dir, most, unseen, row) in folders {
            let unseen_one = match row {
                Row::Instance => Footprint::of_photograph(CAMERA, &options, row),
                Row::Class => Footprint::of_made(&options, row),
            };
            let listed = data::list_pictures(dir, row == Row::Instance && plan.data.captions).unwrap_or_default();
            let mut pictures: Vec<Footprint> = listed
                .iter()
                .take(most)
                .map(|path| Footprint::read(path, &options, row).unwrap_or(unseen_one))
                .collect();
            // Class pictures that are missing are made; of photographs, some are there by then.
            let expected = if most == usize::MAX && !pictures.is_empty() { pictures.len() } else { unseen };
            pictures.resize(expected.max(pictures.len()), unseen_one);
            // An epoch is the larger of the two numbers, and no micro-batch is larger than an epoch.
            around.items = around.items.max(pictures.len().div_ceil(world_size));
            let mirrored = row == Row::Instance && plan.data.random_flip;
            for picture in pictures {
                let square = picture.resized == (r, r);
                around.latents_kept += usize::from(caches && !mirrored && (plan.data.center_crop || square));
                around.pictures_bytes += picture.kept;
                around.decoding = around.decoding.max(picture.decoding);
            }
        }
        around.pictures_bytes = around.pictures_bytes.min(data::KEEP_BYTES);
        around
    }
}

/// The plan of a run that is about to begin, decided by rank 0 for everyone. A collective.
pub fn decide(
    plan: &RunPlan,
    model_dir: &Path,
    configs: &Configs,
    comm: &dyn crate::comm::Communicator,
) -> Result<Decision> {
    Decision::agree(comm, || for_this_machine(plan, model_dir, configs, comm.world_size()))
}

/// The plan of a run on this machine.
pub fn for_this_machine(plan: &RunPlan, model_dir: &Path, configs: &Configs, world_size: usize) -> Result<Decision> {
    let around = Surroundings::of(plan, tokens(plan, model_dir, configs), world_size);
    let machine = Machine::this(plan.model.device);
    let facts = Facts::of(plan, configs, around, machine.kernels)?;
    Decision::of(plan, &facts, world_size, &machine)
}

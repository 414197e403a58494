//! `dblaunch check`, which every run begins with: everything that can be wrong with a request is found before
//! anything is started or written, and told at once. [`INSPECTIONS`] is the list of what is looked at; each
//! inspection may use what those before it learnt, and says nothing where they already failed.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::document::Document;
use super::model_folder::{self, ModelFacts};
use super::{DeviceKind, Draft, ModelSource, Resume, RunPlan, Steps};
use super::{output_folder, sampling, state_folder};
use crate::checkpoint::{self, Checkpoint};
use crate::data::{self, Dataset, DatasetOptions};
use crate::diffusion::{NoiseSchedule, Record, RecordUse};
use crate::model::{Component, VaeConfig};
use crate::pipeline::Configs;
use crate::plan::Decision;
use crate::{Refusal, hub};

/// What is looked at, in this order, after the configuration itself.
const INSPECTIONS: &[fn(&mut Inspection)] = &[
    model,
    device,
    images,
    pictures,
    ranks,
    replay,
    warmup,
    resume,
    sampling::inspect,
    output_folder::inspect,
    // Takes seconds for a large network, so nothing else is wrong by then.
    memory,
    state_folder::inspect,
    output_folder::disk_space,
];

/// Checks the request that `config` and `overrides` make, for `world_size` ranks. Fetches the model if it is on the
/// Hub (into the Hub's own cache, where the run finds it), and writes nothing else. Ok is what will run; a request
/// with anything wrong is a [`Refusal`] with all that is wrong.
pub fn check(config: &Path, overrides: &[String], world_size: usize) -> Result<Report> {
    let draft = Draft::read(config, overrides, world_size)?;
    let mut inspection = Inspection {
        plan: draft.plan,
        world_size,
        facts: Facts::default(),
        problems: draft.problems,
        document: draft.document,
    };
    for inspect in INSPECTIONS {
        inspect(&mut inspection);
    }
    let Inspection { plan, facts, mut problems, .. } = inspection;
    if !problems.is_empty() {
        problems.dedup();
        return Err(Refusal { problems }.into());
    }
    Ok(Report { config: config.to_path_buf(), plan, world_size, facts })
}

/// A request under inspection. Its plan is whole only where nothing is wrong: an empty path stands for one that was
/// not given.
pub struct Inspection {
    pub plan: RunPlan,
    pub world_size: usize,
    pub facts: Facts,
    problems: Vec<String>,
    document: Document,
}

impl Inspection {
    /// Adds a problem with `section.key`: `what` follows the file, the line, the key and its value, and ends with
    /// the remedy.
    pub fn problem(&mut self, section: &str, key: &str, what: &str) {
        self.problems.push(format!("{}: {what}", self.document.at(section, key)));
    }

    /// The value of `result`; if it failed, its problems are added as ones with `section.key`.
    pub fn absorb<T>(&mut self, section: &str, key: &str, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                match error.downcast::<Refusal>() {
                    Ok(refusal) => refusal.problems.iter().for_each(|what| self.problem(section, key, what)),
                    Err(error) => self.problem(section, key, &format!("{error:#}")),
                }
                None
            }
        }
    }
}

/// Stage and tiers: whether there is a way to run this that fits the memory.
fn memory(inspection: &mut Inspection) {
    let Some(folder) = inspection.facts.model_dir.clone().filter(|_| inspection.problems.is_empty()) else { return };
    let decided = Configs::read(&folder).and_then(|configs| {
        crate::plan::command::for_this_machine(&inspection.plan, &folder, &configs, inspection.world_size)
    });
    // Whichever was set: a refusal is shown at its line.
    let memory = &inspection.plan.memory;
    let key = if memory.vram.is_none() && memory.ram.is_some() { "ram" } else { "vram" };
    inspection.facts.decision = inspection.absorb("memory", key, decided);
}

/// What the inspections learnt.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The model's folder, where it is whole.
    pub model_dir: Option<PathBuf>,
    pub model: ModelFacts,
    pub instance_images: usize,
    /// Those of them that are captioned by the instance prompt, where pictures have captions.
    pub without_caption: usize,
    /// Class images that are there and will be used.
    pub class_images: usize,
    /// Class images that are missing and will be made first.
    pub class_images_made: usize,
    /// Known where the images are.
    pub steps: Option<Steps>,
    /// Known where nothing else is wrong.
    pub decision: Option<Decision>,
    /// Of one checkpoint.
    pub checkpoint_bytes: u64,
    /// Of the state files of all ranks, in `zero.nvme_dir`.
    pub state_bytes: u64,
    /// The most the run will have on disk at once, beyond what is there now.
    pub disk_bytes: u64,
    /// What is not wrong but may surprise.
    pub notes: Vec<String>,
}

/// The model's folder and its files.
fn model(inspection: &mut Inspection) {
    let plan = &inspection.plan.model;
    let folder = match &plan.source {
        ModelSource::Folder(path) if path.as_os_str().is_empty() => return,
        ModelSource::Folder(path) if path.is_file() => {
            let what = "this is a file, and a folder in diffusers' layout is wanted: diffusers' \
                        scripts/convert_original_stable_diffusion_to_diffusers.py makes one of a single checkpoint file";
            return inspection.problem("model", "path", what);
        }
        ModelSource::Folder(path) if !path.is_dir() => {
            let what = "there is no such folder: relative paths begin in the folder you run dblaunch in";
            return inspection.problem("model", "path", what);
        }
        ModelSource::Folder(path) => path.clone(),
        hub_model => {
            let fetched = hub::resolve(hub_model, plan.variant.as_deref());
            match inspection.absorb("model", "path", fetched) {
                Some(folder) => folder,
                None => return,
            }
        }
    };
    let mut problems = Vec::new();
    inspection.facts.model = model_folder::inspect(&folder, &inspection.plan, &mut problems);
    if problems.is_empty() {
        inspection.facts.model_dir = Some(folder);
    }
    for what in problems {
        inspection.problem("model", "path", &what);
    }
}

/// The folders of photographs, and from their numbers the length of the run.
fn images(inspection: &mut Inspection) {
    let dir = inspection.plan.data.instance_dir.clone();
    let instances = count_images(inspection, "data", "instance_dir", &dir);
    inspection.facts.instance_images = instances.unwrap_or(0);
    let classes = sampling::class_images(inspection);
    if let (Some(instances), Some(classes)) = (instances, classes) {
        let steps = Steps::of(instances.max(classes), &inspection.plan.train, inspection.world_size);
        inspection.facts.steps = Some(steps);
    }
}

/// The pictures themselves: every one is decoded, so that a damaged one is found now and not in the middle of a run.
fn pictures(inspection: &mut Inspection) {
    // Decoded to see whether they can be, and not kept.
    let mut options = DatasetOptions { keep_bytes: 0, ..inspection.plan.dataset_options(true) };
    if inspection.facts.steps.is_none() {
        return;
    }
    // Missing class images are made first.
    let there = inspection.facts.class_images;
    options.class = options.class.filter(|_| there > 0).map(|(dir, _)| (dir, there));
    let error = match Dataset::open(&options) {
        Ok(dataset) => return inspection.facts.without_caption = dataset.without_caption(),
        Err(error) => error,
    };
    match error.downcast::<Refusal>() {
        Ok(refusal) => refusal.problems.iter().for_each(|what| {
            let class_dir = options.class.as_ref().map(|(dir, _)| dir.display().to_string());
            match class_dir.is_some_and(|dir| what.starts_with(&dir)) {
                true => inspection.problem("prior", "class_dir", what),
                false => inspection.problem("data", "instance_dir", what),
            }
        }),
        Err(error) => inspection.problem("data", "instance_dir", &format!("{error:#}")),
    }
}

/// How many pictures `dir` holds, by its files alone; none (and a problem) where there is no folder or no image.
fn count_images(inspection: &mut Inspection, section: &str, key: &str, dir: &Path) -> Option<usize> {
    if dir.as_os_str().is_empty() {
        return None;
    }
    let captioned = section == "data" && inspection.plan.data.captions;
    let count = match data::list_pictures(dir, captioned) {
        Ok(pictures) => pictures.len(),
        Err(error) => {
            let why = match error.kind() {
                std::io::ErrorKind::NotFound => "there is no such folder".to_string(),
                std::io::ErrorKind::NotADirectory => "this is not a folder".to_string(),
                _ => format!("this folder cannot be read ({error})"),
            };
            let remedy = "name a folder with pictures; relative paths begin in the folder you run dblaunch in";
            inspection.problem(section, key, &format!("{why}: {remedy}"));
            return None;
        }
    };
    if count == 0 {
        inspection.problem(
            section,
            key,
            "there are no pictures in this folder: put some there (.png, .jpg, .jpeg or .webp)",
        );
        return None;
    }
    Some(count)
}

/// More ranks than images would leave some without work in every micro-batch. A record says itself how many items
/// its micro-batches have.
fn ranks(inspection: &mut Inspection) {
    let Some(steps) = inspection.facts.steps.filter(|_| inspection.plan.replay.is_none()) else { return };
    let ranks = inspection.world_size;
    if ranks > steps.items {
        let what = format!(
            "an epoch has {} items, and with {ranks} ranks some would never get one: start at most {} ranks (--nproc), or add images",
            steps.items, steps.items
        );
        inspection.problem("data", "instance_dir", &what);
    }
}

/// A GPU for every rank. One that cannot be used is no problem where the CPU will do, but worth a note.
fn device(inspection: &mut Inspection) {
    if inspection.plan.model.device == DeviceKind::Cpu {
        if let (true, Err(why)) = (cfg!(feature = "cuda"), crate::device::gpu(0)) {
            inspection.facts.notes.push(format!("computes on the CPU: {why}"));
        }
        return;
    }
    if let Err(why) = crate::device::gpu(inspection.world_size.saturating_sub(1)) {
        inspection.problem("model", "device", &why);
    }
}

/// The record of a replay. (The folder for its gradients is looked at with the output folder.)
fn replay(inspection: &mut Inspection) {
    let Some(draws) = inspection.plan.replay.as_ref().map(|replay| replay.draws.clone()) else { return };
    if draws.as_os_str().is_empty() {
        return;
    }
    if !draws.is_file() {
        let what = "there is no such file: name a safetensors file of recorded draws, or leave out the section";
        return inspection.problem("replay", "draws", what);
    }
    let Some(record) = inspection.absorb("replay", "draws", Record::open(&draws)) else { return };
    if let Some(wanted) = record_use(inspection) {
        inspection.absorb("replay", "draws", record.check(wanted));
    }
    if let Some(Steps { items, .. }) = inspection.facts.steps {
        let steps = Steps::replayed(&record, items, &inspection.plan.train);
        inspection.facts.steps = inspection.absorb("replay", "draws", steps);
    }
}

/// What the run takes from a record, where the model is whole.
fn record_use(inspection: &Inspection) -> Option<RecordUse> {
    let plan = &inspection.plan;
    let folder = inspection.facts.model_dir.as_ref()?;
    let vae = VaeConfig::read(&folder.join(Component::Vae.name())).ok()?;
    let schedule = NoiseSchedule::from_json(&folder.join("scheduler/scheduler_config.json")).ok()?;
    let side = plan.data.resolution / vae.downscale();
    Some(RecordUse {
        class_rows: plan.prior.is_some(),
        latent: [vae.latent_channels, side, side],
        resolution: plan.data.resolution,
        timesteps: schedule.steps(),
        offset_noise: plan.train.offset_noise > 0.0,
    })
}

/// A warm-up that outlasts the run.
fn warmup(inspection: &mut Inspection) {
    let Some(steps) = inspection.facts.steps else { return };
    let schedule = &inspection.plan.lr_schedule;
    if schedule.kind != super::LrKind::Constant && schedule.warmup_steps >= steps.total {
        inspection.facts.notes.push(format!(
            "lr_schedule.warmup_steps is {} and the run has {} steps: the learning rate never comes to its full height",
            schedule.warmup_steps, steps.total
        ));
    }
}

/// The checkpoint that the run goes on from: it is whole, and of this model and these trained parts.
fn resume(inspection: &mut Inspection) {
    let plan = &inspection.plan;
    let found = match &plan.checkpoint.resume {
        Resume::No => return,
        Resume::Latest => checkpoint::latest(&plan.output.dir),
        Resume::Folder(folder) if folder.is_dir() => Ok(Some(folder.clone())),
        Resume::Folder(folder) => {
            let what = format!(
                "there is no checkpoint folder {}: name one, or write \"latest\" for the newest in the output folder",
                folder.display()
            );
            return inspection.problem("checkpoint", "resume", &what);
        }
    };
    let Some(Some(folder)) = inspection.absorb("checkpoint", "resume", found) else { return };
    let opened = Checkpoint::open(&folder);
    if let Some(opened) = inspection.absorb("checkpoint", "resume", opened)
        && inspection.facts.model_dir.is_some()
    {
        let checked = opened.check(&inspection.facts.model.segments);
        inspection.absorb("checkpoint", "resume", checked);
    }
}

/// A request with nothing wrong. Its display is a summary of what will run.
#[derive(Clone, Debug)]
pub struct Report {
    pub config: PathBuf,
    pub plan: RunPlan,
    pub world_size: usize,
    pub facts: Facts,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (plan, facts) = (&self.plan, &self.facts);
        let millions = |count: u64| match count {
            0..100_000 => format!("{count} parameters"),
            _ => format!("{:.1} M parameters", count as f64 / 1e6),
        };
        writeln!(f, "{}: nothing wrong was found; this is what will run.", self.config.display())?;
        let folder = facts.model_dir.as_deref().unwrap_or(Path::new("")).display();
        writeln!(f, "  model       {folder} ({})", facts.model.class)?;
        let text_encoder = match plan.model.train_text_encoder {
            true => format!("text encoder ({})", millions(facts.model.text_encoder_parameters)),
            false => "text encoder frozen".to_string(),
        };
        writeln!(f, "  trained     unet ({}), {text_encoder}", millions(facts.model.unet_parameters))?;
        let (side, crop) = (plan.data.resolution, if plan.data.center_crop { "centre" } else { "random" });
        let flip = if plan.data.random_flip { ", mirrored at random" } else { "" };
        let dir = plan.data.instance_dir.display();
        let prompt = match (plan.data.captions, facts.without_caption) {
            (true, 0) => "with their captions".to_string(),
            (true, all) if all == facts.instance_images => {
                format!("none of which has a caption: {:?}", plan.data.instance_prompt)
            }
            (true, some) => format!("with their captions, but {some} without: {:?}", plan.data.instance_prompt),
            (false, _) => format!("{:?}", plan.data.instance_prompt),
        };
        writeln!(f, "  images      {} in {dir}, {side}x{side}, {crop} crop{flip}: {prompt}", facts.instance_images)?;
        if let Some(prior) = &plan.prior {
            let dir = prior.class_dir.display();
            let made = match facts.class_images_made {
                0 => String::new(),
                made => format!(" and {made} to be made first"),
            };
            writeln!(
                f,
                "  prior       {} of {dir}{made}, weight {}: {:?}",
                facts.class_images, prior.loss_weight, prior.class_prompt
            )?;
        }
        if let Some(validation) = &plan.validation {
            let every = validation.every.map_or("before and after".to_string(), |n| format!("every {n} steps"));
            let (number, prompts) = (validation.num_images, &validation.prompts);
            writeln!(f, "  validation  {number} pictures {every}: {prompts:?}")?;
        }
        if let Some(replay) = &plan.replay {
            writeln!(f, "  replay      draws and order of images from {}", replay.draws.display())?;
        }
        self.write_steps(f)?;
        let (optimizer, schedule) = (&plan.optimizer, plan.lr_schedule.kind.name());
        let kind = optimizer.kind.name();
        write!(f, "  optimizer   {kind}, learning rate {:e} ({schedule})", optimizer.learning_rate)?;
        if plan.model.train_text_encoder && optimizer.text_encoder_learning_rate != optimizer.learning_rate {
            write!(f, ", text encoder {:e}", optimizer.text_encoder_learning_rate)?;
        }
        let device = match plan.model.device {
            super::DeviceKind::Cpu => "CPU",
            super::DeviceKind::Cuda => "GPU",
        };
        let stage = facts.decision.as_ref().map_or(0, |decision| decision.stage);
        writeln!(f, "\n  ranks       {} on the {device}, ZeRO stage {stage}", self.world_size)?;
        if let Some(decision) = &facts.decision {
            writeln!(f, "  memory      {}", decision.summary())?;
        }
        self.write_output(f)?;
        for note in &facts.notes {
            writeln!(f, "  note        {note}")?;
        }
        Ok(())
    }
}

impl Report {
    fn write_steps(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let train = &self.plan.train;
        let Some(steps) = self.facts.steps else { return Ok(()) };
        if self.plan.replay.is_some() {
            return writeln!(f, "  steps       {}, with the record's batches", steps.total);
        }
        let items = train.batch_size.saturating_mul(train.accumulation).saturating_mul(self.world_size);
        writeln!(
            f,
            "  steps       {} of {items} images ({} a rank x {} ranks x {} micro-batches), {} epochs of {} steps",
            steps.total, train.batch_size, self.world_size, train.accumulation, steps.epochs, steps.per_epoch
        )
    }

    fn write_output(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let checkpoint = &self.plan.checkpoint;
        let every = match checkpoint.every {
            Some(every) => format!("a checkpoint every {every} steps"),
            None if checkpoint.on_interrupt => "a checkpoint if interrupted".to_string(),
            None => "no checkpoints".to_string(),
        };
        let size = |bytes: u64| bytesize::ByteSize(bytes).display().iec();
        let resume = match &checkpoint.resume {
            Resume::No => String::new(),
            Resume::Latest => ", resuming the newest".to_string(),
            Resume::Folder(path) => format!(", resuming {}", path.display()),
        };
        let dir = self.plan.output.dir.display();
        writeln!(f, "  output      {dir}: {every} ({} each){resume}", size(self.facts.checkpoint_bytes))?;
        if let Some(dir) = self.plan.zero.nvme_dir.as_ref().filter(|_| self.facts.state_bytes > 0) {
            writeln!(f, "  state       {} in {}, while it runs", size(self.facts.state_bytes), dir.display())?;
        }
        writeln!(f, "  disk        up to {} in all", size(self.facts.disk_bytes))
    }
}

//! Row 5: a TOML file and `--set` overrides -> [`RunPlan`], validated; and `check`, which also looks at everything
//! the plan names before anything is started. What a section means is in the file of its name; the walk from text to
//! plan is here. Nothing here trains, and nothing that trains reads a configuration.

mod check;
mod data;
mod document;
mod keys;
mod loss_scale;
mod memory;
mod model;
mod model_folder;
mod optimizer;
mod output;
mod output_folder;
mod plan;
mod reader;
mod sampling;
mod state_folder;
mod steps;
mod train;
mod validation;
mod zero;

use std::cell::RefCell;
use std::path::Path;

use anyhow::Result;

pub use check::{Facts, Inspection, Report, check};
pub(crate) use output_folder::can_write;

pub use plan::*;
pub use steps::Steps;

use crate::{Refusal, input_file};
use document::Document;
use reader::Reader;

/// Reads `path`, lays `overrides` (`section.key=value`) over it and validates the whole for `world_size` ranks.
/// Looks at no other file: see [`check`] for that. A wrong configuration is a [`Refusal`] with all its problems.
pub fn load(path: &Path, overrides: &[String], world_size: usize) -> Result<RunPlan> {
    Draft::read(path, overrides, world_size)?.whole()
}

/// The variable in which a launcher gives its ranks the text of the configuration that it has checked: what is started again
/// must be what was started, whatever the file says by then.
pub const GIVEN: &str = "DBLAUNCH_CONFIGURATION";

/// What [`load`] reads from `path`, for [`load_given`].
pub fn text(path: &Path) -> Result<String> {
    let text = read_text(path)?;
    // What one variable takes on Linux is 128 KiB.
    match text.len() {
        ..=LONGEST => Ok(text),
        bytes => Err(Refusal::error(format!(
            "{}: {bytes} bytes are too many for a configuration, which has {LONGEST} at most",
            path.display()
        ))),
    }
}

const LONGEST: usize = 100 << 10;

/// As [`load`], from the text of the file.
pub fn load_given(path: &Path, text: &str, overrides: &[String], world_size: usize) -> Result<RunPlan> {
    Draft::parse(&path.display().to_string(), text, overrides, world_size)?.whole()
}

fn read_text(path: &Path) -> Result<String> {
    input_file::text(path).map_err(|error| {
        let why = match error.kind() {
            std::io::ErrorKind::NotFound => "there is no such file".to_string(),
            std::io::ErrorKind::InvalidData => "this is not a text file (UTF-8)".to_string(),
            _ => error.to_string(),
        };
        Refusal::error(format!(
            "{}: the configuration cannot be read: {why}; name a TOML file such as those in configs/",
            path.display()
        ))
    })
}

/// A plan that is whole only if nothing is wrong with it; where something is, a default or an empty path stands in.
struct Draft {
    plan: RunPlan,
    problems: Vec<String>,
    document: Document,
}

impl Draft {
    fn read(path: &Path, overrides: &[String], world_size: usize) -> Result<Draft> {
        Draft::parse(&path.display().to_string(), &read_text(path)?, overrides, world_size)
    }

    fn whole(self) -> Result<RunPlan> {
        if self.problems.is_empty() { Ok(self.plan) } else { Err(Refusal { problems: self.problems }.into()) }
    }

    fn parse(file: &str, text: &str, overrides: &[String], world_size: usize) -> Result<Draft> {
        let document = Document::parse(file, text, overrides)?;
        let mut found = document.problems.clone();
        found.extend(keys::unknown(&document));
        let problems = RefCell::new(found);
        let section = |name| Reader::new(&document, name, &problems);
        let train = TrainPlan::read(&section("train"));
        let images_per_step = train.batch_size.saturating_mul(train.accumulation).saturating_mul(world_size);
        let output = OutputPlan::read(&section("output"));
        let prior = PriorPlan::read(&section("prior"));
        let class_prompt = prior.as_ref().map(|prior| prior.class_prompt.as_str());
        let plan = RunPlan {
            model: ModelPlan::read(&section("model")),
            data: DataPlan::read(&section("data")),
            validation: ValidationPlan::read(&section("validation"), class_prompt),
            prior,
            optimizer: OptimizerPlan::read(&section("optimizer"), images_per_step),
            lr_schedule: LrSchedulePlan::read(&section("lr_schedule")),
            zero: ZeroPlan::read(&section("zero")),
            memory: MemoryPlan::read(&section("memory")),
            checkpoint: CheckpointPlan::read(&section("checkpoint"), &output.dir),
            replay: ReplayPlan::read(&section("replay")),
            train,
            output,
        };
        refuse_lora(&section("lora"));
        cross_check(&plan, &section("data"), &section("optimizer"), &section("lr_schedule"));
        let problems = problems.into_inner();
        Ok(Draft { plan, problems, document })
    }
}

/// What one key may be beside another.
fn cross_check(plan: &RunPlan, data: &Reader, optimizer: &Reader, lr_schedule: &Reader) {
    if plan.model.train_text_encoder && plan.data.precompute_text_embeddings {
        data.reject(
            "precompute_text_embeddings",
            "prompts cannot be encoded once when the text encoder trains: set this to false, or [model] train_text_encoder to false",
        );
    }
    // The configuration in force, which a run writes, has these keys in any case, with the UNet's values.
    let rates = &plan.optimizer;
    for (key, differs) in [
        ("text_encoder_learning_rate", rates.text_encoder_learning_rate != rates.learning_rate),
        ("text_encoder_weight_decay", rates.text_encoder_weight_decay != rates.weight_decay),
    ] {
        if differs && !plan.model.train_text_encoder {
            optimizer.reject(
                key,
                "the text encoder does not train: set [model] train_text_encoder = true, or leave this out",
            );
        }
    }
    // The schedule ends at 1e-7 and divides by the way down to it.
    if plan.lr_schedule.kind == LrKind::Polynomial && plan.optimizer.learning_rate <= 1e-7 {
        lr_schedule.reject(
            "kind",
            &format!(
                "this schedule ends at 1e-7, and optimizer.learning_rate ({:e}) is not above that: raise it, or use another schedule",
                plan.optimizer.learning_rate
            ),
        );
    }
}

fn refuse_lora(section: &Reader) {
    section.count("rank", 1);
    section.above_zero("alpha");
    section.number("dropout", "at least 0 and below 1", |dropout| (0.0..1.0).contains(&dropout));
    section.text("init");
    section.texts("target_modules");
    if section.present() {
        section.reject_section("LoRA is not there yet: leave the section out for a full fine-tune");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Interpolation;

    const LEAST: &str = "[model]\npath = \"m/x\"\n[data]\ninstance_dir = \"photos\"\ninstance_prompt = \"a sks dog\"\n[output]\ndir = \"out\"\n";

    fn draft(more: &str, overrides: &[&str], world_size: usize) -> Draft {
        let overrides: Vec<String> = overrides.iter().map(|item| item.to_string()).collect();
        Draft::parse("t.toml", &format!("{LEAST}{more}"), &overrides, world_size).unwrap()
    }

    #[test]
    fn defaults_are_the_contracts() {
        let draft = draft("", &[], 1);
        assert_eq!(draft.problems, Vec::<String>::new());
        let plan = draft.plan;
        assert_eq!(plan.model.source, ModelSource::Hub { id: "m/x".to_string(), revision: None });
        assert_eq!((plan.data.resolution, plan.data.interpolation), (512, Interpolation::Bilinear));
        assert_eq!((plan.train.batch_size, plan.train.accumulation, plan.train.epochs), (4, 1, 1));
        assert_eq!((plan.train.max_steps, plan.train.max_grad_norm, plan.train.seed), (None, Some(1.0), None));
        assert_eq!((plan.optimizer.learning_rate, plan.optimizer.text_encoder_learning_rate), (5e-6, 5e-6));
        assert_eq!((plan.optimizer.weight_decay, plan.optimizer.epsilon), (0.01, 1e-8));
        assert_eq!((plan.zero.stage, plan.zero.timeout_seconds), (None, 600.0));
        assert_eq!((plan.zero.places().map(|(_, place)| place), plan.memory), ([None; 3], MemoryPlan::default()));
        assert!(plan.checkpoint.on_interrupt && plan.prior.is_none() && plan.replay.is_none());
    }

    #[test]
    fn stage_and_learning_rate_follow_the_ranks() {
        let plan =
            draft("[optimizer]\nlearning_rate = 1e-6\nscale_lr = true\n", &["train.gradient_accumulation_steps=2"], 3)
                .plan;
        assert_eq!(plan.optimizer.learning_rate, 1e-6 * 24.0);
        assert_eq!(plan.optimizer.text_encoder_learning_rate, 1e-6 * 24.0);
        let own = draft("[optimizer]\nscale_lr = true\ntext_encoder_learning_rate = 1e-7\n", &[], 2).plan;
        assert_eq!(own.optimizer.text_encoder_learning_rate, 1e-7);
        assert_eq!(draft("[zero]\nstage = 3\n", &[], 1).plan.zero.stage, Some(3));
    }

    #[test]
    fn the_resolved_configuration_loads_to_the_same_plan() {
        let everything = "image_interpolation = \"lanczos\"\n\
            [prior]\nclass_dir = \"class\"\nclass_prompt = \"a \\\"dog\\\"\"\nloss_weight = 0.7\n\
            [train]\nmax_steps = 7\nseed = 9007199254740993\nsnr_gamma = 5\nsnr_gamma_v = \"plus_one\"\nrecompute = true\nmax_grad_norm = 0\nmixed_precision = \"fp16\"\nloss_scale_window = 500\n\
            [optimizer]\nkind = \"adamw8bit\"\nmaster_dtype = \"bf16\"\nlearning_rate = 3.3e-7\nscale_lr = true\nbeta2 = 0.95\n\
            [lr_schedule]\nkind = \"cosine_with_restarts\"\ncycles = 3\nwarmup_steps = 2\n\
            [zero]\nreduce_dtype = \"bf16\"\ncollectives = \"host\"\ntimeout_seconds = 0.5\nstage = 1\noffload_params = \"none\"\noffload_optimizer = \"nvme\"\n\
            offload_gradients = \"host\"\nnvme_dir = \"fast\"\ngrad_accum_dtype = \"bf16\"\nprefetch = false\n\
            [memory]\nvram = \"3.7GiB\"\nram = \"24GB\"\n\
            [checkpoint]\nevery = 5\nkeep = 2\nresume = \"checkpoint-5\"\n\
            [replay]\ndraws = \"d.safetensors\"\npixels = \"recorded\"\nsave_gradients = \"g.safetensors\"\n";
        // The section of [data] is last in LEAST but for [output], so its key goes through --set.
        let (first, rest) = everything.split_once('\n').unwrap();
        for (more, overrides) in [("", vec![]), (rest, vec!["data.".to_string() + &first.replace(" = ", "=")])] {
            let overrides: Vec<&str> = overrides.iter().map(String::as_str).collect();
            let draft = draft(more, &overrides, 3);
            assert_eq!(draft.problems, Vec::<String>::new());
            let text = draft.plan.to_toml().unwrap();
            let again = Draft::parse("config.toml", &text, &[], 1).unwrap();
            assert_eq!(again.problems, Vec::<String>::new(), "{text}");
            assert_eq!(again.plan, draft.plan, "{text}");
        }
    }
}

//! [`RunPlan`]: what will happen, in types. Everything below the program's surface is told by these values alone;
//! nothing there reads flags, files of configuration or the environment.

use anyhow::Result;

use crate::data::{CaptionOptions, DatasetOptions, KEEP_BYTES};

pub use super::data::{DataPlan, PriorPlan};
pub use super::memory::{MemoryPlan, parse_size};
pub use super::model::{DeviceKind, ModelPlan, ModelSource};
pub use super::optimizer::{LrKind, LrSchedulePlan, MasterDtype, OptimizerKind, OptimizerPlan};
pub use super::output::{CheckpointPlan, OutputPlan, ReplayPixels, ReplayPlan, Resume, SaveDtype};
pub use super::train::{MixedPrecision, TrainPlan};
pub use super::validation::{ScoresPlan, ValidationPlan};
pub use super::zero::{GradAccumDtype, ReduceDtype, ZeroPlan};

/// A validated run. Values are final: `"auto"` is resolved wherever the configuration alone can, and learning rates
/// are scaled. What is left to the planner, stage and tiers, is `None`.
#[derive(Clone, Debug, PartialEq)]
pub struct RunPlan {
    pub model: ModelPlan,
    pub data: DataPlan,
    /// Present under prior preservation.
    pub prior: Option<PriorPlan>,
    pub train: TrainPlan,
    pub optimizer: OptimizerPlan,
    pub lr_schedule: LrSchedulePlan,
    pub zero: ZeroPlan,
    pub memory: MemoryPlan,
    pub checkpoint: CheckpointPlan,
    /// Present if pictures are made during the run.
    pub validation: Option<ValidationPlan>,
    pub output: OutputPlan,
    /// Present when every draw comes from a record.
    pub replay: Option<ReplayPlan>,
}

/// A choice that may be left to the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Toggle {
    Auto,
    On,
    Off,
}

impl Toggle {
    pub(super) fn value(self) -> toml::Value {
        match self {
            Toggle::Auto => "auto".into(),
            Toggle::On => true.into(),
            Toggle::Off => false.into(),
        }
    }
}

/// One section of `config.toml`, written key by key; what is `None` is left out.
#[derive(Default)]
pub(super) struct Writer(toml::Table);

impl Writer {
    pub fn put(mut self, key: &str, value: impl Into<toml::Value>) -> Self {
        self.0.insert(key.to_string(), value.into());
        self
    }

    pub fn put_count(self, key: &str, value: usize) -> Self {
        self.put(key, value as i64)
    }

    pub fn put_some(self, key: &str, value: Option<impl Into<toml::Value>>) -> Self {
        match value {
            Some(value) => self.put(key, value),
            None => self,
        }
    }

    pub fn put_path(self, key: &str, path: &std::path::Path) -> Self {
        // Paths come from TOML strings, so they are UTF-8.
        self.put(key, path.to_string_lossy().into_owned())
    }

    pub fn finish(self) -> toml::Table {
        self.0
    }
}

impl RunPlan {
    /// How the run's pictures are opened. `verify`: every one is decoded, so that damaged ones are found now.
    pub fn dataset_options(&self, verify: bool) -> DatasetOptions {
        DatasetOptions {
            instance_dir: self.data.instance_dir.clone(),
            captions: self.data.captions.then(|| CaptionOptions {
                column: self.data.caption_column.clone(),
                fallback: Some(self.data.instance_prompt.clone()).filter(|prompt| !prompt.is_empty()),
            }),
            class: self.prior.as_ref().map(|prior| (prior.class_dir.clone(), prior.num_class_images)),
            resolution: self.data.resolution,
            center_crop: self.data.center_crop,
            random_flip: self.data.random_flip,
            interpolation: self.data.interpolation,
            keep_bytes: KEEP_BYTES,
            verify,
            decode_bytes: None,
        }
    }

    /// The resolved configuration as TOML. Loaded again, by any number of ranks, it gives this plan. Fails only if a
    /// value cannot be written, such as a seed of 2^63 or more (TOML's integers have 64 bits and a sign).
    pub fn to_toml(&self) -> Result<String> {
        let mut sections = toml::Table::new();
        let mut add = |name: &str, section: toml::Table| sections.insert(name.to_string(), section.into());
        add("model", self.model.write());
        add("data", self.data.write());
        if let Some(prior) = &self.prior {
            add("prior", prior.write());
        }
        add("train", self.train.write()?);
        add("optimizer", self.optimizer.write());
        add("lr_schedule", self.lr_schedule.write());
        add("zero", self.zero.write());
        if let Some(memory) = self.memory.write() {
            add("memory", memory);
        }
        add("checkpoint", self.checkpoint.write());
        if let Some(validation) = &self.validation {
            add("validation", validation.write()?);
        }
        add("output", self.output.write());
        if let Some(replay) = &self.replay {
            add("replay", replay.write());
        }
        Ok(toml::to_string(&sections)?)
    }
}

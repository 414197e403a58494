//! Row 3: what a run tells of itself while it goes on: `metrics.jsonl`, always, and the trackers that
//! `output.trackers` names. Only rank 0 writes. Reading it back is [`crate::report`].

mod messages;
mod metrics;
mod profile;
#[cfg(test)]
mod reader;
mod tensorboard;

use std::path::Path;

use anyhow::Result;

pub use metrics::{Kept, MicroRow, StepRow};
pub use profile::Profiler;

use metrics::Metrics;
use tensorboard::EventFile;

/// A tracker that `output.trackers` can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracker {
    /// `metrics.jsonl`, which is written whether it is named or not.
    Jsonl,
    /// Event files in `logs/`.
    TensorBoard,
}

/// One validation picture.
#[derive(Clone, Copy, Debug)]
pub struct Picture<'a> {
    /// Its place among the pictures of its step; the same number is the same prompt and the same noise at every step.
    pub number: usize,
    pub prompt: &'a str,
    /// The whole PNG file.
    pub png: &'a [u8],
    pub width: u32,
    pub height: u32,
}

/// Everything that is told of a run, to whoever is to hear of it. All of it does nothing on ranks other than 0.
pub struct Trackers {
    metrics: Metrics,
    tensorboard: Option<EventFile>,
    /// The step the run goes on from.
    step: u64,
}

impl Trackers {
    /// Writes nothing until it is opened.
    pub fn closed() -> Self {
        Trackers { metrics: Metrics::closed(), tensorboard: None, step: 0 }
    }

    /// Opens what `trackers` names in the output folder `dir`. What is there beyond what is `kept`, of a run that went on
    /// after the checkpoint this one resumes from, is cut or marked as void; where nothing is kept that is all of it.
    pub fn open(dir: &Path, trackers: &[Tracker], kept: Kept, writes: bool) -> Result<Self> {
        let metrics = Metrics::open(dir, kept, writes)?;
        let step = kept.step;
        let logs = dir.join("logs");
        if writes && step == 0 {
            tensorboard::remove_old(&logs)?;
        }
        let wanted = writes && trackers.contains(&Tracker::TensorBoard);
        let tensorboard = if wanted { Some(EventFile::create(&logs, step)?) } else { None };
        Ok(Trackers { metrics, tensorboard, step })
    }

    /// The resolved configuration, as TOML. Once, when the run begins or goes on.
    pub fn config(&mut self, toml: &str) -> Result<()> {
        match &mut self.tensorboard {
            Some(file) => file.text(self.step, "config", toml),
            None => Ok(()),
        }
    }

    /// A micro-batch is done.
    pub fn micro_step(&mut self, row: &MicroRow) -> Result<()> {
        self.metrics.write(row)
    }

    /// An optimizer step is done.
    pub fn step(&mut self, row: &StepRow) -> Result<()> {
        self.metrics.write(row)?;
        if row.skipped {
            // Another attempt at the same step follows, and TensorBoard shows a step once.
            return Ok(());
        }
        let mut values = vec![
            ("loss", row.loss),
            ("lr", row.lr),
            ("grad_norm", row.grad_norm),
            ("images_per_second", row.images_per_second),
            ("peak_rss_bytes", row.peak_rss_bytes as f64),
        ];
        if let Some(scale) = row.loss_scale {
            values.push(("loss_scale", scale));
        }
        if row.peak_vram_bytes > 0 {
            values.push(("peak_vram_bytes", row.peak_vram_bytes as f64));
        }
        self.scalars(row.step, &values)
    }

    /// Any other numbers of a step. They are not in `metrics.jsonl`.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        match &mut self.tensorboard {
            Some(file) => file.scalars(step, values),
            None => Ok(()),
        }
    }

    /// Validation pictures of a step (0: from before training).
    pub fn pictures(&mut self, step: u64, pictures: &[Picture]) -> Result<()> {
        match &mut self.tensorboard {
            Some(file) => pictures.iter().try_for_each(|picture| file.picture(step, picture)),
            None => Ok(()),
        }
    }
}

//! `metrics.jsonl`: one row per micro-batch and one per optimizer step, written by rank 0 only.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

/// The row of a micro-batch. `loss` is the mean over the items of all ranks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MicroRow {
    /// Counted from 0 over the whole run.
    pub micro_step: u64,
    /// The optimizer step it belongs to, counted from 1.
    pub step: u64,
    pub loss: f64,
    pub lr: f64,
    /// Largest and mean difference of our images from recorded ones, in 8-bit levels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pixels_max_levels: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pixels_mean_levels: Option<f64>,
}

/// The row of an optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepRow {
    /// Counted from 1.
    pub step: u64,
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// The rate this step used.
    pub lr: f64,
    pub seconds: f64,
    pub images_per_second: f64,
    /// 0 without a GPU.
    pub peak_vram_bytes: u64,
    /// Of rank 0's process.
    pub peak_rss_bytes: u64,
    pub skipped: bool,
}

/// The open file; nothing on ranks other than 0.
pub struct Metrics {
    path: PathBuf,
    file: Option<File>,
}

impl Metrics {
    /// Writes nothing until a file is opened.
    pub fn closed() -> Self {
        Metrics { path: PathBuf::new(), file: None }
    }

    /// Opens `metrics.jsonl` in `dir` at `step`: rows past it (of a run that went on after the checkpoint it resumes
    /// from) are cut, as is a torn last line.
    pub fn open(dir: &Path, step: u64, writes: bool) -> Result<Self> {
        let path = dir.join("metrics.jsonl");
        if !writes {
            return Ok(Metrics { path, file: None });
        }
        let kept = if step > 0 && path.exists() { rows_until(&path, step)? } else { Vec::new() };
        let aside = dir.join(".metrics.jsonl");
        let opening = || format!("writing {}", path.display());
        std::fs::write(&aside, kept.concat()).with_context(opening)?;
        std::fs::rename(&aside, &path).with_context(opening)?;
        let file = OpenOptions::new().append(true).open(&path).with_context(opening)?;
        Ok(Metrics { path, file: Some(file) })
    }

    /// Appends one row; whole lines only.
    pub fn write(&mut self, row: &impl Serialize) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let line = serde_json::to_string(row)? + "\n";
        file.write_all(line.as_bytes()).with_context(|| format!("writing {}", self.path.display()))
    }
}

fn rows_until(path: &Path, step: u64) -> Result<Vec<String>> {
    let file = File::open(path).with_context(|| format!("reading {}", path.display()))?;
    let mut kept = Vec::new();
    for line in BufReader::new(file).lines() {
        let line = line.with_context(|| format!("reading {}", path.display()))?;
        let Ok(row) = serde_json::from_str::<Value>(&line) else { break };
        if row["step"].as_u64().is_some_and(|s| s <= step) {
            kept.push(line + "\n");
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_past_the_checkpoint_and_torn_lines_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"micro_step\":0,\"step\":1}\n{\"step\":1}\n{\"step\":2}\n{\"step\":3,\"lo").unwrap();
        let mut metrics = Metrics::open(dir.path(), 1, true).unwrap();
        metrics.write(&serde_json::json!({ "step": 2 })).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"micro_step\":0,\"step\":1}\n{\"step\":1}\n{\"step\":2}\n");
        Metrics::open(dir.path(), 0, true).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    }
}

//! `metrics.jsonl`: one row per micro-batch and one per optimizer step, written by rank 0 only.

use std::fs::{File, OpenOptions};
use std::io::Write;
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
    /// Of rank 0: what its device tier held; of memory of the process where the CPU computes.
    pub peak_vram_bytes: u64,
    /// Of rank 0's process.
    pub peak_rss_bytes: u64,
    /// The update was left out: something overflowed in fp16. The row of the step's next attempt follows.
    pub skipped: bool,
    /// By which the gradients were multiplied on their way, under fp16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
}

/// How far a run has come whose rows are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Optimizer steps made.
    pub step: u64,
    /// Micro-batches run, those of skipped steps among them.
    pub micro_step: u64,
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

    /// Opens `metrics.jsonl` in `dir`: rows past what is `kept` (of a run that went on after the checkpoint it resumes
    /// from) are cut, as is a torn last line.
    pub fn open(dir: &Path, kept: Kept, writes: bool) -> Result<Self> {
        let path = dir.join("metrics.jsonl");
        if !writes {
            return Ok(Metrics { path, file: None });
        }
        let kept = if kept.micro_step > 0 && path.exists() { rows_until(&path, kept)? } else { Vec::new() };
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

fn rows_until(path: &Path, until: Kept) -> Result<Vec<Vec<u8>>> {
    let text = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let mut kept = Vec::new();
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        // A damaged row, or one that was cut off, is no reason to lose those behind it.
        let Ok(row @ Value::Object(_)) = serde_json::from_slice(line) else { continue };
        let past = match row["micro_step"].as_u64() {
            Some(micro_step) => micro_step >= until.micro_step,
            // A skipped step has the number of the one that is still to be made.
            None => row["skipped"] != true && row["step"].as_u64().is_none_or(|step| step > until.step),
        };
        if past {
            break;
        }
        kept.push([line.trim_ascii_end(), b"\n"].concat());
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
        let mut metrics = Metrics::open(dir.path(), Kept { step: 1, micro_step: 1 }, true).unwrap();
        metrics.write(&serde_json::json!({ "step": 2 })).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"micro_step\":0,\"step\":1}\n{\"step\":1}\n{\"step\":2}\n");
        Metrics::open(dir.path(), Kept::default(), true).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn a_damaged_row_does_not_take_the_others_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(&path, b"{\"step\":1}\ngarbage\n\xff\n4\n{\"step\":2}\r\n{\"step\":3}\n").unwrap();
        Metrics::open(dir.path(), Kept { step: 2, micro_step: 2 }, true).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n");
    }

    #[test]
    fn a_skipped_step_belongs_to_the_time_before_the_checkpoint_or_after() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let micro = |n: u64, step: u64| format!("{{\"micro_step\":{n},\"step\":{step}}}\n");
        let skipped = "{\"step\":2,\"skipped\":true}\n";
        let done = |step: u64| format!("{{\"step\":{step},\"skipped\":false}}\n");
        let rows =
            [micro(0, 1), done(1), micro(1, 2), skipped.into(), micro(2, 2), skipped.into(), micro(3, 2), done(2)];
        for (kept, count) in [((1, 1), 2), ((1, 2), 4), ((1, 3), 6), ((2, 4), 8), ((0, 0), 0)] {
            std::fs::write(&path, rows.concat()).unwrap();
            Metrics::open(dir.path(), Kept { step: kept.0, micro_step: kept.1 }, true).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), rows[..count].concat(), "{kept:?}");
        }
    }
}

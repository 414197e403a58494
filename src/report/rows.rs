//! `metrics.jsonl` as it grows: every look reads on from where the last one ended.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::Deserialize;

/// A row of an optimizer step. What is null in the file, or not there, is none.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
pub struct StepRow {
    pub step: u64,
    pub loss: Option<f64>,
    pub grad_norm: Option<f64>,
    pub lr: Option<f64>,
    pub seconds: Option<f64>,
    pub images_per_second: Option<f64>,
    pub peak_vram_bytes: Option<f64>,
    pub peak_rss_bytes: Option<f64>,
    pub skipped: bool,
}

/// Any line: a micro-batch's has its number.
#[derive(Deserialize)]
struct Line {
    micro_step: Option<u64>,
    #[serde(flatten)]
    row: StepRow,
}

/// The file, as far as it has been read.
#[derive(Debug, Default)]
pub struct Rows {
    path: PathBuf,
    /// Device and number of the file that was read: a run that goes on puts another in its place.
    file: (u64, u64),
    offset: u64,
    pub steps: Vec<StepRow>,
    /// Attempts at steps that were skipped.
    pub skipped: u64,
    /// Whole lines that are no rows.
    pub unreadable: usize,
}

impl Rows {
    pub fn of(path: PathBuf) -> Rows {
        Rows { path, ..Rows::default() }
    }

    /// Reads what has been added. A line that is still being written is left for the next time.
    pub fn refresh(&mut self) -> std::io::Result<()> {
        let mut file = File::open(&self.path)?;
        let there = file.metadata()?;
        let identity = (there.dev(), there.ino());
        if identity != self.file || there.len() < self.offset {
            *self = Rows { path: std::mem::take(&mut self.path), file: identity, ..Rows::default() };
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut added = Vec::new();
        file.read_to_end(&mut added)?;
        let whole = added.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        added[..whole].split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()).for_each(|line| {
            match serde_json::from_slice::<Line>(line) {
                Ok(line) if line.row.step == 0 => self.unreadable += 1,
                Ok(line) if line.micro_step.is_none() => self.take(line.row),
                Ok(_) => {}
                Err(_) => self.unreadable += 1,
            }
        });
        self.offset += whole as u64;
        Ok(())
    }

    /// A step that comes again takes the place of what was said of it and of later ones.
    fn take(&mut self, row: StepRow) {
        if row.skipped {
            // No step was made.
            self.skipped += 1;
            return;
        }
        while self.steps.last().is_some_and(|last| last.step >= row.step) {
            self.steps.pop();
        }
        self.steps.push(row);
    }

    /// When the last row came, in seconds since 1970.
    pub fn written(&self) -> Option<u64> {
        let modified = fs::metadata(&self.path).ok()?.modified().ok()?;
        Some(modified.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_growing_file_is_read_on_and_a_torn_row_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(
            &path,
            "{\"micro_step\":0,\"step\":1,\"loss\":9}\n{\"step\":1,\"loss\":2.5,\"grad_norm\":null}\n{\"st",
        )
        .unwrap();
        let mut rows = Rows::of(path.clone());
        rows.refresh().unwrap();
        assert_eq!(rows.steps, [StepRow { step: 1, loss: Some(2.5), ..StepRow::default() }]);
        fs::write(&path, fs::read_to_string(&path).unwrap() + "ep\":2,\"loss\":2,\"skipped\":true}\nnonsense\n{}\n")
            .unwrap();
        rows.refresh().unwrap();
        assert_eq!((rows.steps.len(), rows.skipped, rows.unreadable), (1, 1, 2));
        // A resumed run cuts rows and puts the file in place anew.
        fs::write(dir.path().join("new"), "{\"step\":1,\"loss\":7}\n").unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        rows.refresh().unwrap();
        assert!(rows.steps.len() == 1 && rows.steps[0].loss == Some(7.0) && rows.unreadable == 0);
    }

    #[test]
    fn a_step_that_comes_again_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let line = |step: u64, loss: u64| format!("{{\"step\":{step},\"loss\":{loss}}}\n");
        fs::write(&path, line(1, 1) + &line(2, 2) + &line(3, 3) + &line(2, 20)).unwrap();
        let mut rows = Rows::of(path);
        rows.refresh().unwrap();
        let found: Vec<(u64, Option<f64>)> = rows.steps.iter().map(|row| (row.step, row.loss)).collect();
        assert_eq!(found, [(1, Some(1.0)), (2, Some(20.0))]);
    }
}

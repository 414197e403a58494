//! The folder of validation pictures, `samples/` of the output folder, which rank 0 keeps in order:
//!
//! ```text
//! samples/step-000100/00003.png     picture number 3 after step 100; step 0 is before training
//! samples/before-after.png           all of them before training, and under each the same after the last step
//! samples/index.jsonl               a row for each: step, number, prompt, negative_prompt, seed, file
//! samples/scores.jsonl              a row for each scored step: step, likeness, drift
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use image::RgbImage;
use serde_json::Value;

use crate::sample::write_png;

pub struct Samples {
    dir: PathBuf,
}

/// The two files with a row for each of something.
const TABLES: [&str; 2] = ["index.jsonl", "scores.jsonl"];

impl Samples {
    pub fn of(output_dir: &Path) -> Self {
        Samples { dir: output_dir.join("samples") }
    }

    /// Where the pictures of a step are.
    pub fn folder(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step:06}"))
    }

    pub fn file(&self, step: u64, number: u64) -> PathBuf {
        self.folder(step).join(format!("{number:05}.png"))
    }

    /// Makes way for a run that goes on after `step`, or starts (None): what lies past it is of another one.
    pub fn begin(&self, step: Option<u64>) -> Result<()> {
        let goes = |found: u64| step.is_none_or(|step| found > step);
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).with_context(|| self.dir.display().to_string()),
        };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let number = name.strip_prefix("step-").and_then(|n| n.parse::<u64>().ok());
            if number.is_some_and(goes) {
                fs::remove_dir_all(entry.path()).with_context(|| format!("removing {}", entry.path().display()))?;
            }
        }
        TABLES.iter().try_for_each(|table| self.rewrite(table, |found| !goes(found), &[]))
    }

    /// Whether the pictures of a step are all there.
    pub fn has(&self, step: u64) -> bool {
        self.rows(TABLES[0]).iter().any(|row| row["step"] == step)
    }

    /// Notes the pictures of a step, once they are all there.
    pub fn note(&self, step: u64, rows: &[Value]) -> Result<()> {
        self.rewrite(TABLES[0], |found| found != step, rows)
    }

    pub fn note_scores(&self, step: u64, row: Value) -> Result<()> {
        self.rewrite(TABLES[1], |found| found != step, &[row])
    }

    /// The pictures of a step with these numbers.
    pub fn read(&self, step: u64, numbers: std::ops::Range<u64>) -> Result<Vec<RgbImage>> {
        let read = |number| -> Result<RgbImage> {
            let path = self.file(step, number);
            Ok(image::open(&path).with_context(|| format!("reading {}", path.display()))?.into_rgb8())
        };
        numbers.map(read).collect()
    }

    /// The scores of a step, if it has any.
    pub fn scores(&self, step: u64) -> Option<Value> {
        self.rows(TABLES[1]).into_iter().find(|row| row["step"] == step)
    }

    /// Puts the pictures 0 to `count` from before training over those after `step`.
    pub fn write_before_after(&self, step: u64, count: u64) -> Result<PathBuf> {
        const GAP: u32 = 2;
        let rows = [self.read(0, 0..count)?, self.read(step, 0..count)?];
        let widths = rows.iter().map(|row| row.iter().map(|image| image.width() + GAP).sum::<u32>());
        let heights = rows.each_ref().map(|row| row.iter().map(|image| image.height()).max().unwrap_or(0) + GAP);
        let size = (widths.max().unwrap_or(0).max(GAP + 1) - GAP, heights[0] + heights[1].max(GAP + 1) - GAP);
        let mut sheet = RgbImage::from_pixel(size.0, size.1, image::Rgb([255; 3]));
        for (row, top) in rows.iter().zip([0, heights[0]]) {
            let mut left = 0;
            for image in row {
                image::imageops::replace(&mut sheet, image, left, top.into());
                left += i64::from(image.width() + GAP);
            }
        }
        let path = self.dir.join("before-after.png");
        write_png(&path, &sheet, None)?;
        Ok(path)
    }

    fn rows(&self, table: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.dir.join(table)).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Replaces a table by those of its rows whose step `stays`, and `more`; whole or not at all.
    fn rewrite(&self, table: &str, stays: impl Fn(u64) -> bool, more: &[Value]) -> Result<()> {
        let path = self.dir.join(table);
        if more.is_empty() && !path.exists() {
            return Ok(());
        }
        let mut rows = self.rows(table);
        rows.retain(|row| row["step"].as_u64().is_some_and(&stays));
        rows.extend_from_slice(more);
        let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
        let aside = self.dir.join(format!(".{table}"));
        fs::write(&aside, text)
            .and_then(|()| fs::rename(&aside, &path))
            .with_context(|| format!("writing {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_run_that_goes_on_keeps_what_came_before() {
        let home = tempfile::tempdir().unwrap();
        let samples = Samples::of(home.path());
        samples.begin(None).unwrap();
        for step in [0, 5, 10] {
            fs::create_dir_all(samples.folder(step)).unwrap();
            RgbImage::new(2, 2).save(samples.file(step, 0)).unwrap();
            samples.note(step, &[json!({ "step": step, "number": 0 })]).unwrap();
            samples.note_scores(step, json!({ "step": step, "drift": 1.0 })).unwrap();
        }
        samples.begin(Some(5)).unwrap();
        assert_eq!([0, 5, 10].map(|step| samples.has(step)), [true, true, false]);
        assert!(samples.folder(5).is_dir() && !samples.folder(10).exists());
        assert_eq!(samples.read(5, 0..1).unwrap().len(), 1);
        assert_eq!(samples.rows("scores.jsonl").len(), 2);
        assert_eq!(samples.scores(5).unwrap()["drift"], 1.0);
        let sheet = image::open(samples.write_before_after(5, 1).unwrap()).unwrap();
        assert_eq!((sheet.width(), sheet.height()), (2, 6));
        samples.begin(None).unwrap();
        assert!(!samples.has(0) && !samples.folder(0).exists());
    }
}

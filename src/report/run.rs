//! A run's output folder, as it is at the moment of looking.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::rows::{Rows, StepRow};
use crate::Refusal;

/// What a run has left so far.
pub struct Run {
    pub dir: PathBuf,
    /// The folder's name, or as much of its path as tells it from others in the same report.
    pub name: String,
    pub rows: Rows,
    pub config: toml::Table,
    /// In order of steps, then numbers.
    pub pictures: Vec<Picture>,
    /// In order of steps.
    pub scores: Vec<Scores>,
}

/// A line of `samples/index.jsonl`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
pub struct Picture {
    /// 0: before training.
    pub step: u64,
    pub number: u64,
    pub prompt: String,
    pub negative_prompt: Option<String>,
    pub seed: Option<serde_json::Number>,
    /// From `samples/`.
    pub file: PathBuf,
}

/// A line of `samples/scores.jsonl`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
pub struct Scores {
    pub step: u64,
    /// Between 0 and 1: how near pictures with the new word are to the subject.
    pub likeness: Option<f64>,
    /// Mean change of the class's pictures since before training, in 8-bit levels.
    pub drift: Option<f64>,
}

impl Run {
    /// Reads the run in `dir`; a folder that holds none is a refusal.
    pub fn open(dir: &Path) -> Result<Run> {
        let shown = dir.display();
        let none = |why: &str| {
            let remedy = "name the folder that a run writes to (dir under [output])";
            Refusal::error(format!("{shown} {why}: {remedy}"))
        };
        if !dir.exists() {
            return Err(none("does not exist"));
        }
        if !dir.is_dir() {
            return Err(none("is not a folder"));
        }
        if !dir.join("metrics.jsonl").is_file() {
            return Err(none("holds no run (there is no metrics.jsonl in it)"));
        }
        let dir = dir.canonicalize().with_context(|| format!("reading {shown}"))?;
        let name =
            dir.file_name().map_or_else(|| dir.display().to_string(), |name| name.to_string_lossy().into_owned());
        let rows = Rows::of(dir.join("metrics.jsonl"));
        let mut run = Run { dir, name, rows, config: toml::Table::new(), pictures: Vec::new(), scores: Vec::new() };
        run.refresh()?;
        if run.rows.steps.is_empty() && run.rows.unreadable > 0 {
            return Err(none("holds no run (the lines of its metrics.jsonl are no steps of one)"));
        }
        Ok(run)
    }

    /// Reads again what may have changed.
    pub fn refresh(&mut self) -> Result<()> {
        let path = self.dir.join("metrics.jsonl");
        self.rows.refresh().with_context(|| format!("reading {}", path.display()))?;
        let config = fs::read_to_string(self.dir.join("config.toml")).unwrap_or_default();
        // A configuration that cannot be read is one that is not shown.
        self.config = config.parse().unwrap_or_default();
        let samples = self.dir.join("samples");
        let pictures = lines::<Picture>(&samples.join("index.jsonl")).into_iter();
        self.pictures = latest(pictures.filter(|picture| is_inside(&samples, &picture.file)), |p| (p.step, p.number));
        self.scores = latest(lines::<Scores>(&samples.join("scores.jsonl")).into_iter(), |scores| (scores.step, 0));
        Ok(())
    }

    pub fn steps(&self) -> &[StepRow] {
        &self.rows.steps
    }

    /// Attempts at steps that were skipped.
    pub fn skipped(&self) -> u64 {
        self.rows.skipped
    }

    pub fn last_step(&self) -> u64 {
        self.steps().last().map_or(0, |row| row.step)
    }

    /// How many there will be, where the configuration says.
    pub fn total_steps(&self) -> Option<u64> {
        self.setting("train", "max_steps")?.as_integer().and_then(|steps| u64::try_from(steps).ok())
    }

    pub fn setting(&self, section: &str, key: &str) -> Option<&toml::Value> {
        self.config.get(section)?.get(key)
    }

    pub fn picture_path(&self, picture: &Picture) -> PathBuf {
        self.dir.join("samples").join(&picture.file)
    }
}

/// The lines of a file that are a `T`; none if it is not there. The last may be half-written.
fn lines<T: for<'a> Deserialize<'a>>(path: &Path) -> Vec<T> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The last of those with the same key, in order of keys: a resumed run says some things again.
fn latest<T>(items: impl Iterator<Item = T>, key: impl Fn(&T) -> (u64, u64)) -> Vec<T> {
    items.map(|item| (key(&item), item)).collect::<BTreeMap<_, _>>().into_values().collect()
}

/// Whether `file` is a file within `samples`, links included: nothing else is shown or served.
fn is_inside(samples: &Path, file: &Path) -> bool {
    let plain = file.components().all(|part| matches!(part, Component::Normal(_)));
    let within = || {
        let (samples, file) = (samples.canonicalize().ok()?, samples.join(file).canonicalize().ok()?);
        Some(file.starts_with(samples) && file.is_file())
    };
    plain && within().unwrap_or(false)
}

/// Gives runs whose folders have the same name as much of their paths as tells them apart.
pub fn name_apart(runs: &mut [Run]) {
    let parts = |run: &Run| run.dir.components().count();
    for depth in 2..=runs.iter().map(parts).max().unwrap_or(0) {
        let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
        for run in runs.iter_mut() {
            if names.iter().filter(|name| **name == run.name).count() > 1 {
                let skipped = parts(run).saturating_sub(depth);
                run.name = run.dir.components().skip(skipped).collect::<PathBuf>().display().to_string();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Forged;
    use super::*;

    #[test]
    fn a_folder_that_is_no_run_is_refused_by_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let told = |path: &Path| {
            let error = Run::open(path).err().unwrap();
            assert!(error.is::<Refusal>());
            error.to_string()
        };
        assert!(told(&dir.path().join("x")).contains("x does not exist"));
        assert!(told(dir.path()).contains("no metrics.jsonl"));
        fs::write(dir.path().join("metrics.jsonl"), "{\"accuracy\": 1}\n").unwrap();
        assert!(told(dir.path()).contains("no steps"));
        assert!(told(&dir.path().join("metrics.jsonl")).contains("not a folder"));
        fs::write(dir.path().join("metrics.jsonl"), "").unwrap();
        assert!(Run::open(dir.path()).unwrap().steps().is_empty());
    }

    #[test]
    fn pictures_come_in_order_once_and_only_from_within() {
        let forged = Forged::new("run", 20);
        let samples = forged.dir().join("samples");
        fs::create_dir_all(samples.join("step-000000")).unwrap();
        fs::write(samples.join("step-000000/00000.png"), "x").unwrap();
        fs::write(samples.join("step-000000/00001.png"), "y").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", samples.join("step-000000/link.png")).unwrap();
        let line = |step: u64, number: u64, file: &str| {
            format!("{{\"step\":{step},\"number\":{number},\"prompt\":\"p\",\"file\":{file:?}}}\n")
        };
        let index = [
            line(0, 1, "step-000000/00001.png"),
            line(0, 0, "step-000000/00000.png"),
            line(0, 0, "step-000000/00000.png"),
            line(5, 0, "../config.toml"),
            line(5, 1, "/etc/passwd"),
            line(5, 2, "step-000000/link.png"),
            line(5, 3, "step-000005/00003.png"),
            "{\"step\": 5, \"num".to_string(),
        ];
        fs::write(samples.join("index.jsonl"), index.concat()).unwrap();
        fs::write(samples.join("scores.jsonl"), "{\"step\":5,\"likeness\":null}\n{\"step\":0,\"drift\":0.0}\n")
            .unwrap();
        let run = Run::open(forged.dir()).unwrap();
        let found: Vec<(u64, u64)> = run.pictures.iter().map(|picture| (picture.step, picture.number)).collect();
        assert_eq!(found, [(0, 0), (0, 1)]);
        assert_eq!(run.scores.iter().map(|scores| scores.step).collect::<Vec<_>>(), [0, 5]);
        assert_eq!((run.last_step(), run.total_steps()), (20, Some(20)));
    }

    #[test]
    fn runs_of_the_same_name_are_told_apart() {
        let (one, two) = (Forged::new("a/run", 1), Forged::new("b/run", 1));
        let mut runs = vec![Run::open(one.dir()).unwrap(), Run::open(two.dir()).unwrap()];
        name_apart(&mut runs);
        assert_eq!((runs[0].name.as_str(), runs[1].name.as_str()), ("a/run", "b/run"));
    }
}

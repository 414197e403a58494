//! `[checkpoint]`, `[output]` and `[replay]`: the files a run writes, and those it goes on from.

use std::path::PathBuf;

use super::plan::Writer;
use super::reader::Reader;
use crate::track::Tracker;

#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointPlan {
    /// Optimizer steps between checkpoints; none writes no regular ones.
    pub every: Option<usize>,
    /// The newest so many are kept; none keeps all.
    pub keep: Option<usize>,
    pub resume: Resume,
    /// Write one when the run is interrupted.
    pub on_interrupt: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Resume {
    No,
    /// The newest whole checkpoint in the output folder; a fresh start if there is none.
    Latest,
    Folder(PathBuf),
}

impl CheckpointPlan {
    /// A `resume` that is a bare `checkpoint-N` is looked for in the output folder, as the peers do; any other is a
    /// path of its own.
    pub(super) fn read(section: &Reader, output_dir: &std::path::Path) -> Self {
        let resume = match section.text("resume").as_deref() {
            None | Some("") => Resume::No,
            Some("latest") => Resume::Latest,
            Some(name) if name.starts_with("checkpoint-") && !name.contains('/') => {
                section.expanded("resume", name).map_or(Resume::No, |name| Resume::Folder(output_dir.join(name)))
            }
            Some(path) => section.expanded("resume", path).map_or(Resume::No, Resume::Folder),
        };
        Self {
            every: section.count("every", 1),
            keep: section.count("keep", 1),
            resume,
            on_interrupt: section.flag("on_interrupt", true),
        }
    }

    pub(super) fn write(&self) -> toml::Table {
        let section = Writer::default()
            .put_some("every", self.every.map(|every| every as i64))
            .put_some("keep", self.keep.map(|keep| keep as i64))
            .put("on_interrupt", self.on_interrupt);
        match &self.resume {
            Resume::No => section,
            Resume::Latest => section.put("resume", "latest"),
            Resume::Folder(path) => section.put_path("resume", path),
        }
        .finish()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct OutputPlan {
    pub dir: PathBuf,
    /// Whether another run's files in `dir` may be replaced.
    pub overwrite: bool,
    /// Of the trained parts in the pipeline folder at the end.
    pub save_dtype: SaveDtype,
    pub skip_save_text_encoder: bool,
    /// What the run is told to, besides `metrics.jsonl`, which is always written.
    pub trackers: Vec<Tracker>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveDtype {
    F32,
    F16,
    Bf16,
}

const DTYPES: [(&str, SaveDtype); 3] = [("fp32", SaveDtype::F32), ("fp16", SaveDtype::F16), ("bf16", SaveDtype::Bf16)];

impl OutputPlan {
    pub(super) fn read(section: &Reader) -> Self {
        let dir =
            section.required_path("dir", "write dir = \"…\" under [output], the folder the trained pipeline goes to");
        if section.flag("push_to_hub", false) {
            section.reject(
                "push_to_hub",
                "uploading is not there yet: leave this out, and upload the output folder with `hf upload` afterwards",
            );
        }
        Self {
            dir,
            overwrite: section.flag("overwrite", false),
            save_dtype: section.choice("save_dtype", SaveDtype::F32, &DTYPES.map(|(name, dtype)| (name, Ok(dtype)))),
            skip_save_text_encoder: section.flag("skip_save_text_encoder", false),
            trackers: trackers(section),
        }
    }

    pub(super) fn write(&self) -> toml::Table {
        let dtype = DTYPES.iter().find(|(_, dtype)| *dtype == self.save_dtype).map(|(name, _)| *name);
        Writer::default()
            .put_path("dir", &self.dir)
            .put("overwrite", self.overwrite)
            .put_some("save_dtype", dtype)
            .put("skip_save_text_encoder", self.skip_save_text_encoder)
            .put("trackers", self.trackers.iter().map(|tracker| name(*tracker).into()).collect::<Vec<toml::Value>>())
            .finish()
    }
}

const TRACKERS: [(&str, Tracker); 2] = [("jsonl", Tracker::Jsonl), ("tensorboard", Tracker::TensorBoard)];

fn name(tracker: Tracker) -> &'static str {
    TRACKERS.iter().find(|(_, known)| *known == tracker).map_or("", |(name, _)| name)
}

/// Without the key: `metrics.jsonl` alone.
fn trackers(section: &Reader) -> Vec<Tracker> {
    let Some(names) = section.texts("trackers") else { return vec![Tracker::Jsonl] };
    let mut trackers = Vec::new();
    for name in &names {
        match TRACKERS.iter().find(|(known, _)| known == name) {
            Some((_, tracker)) if trackers.contains(tracker) => {}
            Some((_, tracker)) => trackers.push(*tracker),
            None => {
                let what = format!(
                    "{name:?} is no tracker: use \"tensorboard\" (event files in logs/), \"jsonl\" (metrics.jsonl, written \
                     in any case), or both"
                );
                section.reject("trackers", &what);
            }
        }
    }
    trackers
}

/// Every random draw and the order of images from a record.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplayPlan {
    pub draws: PathBuf,
    pub pixels: ReplayPixels,
    /// Where the first step's gradients go, before clipping.
    pub save_gradients: Option<PathBuf>,
}

/// Whose pixels are trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayPixels {
    Own,
    Recorded,
}

impl ReplayPlan {
    pub(super) fn read(section: &Reader) -> Option<Self> {
        section.present().then(|| Self {
            draws: section.required_path(
                "draws",
                "write draws = \"…\" under [replay], a file of recorded draws, or leave out the whole section",
            ),
            pixels: section.choice(
                "pixels",
                ReplayPixels::Own,
                &[("own", Ok(ReplayPixels::Own)), ("recorded", Ok(ReplayPixels::Recorded))],
            ),
            save_gradients: section.path("save_gradients"),
        })
    }

    pub(super) fn write(&self) -> toml::Table {
        let pixels = match self.pixels {
            ReplayPixels::Own => "own",
            ReplayPixels::Recorded => "recorded",
        };
        let section = Writer::default().put_path("draws", &self.draws).put("pixels", pixels);
        match &self.save_gradients {
            Some(path) => section.put_path("save_gradients", path),
            None => section,
        }
        .finish()
    }
}

//! A model on the Hugging Face Hub -> a folder in diffusers' layout, through the `hf-hub` crate and in its cache
//! (HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE as in the Hub's own library). Only the files that
//! training needs are fetched, and of weights only safetensors. Without a network, what the cache holds is used;
//! nothing here waits longer than [`PATIENCE`] for a sign of life.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::ProgressBar;
use serde_json::Value;

use crate::Refusal;
use crate::config::ModelSource;
use crate::config::model_files::{
    COMPONENTS, Weights, choose_weights, other_variant_problem, pickle_problem, shards_of,
};

/// The longest wait for an answer, or for more of a file.
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest wait for another process that is fetching the same file.
const OTHERS_PATIENCE: Duration = Duration::from_secs(3600);

/// The folder of `source`: itself, or the Hub's model in the cache, fetched if need be. Errors are [`Refusal`]s.
pub fn resolve(source: &ModelSource, variant: Option<&str>) -> Result<PathBuf> {
    match source {
        ModelSource::Folder(path) => Ok(path.clone()),
        ModelSource::Hub { id, revision } => Hub::from_env()?.fetch(id, revision.as_deref(), variant),
    }
}

/// A Hub, and the cache before it.
pub struct Hub {
    pub endpoint: String,
    /// Folder of `models--owner--name`.
    pub cache: PathBuf,
    pub token: Option<String>,
    /// Use the cache alone.
    pub offline: bool,
    pub patience: Duration,
}

impl Hub {
    /// The Hub that the environment describes.
    pub fn from_env() -> Result<Hub> {
        let var = |name: &str| std::env::var(name).ok().map(|value| value.trim().to_string()).filter(|v| !v.is_empty());
        let home = match var("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => {
                let home = std::env::home_dir().context("no home folder for the Hub's cache: set HF_HOME")?;
                home.join(".cache/huggingface")
            }
        };
        let cache = var("HF_HUB_CACHE").map_or(home.join("hub"), PathBuf::from);
        // The token file lies in the home, wherever the cache is.
        let token = var("HF_TOKEN").or_else(|| Cache::new(home.join("hub")).token());
        let yes = |value: String| ["1", "true", "yes", "on"].contains(&value.to_lowercase().as_str());
        Ok(Hub {
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string()),
            cache,
            token,
            offline: var("HF_HUB_OFFLINE").is_some_and(yes),
            patience: PATIENCE,
        })
    }

    /// The snapshot folder of `id` at `revision` (the main branch if none) with every file that training needs. What
    /// the cache holds whole is used as it is, without asking whether there is something newer.
    pub fn fetch(&self, id: &str, revision: Option<&str>, variant: Option<&str>) -> Result<PathBuf> {
        let revision = revision.unwrap_or("main");
        if let Some(folder) = self.cached(id, revision, variant, true) {
            return Ok(folder);
        }
        let failure = if self.offline {
            Failure::Unreachable("HF_HUB_OFFLINE is set".to_string())
        } else {
            match self.download(id, revision, variant) {
                Ok(folder) => return Ok(folder),
                Err(failure) => failure,
            }
        };
        if matches!(failure, Failure::Unreachable(_))
            && let Some(folder) = self.cached(id, revision, variant, false)
        {
            return Ok(folder);
        }
        Err(failure.refusal(id, revision, &self.endpoint))
    }

    /// The snapshot in the cache, if nothing is missing from it. A `strict` look takes a variant's place only for
    /// filled by that variant; otherwise weights without a variant will do.
    fn cached(&self, id: &str, revision: &str, variant: Option<&str>, strict: bool) -> Option<PathBuf> {
        let repo = self.cache.join(Repo::model(id.to_string()).folder_name());
        let commit = std::fs::read_to_string(repo.join("refs").join(revision));
        let folder = repo.join("snapshots").join(commit.as_deref().unwrap_or(revision).trim());
        let names = names_in(&folder);
        let index = read(&folder.join("model_index.json")).ok()?;
        let wanted = wanted(&names, &index, variant).ok()?;
        let whole = wanted.files.iter().all(|name| names.contains(name))
            && wanted.indices.iter().all(|name| {
                let text = std::fs::read_to_string(folder.join(name)).ok();
                let shards = text.and_then(|text| beside(name, &text));
                shards.is_some_and(|shards| shards.iter().all(|shard| names.contains(shard)))
            })
            && (!strict || wanted.exact);
        whole.then_some(folder)
    }

    /// Fetches what is missing of the newest commit of `revision`, and then lets the cache know it as `revision`.
    fn download(&self, id: &str, revision: &str, variant: Option<&str>) -> Result<PathBuf, Failure> {
        let cache = Cache::new(self.cache.clone());
        let builder = ApiBuilder::from_cache(cache.clone()).with_endpoint(self.endpoint.clone());
        let api = builder.with_token(self.token.clone()).with_progress(false).build().map_err(Failure::of)?;
        let at = |revision: &str| Repo::with_revision(id.to_string(), RepoType::Model, revision.to_string());
        let (asking, repo) = (api.clone(), at(revision));
        let info = self.patiently(None, move || asking.repo(repo).info())??;
        // By commit from here on, so that a push in between cannot mix two versions.
        let fetch =
            Fetch { hub: self, api, repo: at(&info.sha), folder: cache.repo(at(&info.sha)).pointer_path(&info.sha) };
        let names: HashSet<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
        if !names.contains("model_index.json") {
            let what =
                "it is not a pipeline in diffusers' layout (it has no model_index.json): name one that is".to_string();
            return Err(Failure::Unfit(vec![what]));
        }
        fetch.get("model_index.json")?;
        let index =
            read(&fetch.folder.join("model_index.json")).map_err(|error| Failure::Unfit(vec![format!("{error:#}")]))?;
        let wanted = wanted(&names, &index, variant)
            .map_err(|problems| Failure::Unfit(problems.into_iter().map(|what| what.replace("MODEL", id)).collect()))?;
        let mut files = wanted.files;
        for name in wanted.indices {
            fetch.get(&name)?;
            let text = std::fs::read_to_string(fetch.folder.join(&name)).unwrap_or_default();
            let shards = beside(&name, &text).ok_or_else(|| {
                Failure::Unfit(vec![format!("its {name} is not an index of weight files: name another model")])
            })?;
            files.extend(shards);
        }
        for name in &files {
            fetch.get(name)?;
        }
        // Only now, so that a snapshot that the cache calls `revision` is whole.
        cache.repo(at(revision)).create_ref(&info.sha).map_err(|error| Failure::of(error.into()))?;
        Ok(fetch.folder)
    }

    /// Runs `work` on a thread of its own and waits for it as long as `alive` moves or patience lasts. The Hub's
    /// client has no time-outs; a thread that is given up on ends with the process.
    fn patiently<T: Send + 'static>(
        &self,
        alive: Option<Arc<AtomicU64>>,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<Result<T, Failure>, Failure> {
        let (send, receive) = channel();
        std::thread::spawn(move || send.send(work()));
        let beat = || alive.as_ref().map_or(0, |alive| alive.load(Ordering::Relaxed));
        let (mut last, mut since) = (beat(), Instant::now());
        loop {
            match receive.recv_timeout(Duration::from_millis(100)) {
                Ok(result) => return Ok(result.map_err(Failure::of)),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Failure::Unreachable("its answer was not understood".to_string()));
                }
                Err(RecvTimeoutError::Timeout) if beat() != last => (last, since) = (beat(), Instant::now()),
                Err(RecvTimeoutError::Timeout) if since.elapsed() > self.patience => {
                    let seconds = self.patience.as_secs();
                    return Err(Failure::Unreachable(format!("it did not answer for {seconds} seconds")));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// Files of one commit on their way into the cache.
struct Fetch<'a> {
    hub: &'a Hub,
    api: Api,
    repo: Repo,
    folder: PathBuf,
}

impl Fetch<'_> {
    /// Makes sure that `name` is in the snapshot. Where another process is fetching it, waits for that one.
    fn get(&self, name: &str) -> Result<(), Failure> {
        let begun = Instant::now();
        while !self.folder.join(name).exists() {
            let alive = Arc::new(AtomicU64::new(0));
            let progress = Heartbeat { alive: alive.clone(), bar: ProgressBar::new(0) };
            let (api, repo, file) = (self.api.clone(), self.repo.clone(), name.to_string());
            let fetched = self
                .hub
                .patiently(Some(alive), move || api.repo(repo).download_with_progress(&file, progress).map(|_| ()))?;
            match fetched {
                Err(Failure::Busy) if begun.elapsed() < OTHERS_PATIENCE => {}
                other => return other,
            }
        }
        Ok(())
    }
}

/// Shows a download and its being alive.
struct Heartbeat {
    alive: Arc<AtomicU64>,
    bar: ProgressBar,
}

impl Progress for Heartbeat {
    fn init(&mut self, size: usize, filename: &str) {
        self.bar.init(size, filename);
    }
    fn update(&mut self, size: usize) {
        self.alive.fetch_add(1, Ordering::Relaxed);
        Progress::update(&mut self.bar, size);
    }
    fn finish(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Why a model could not be had.
#[derive(Debug)]
enum Failure {
    Unreachable(String),
    Forbidden,
    Unknown,
    /// Another process is fetching the file.
    Busy,
    /// It is there and cannot be used, for these reasons (each with its remedy).
    Unfit(Vec<String>),
    /// The cache cannot be written.
    Cache(String),
}

impl Failure {
    /// The client's errors name an HTTP status in words only.
    fn of(error: ApiError) -> Self {
        match error {
            ApiError::LockAcquisition(_) => Failure::Busy,
            ApiError::IoError(error) => Failure::Cache(error.to_string()),
            ApiError::InvalidResume => Failure::Cache("a half-fetched file in it is broken".to_string()),
            other => {
                let text = other.to_string();
                match ["status: 401", "status: 403", "status: 404"].iter().position(|status| text.contains(status)) {
                    Some(2) => Failure::Unknown,
                    Some(_) => Failure::Forbidden,
                    None => Failure::Unreachable(text),
                }
            }
        }
    }

    fn refusal(self, id: &str, revision: &str, endpoint: &str) -> anyhow::Error {
        let begin =
            format!("there is no folder {id} here, and the model {id} (revision {revision}) of the Hub {endpoint}");
        let elsewhere = "or download the model elsewhere and give its folder as model.path";
        let problems = match self {
            Failure::Unreachable(why) => vec![format!(
                "{begin} could not be fetched: {why}, and the cache does not hold all of it. Check the path's spelling and the network, {elsewhere}"
            )],
            Failure::Forbidden => vec![format!(
                "{begin} is private, gated or not there: check its spelling; accept its terms on its page and set HF_TOKEN to a token that may read it; {elsewhere}"
            )],
            Failure::Unknown => vec![format!(
                "{begin} does not exist: check the spelling of path and revision under [model], {elsewhere}"
            )],
            Failure::Busy => vec![format!(
                "{begin} is being fetched by another process, which does not come to an end: stop that one, and try again"
            )],
            Failure::Cache(why) => vec![format!(
                "{begin} could not be kept in the Hub's cache ({why}): make room or set HF_HOME to a folder that can be written, {elsewhere}"
            )],
            Failure::Unfit(problems) => {
                problems.into_iter().map(|what| format!("the model {id} of the Hub cannot be used: {what}")).collect()
            }
        };
        Refusal { problems }.into()
    }
}

/// What training needs of a repository.
#[derive(Debug, Default, PartialEq)]
struct Wanted {
    files: Vec<String>,
    /// Weight indices; what they name is needed too.
    indices: Vec<String>,
    /// Whether all weights are of the variant that was asked for.
    exact: bool,
}

/// Picks from the repository's files `names`. A pipeline class that cannot be trained needs nothing but its
/// model_index.json, from which that can be said. Err: what is wrong, with remedies; `MODEL` stands for the model.
fn wanted(names: &HashSet<String>, index: &Value, variant: Option<&str>) -> Result<Wanted, Vec<String>> {
    let mut wanted = Wanted { files: vec!["model_index.json".to_string()], exact: true, ..Wanted::default() };
    if index["_class_name"] != "StableDiffusionPipeline" {
        return Ok(wanted);
    }
    let mut problems = Vec::new();
    // Small, and part of what diffusers expects beside the weights; the safety checker is not fetched.
    let extra = "feature_extractor/preprocessor_config.json".to_string();
    wanted.files.extend(names.contains(&extra).then_some(extra));
    for (component, _, stem) in COMPONENTS {
        let prefix = format!("{component}/");
        let mut inside: Vec<String> =
            names.iter().filter_map(|name| name.strip_prefix(&prefix)).map(String::from).collect();
        inside.sort();
        let small = |name: &&String| match component {
            "tokenizer" => [".json", ".txt", ".model"].iter().any(|end| name.ends_with(end)),
            "scheduler" => *name == "scheduler_config.json",
            _ => *name == "config.json",
        };
        let has = |name: &str| inside.iter().any(|there| there == name);
        let complete = match component {
            "tokenizer" => has("tokenizer.json") || (has("vocab.json") && has("merges.txt")),
            "scheduler" => has("scheduler_config.json"),
            _ => has("config.json"),
        };
        if !complete {
            problems.push(format!("its folder {component} lacks its configuration: name a whole model"));
        }
        wanted.files.extend(inside.iter().filter(small).map(|name| format!("{prefix}{name}")));
        let Some(stem) = stem else { continue };
        let chosen = choose_weights(&inside, stem, variant);
        if let (Some(variant), Weights::Whole(name) | Weights::Index(name)) = (variant, &chosen) {
            wanted.exact &= name.contains(&format!(".{variant}."));
        }
        match chosen {
            Weights::Whole(name) => wanted.files.push(format!("{prefix}{name}")),
            Weights::Index(name) => wanted.indices.push(format!("{prefix}{name}")),
            Weights::Pickle(name) => problems.push(pickle_problem(&format!("{prefix}{name}"), "MODEL")),
            Weights::OtherVariant(name) => problems.push(other_variant_problem(&format!("{prefix}{name}"), &name)),
            Weights::Missing => {
                problems.push(format!("it has no {prefix}{stem}.safetensors: name a model that has one"))
            }
        }
    }
    wanted.files.extend(wanted.indices.iter().cloned());
    if problems.is_empty() { Ok(wanted) } else { Err(problems) }
}

/// The files that the index `name` with the text `index` names, from the repository's root.
fn beside(name: &str, index: &str) -> Option<Vec<String>> {
    let (folder, _) = name.rsplit_once('/')?;
    Some(shards_of(index)?.into_iter().map(|shard| format!("{folder}/{shard}")).collect())
}

/// The files in `folder` and its folders, as the Hub names them.
fn names_in(folder: &Path) -> HashSet<String> {
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let inside = entries(folder).flat_map(|path| if path.is_dir() { entries(&path).collect() } else { vec![path] });
    // `exists` follows links: a link into the cache whose file is gone is no file.
    inside
        .filter(|path| path.exists())
        .filter_map(|path| Some(path.strip_prefix(folder).ok()?.to_str()?.to_string()))
        .collect()
}

fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| format!("{}: this is not JSON", path.display()))
}

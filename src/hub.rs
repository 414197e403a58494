//! A model on the Hugging Face Hub -> a folder in diffusers' layout, through the `hf-hub` crate and in its cache
//! (HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE as in the Hub's own library). Only the files that
//! training needs are fetched, and of weights only safetensors. Without a network, what the cache holds is used;
//! nothing here waits longer than [`PATIENCE`] for a sign of life.

mod wanted;

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
use wanted::{beside, names_in, wanted};

/// The longest wait for an answer, or for more of a file.
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest wait for another process that is fetching the same file.
const OTHERS_PATIENCE: Duration = Duration::from_secs(3600);

/// Without these a snapshot is no whole pipeline.
const CONFIGURATIONS: [&str; 4] =
    ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"];

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
        let variant = variant.unwrap_or("");
        if let Some(folder) = self.cached(id, revision, variant) {
            return Ok(folder);
        }
        let fetched = match self.offline {
            true => Err(Failure::Unreachable("HF_HUB_OFFLINE is set".to_string())),
            false => self.download(id, revision, variant),
        };
        fetched.map_err(|failure| failure.refusal(id, revision, &self.endpoint))
    }

    /// The snapshot in the cache, if nothing is missing from it.
    fn cached(&self, id: &str, revision: &str, variant: &str) -> Option<PathBuf> {
        let repo = self.cache.join(Repo::model(id.to_string()).folder_name());
        let commit = std::fs::read_to_string(repo.join("refs").join(revision));
        let folder = repo.join("snapshots").join(commit.as_deref().unwrap_or(revision).trim());
        let names = names_in(&folder);
        let index = read(&folder.join("model_index.json")).ok()?;
        let wanted = wanted(&names, &index, variant).ok()?;
        // What another client left here may lack a configuration, which the names that are there cannot tell.
        let configured = index["_class_name"] != "StableDiffusionPipeline"
            || CONFIGURATIONS.iter().all(|name| names.contains(*name));
        let whole = wanted.indices.iter().all(|name| {
            let text = std::fs::read_to_string(folder.join(name)).ok();
            let shards = text.and_then(|text| beside(name, &text));
            shards.is_some_and(|shards| shards.iter().all(|shard| names.contains(shard)))
        });
        (whole && configured).then_some(folder)
    }

    /// Fetches what is missing of the newest commit of `revision`, and then lets the cache know it as `revision`.
    fn download(&self, id: &str, revision: &str, variant: &str) -> Result<PathBuf, Failure> {
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
            ApiError::IoError(error) if is_of_files(&error) => Failure::Cache(error.to_string()),
            ApiError::IoError(error) => Failure::Unreachable(format!("the connection broke off ({error})")),
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

/// Whether an error is of writing a file and not of reading from the network, which the client gives in one kind. Files
/// fail by the system's word, or because nothing more is taken; what the client itself says is about the connection.
fn is_of_files(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::*;
    let of_networks = matches!(
        error.kind(),
        ConnectionRefused
            | ConnectionReset
            | ConnectionAborted
            | NotConnected
            | AddrNotAvailable
            | HostUnreachable
            | NetworkUnreachable
            | NetworkDown
            | BrokenPipe
            | TimedOut
            | WouldBlock
            | UnexpectedEof
    );
    error.kind() == WriteZero || (error.raw_os_error().is_some() && !of_networks)
}

fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| format!("{}: this is not JSON", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};

    const INDEX: &str = r#"{"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"], "vae": ["a", "b"],
        "text_encoder": ["a", "b"], "tokenizer": ["a", "b"], "scheduler": ["a", "b"], "safety_checker": [null, null]}"#;

    /// How a file begins of which more is promised than comes.
    const BROKEN_OFF: &str = "the first half";

    /// The files of a repository that is whole, with their contents.
    fn files() -> Vec<(String, String)> {
        let mut files = vec![("model_index.json".to_string(), INDEX.to_string())];
        for name in [
            "scheduler/scheduler_config.json",
            "tokenizer/tokenizer.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "unet/config.json",
            "unet/u-1.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        ] {
            files.push((name.to_string(), format!("contents of {name}")));
        }
        let index = r#"{"weight_map": {"a": "u-1.safetensors"}}"#.to_string();
        files.push(("unet/diffusion_pytorch_model.safetensors.index.json".to_string(), index));
        files
    }

    /// Answers one request as the Hub does, and closes the connection.
    fn answer(mut stream: TcpStream, files: &[(String, String)]) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
        let Some(request) = lines.next() else { return };
        let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
        let path = request.split(' ').nth(1).unwrap_or_default();
        let (status, body, more) = match path.strip_prefix("/o/n/resolve/c0ffee/") {
            Some(name) => match files.iter().find(|(file, _)| file == name) {
                Some((_, text)) => {
                    let one = headers.iter().any(|line| line == "range: bytes=0-0");
                    let body = if one { text[..1].to_string() } else { text.clone() };
                    let range = format!("content-range: bytes 0-{}/{}\r\n", body.len() - 1, text.len());
                    (
                        "206 Partial Content",
                        body,
                        format!("etag: \"{}\"\r\nx-repo-commit: c0ffee\r\n{range}", name.replace('/', "_")),
                    )
                }
                None => ("404 Not Found", String::new(), String::new()),
            },
            None if path == "/api/models/o/n/revision/main" => {
                let siblings: Vec<_> = files.iter().map(|(name, _)| serde_json::json!({"rfilename": name})).collect();
                ("200 OK", serde_json::json!({"sha": "c0ffee", "siblings": siblings}).to_string(), String::new())
            }
            None => ("401 Unauthorized", String::new(), String::new()),
        };
        // More than there is, so that the connection breaks off in the middle.
        let length = body.len() + if body.starts_with(BROKEN_OFF) { 1000 } else { 0 };
        let _ =
            write!(stream, "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{more}\r\n{body}");
    }

    /// A Hub on this machine that serves `files`, or accepts and never answers.
    fn hub(files: Option<Vec<(String, String)>>, cache: &Path) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let mut silent = Vec::new();
            for stream in listener.incoming().flatten() {
                match &files {
                    Some(files) => answer(stream, files),
                    None => silent.push(stream),
                }
            }
        });
        let patience = if cache.ends_with("impatient") { Duration::from_millis(200) } else { PATIENCE };
        Hub { endpoint, cache: cache.to_path_buf(), token: None, offline: false, patience }
    }

    fn problem(result: Result<PathBuf>) -> String {
        let error = result.unwrap_err();
        error.downcast_ref::<Refusal>().expect("a refusal").problems.join("\n")
    }

    #[test]
    fn a_model_is_fetched_once_and_then_needs_no_network() {
        let cache = tempfile::tempdir().unwrap();
        let mut hub = hub(Some(files()), cache.path());
        let folder = hub.fetch("o/n", None, None).unwrap();
        assert_eq!(folder, cache.path().join("models--o--n/snapshots/c0ffee"));
        for (name, text) in files() {
            assert_eq!(std::fs::read_to_string(folder.join(&name)).unwrap(), text, "{name}");
        }
        hub.offline = true;
        assert_eq!(hub.fetch("o/n", None, None).unwrap(), folder);
        assert_eq!(hub.fetch("o/n", Some("c0ffee"), None).unwrap(), folder);
        assert!(problem(hub.fetch("o/n", None, Some("fp16"))).contains("HF_HUB_OFFLINE"));
        std::fs::remove_file(folder.join("unet/u-1.safetensors")).unwrap();
        let problem = problem(hub.fetch("o/n", None, None));
        assert!(
            problem.contains("HF_HUB_OFFLINE") && problem.contains("o/n") && problem.contains("give its folder"),
            "{problem}"
        );
    }

    #[test]
    fn a_model_that_cannot_be_had_is_told_with_the_reason() {
        let cache = tempfile::tempdir().unwrap();
        let missing = problem(hub(Some(files()), cache.path()).fetch("o/other", None, None));
        assert!(missing.contains("private, gated or not there") && missing.contains("HF_TOKEN"), "{missing}");
        let silent = problem(hub(None, &cache.path().join("impatient")).fetch("o/n", None, None));
        assert!(silent.contains("did not answer"), "{silent}");
        let mut broken = files();
        broken
            .iter_mut()
            .filter(|(name, _)| name == "unet/u-1.safetensors")
            .for_each(|(_, text)| *text = BROKEN_OFF.into());
        let broken = problem(hub(Some(broken), &cache.path().join("broken")).fetch("o/n", None, None));
        assert!(broken.contains("the connection broke off") && !broken.contains("make room"), "{broken}");
        // Nobody can write there, whatever their rights: it is a file.
        std::fs::write(cache.path().join("file"), "").unwrap();
        let full = problem(hub(Some(files()), &cache.path().join("file")).fetch("o/n", None, None));
        assert!(full.contains("could not be kept in the Hub's cache") && full.contains("HF_HOME"), "{full}");
        let mut pickled = files();
        pickled.retain(|(name, _)| name != "text_encoder/model.safetensors");
        pickled.push(("text_encoder/pytorch_model.bin".to_string(), "x".to_string()));
        let pickle = problem(hub(Some(pickled), cache.path()).fetch("o/n", None, None));
        assert!(pickle.contains("pickle") && pickle.contains("from_pretrained('o/n')"), "{pickle}");
    }
}

//! Runs of the real program, each in a folder of its own: a configuration with overrides goes in; the exit status, what
//! was printed and what was left in the output folder come out.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use serde_json::Value;

/// The small Stable Diffusion 1 pipeline with everything on: the text encoder trains, prior preservation, photographs of
/// all shapes cropped and mirrored at random, accumulation, epochs of three micro-batches.
pub const EVERYTHING: &str = r#"
[model]
path = "DATA/models/sd15"
train_text_encoder = true
device = "cpu"
[data]
instance_dir = "DATA/images/rough/instance"
instance_prompt = "a photo of sks cat"
resolution = 64
random_flip = true
[prior]
class_dir = "DATA/images/rough/class"
class_prompt = "a photo of coffee"
num_class_images = 6
loss_weight = 0.7
[train]
max_steps = 6
batch_size = 2
gradient_accumulation_steps = 2
seed = 7
[optimizer]
learning_rate = 1e-3
[lr_schedule]
kind = "cosine"
warmup_steps = 2
[output]
dir = "HOME/out"
"#;

/// The least a run needs, and quick: five square photographs, the UNet alone.
pub const PLAIN: &str = r#"
[model]
path = "DATA/models/sd15"
device = "cpu"
[data]
instance_dir = "DATA/images/square/instance"
instance_prompt = "a photo of sks cat"
resolution = 64
center_crop = true
[train]
max_steps = 4
batch_size = 2
seed = 3
[optimizer]
learning_rate = 1e-4
[output]
dir = "HOME/out"
"#;

/// A path in tests/data.
pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// A test's own folder.
pub struct Home {
    dir: tempfile::TempDir,
    jobs: Cell<usize>,
    configs: RefCell<Vec<String>>,
}

impl Home {
    pub fn new() -> Home {
        Home { dir: tempfile::tempdir().unwrap(), jobs: Cell::new(0), configs: RefCell::default() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where runs write, unless they are told otherwise.
    pub fn out(&self) -> PathBuf {
        self.path("out")
    }

    /// `text` with this folder for `HOME` and tests/data for `DATA`.
    pub fn filled(&self, text: &str) -> String {
        let text = text.replace("HOME", &self.dir.path().display().to_string());
        text.replace("DATA", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data"))
    }

    /// The program. Nothing of the tests' own environment gets through, no launcher's variables and no cache of models.
    pub fn program(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dblaunch"));
        command.env_clear().env("HF_HUB_OFFLINE", "1").env("HOME", self.dir.path()).stdin(Stdio::null());
        command.envs(std::env::vars_os().filter(|(name, _)| name == "PATH" || name == "TMPDIR"));
        command
    }

    /// Starts a command and keeps what it prints in this folder.
    pub fn start(&self, mut command: Command) -> Running {
        let number = self.jobs.replace(self.jobs.get() + 1);
        let file = |end: &str| self.path(&format!(".job-{number}.{end}"));
        let (stdout, stderr) = (file("out"), file("err"));
        command.stdout(File::create(&stdout).unwrap()).stderr(File::create(&stderr).unwrap());
        #[cfg(target_os = "linux")]
        crate::processes::hearing_interrupts(&mut command);
        Running { child: command.spawn().unwrap(), stdout, stderr, out: self.out() }
    }

    /// A run of one rank that is yet to be started.
    pub fn job(&self, config: &str) -> Job<'_> {
        // The same text is the same file, so that messages are the same, too.
        let mut configs = self.configs.borrow_mut();
        let known = configs.iter().position(|known| known == config).unwrap_or_else(|| {
            configs.push(config.to_string());
            configs.len() - 1
        });
        let path = self.path(&format!(".job-config-{known}.toml"));
        fs::write(&path, self.filled(config)).unwrap();
        Job { home: self, config: path, ranks: 1, command: self.program() }
    }

    /// Changes the configuration file of runs of `config` that have been started; the next one is told anew.
    pub fn job_file(&self, config: &str, from: &str, to: &str) {
        let known = self.configs.borrow().iter().position(|known| known == config).unwrap();
        let path = self.path(&format!(".job-config-{known}.toml"));
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from));
        fs::write(&path, text.replace(from, to)).unwrap();
    }

    /// A copy of a folder in tests/data.
    pub fn copy(&self, from: &str, to: &str) -> PathBuf {
        copy_folder(&data(from), &self.path(to));
        self.path(to)
    }
}

pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        match path.is_dir() {
            true => copy_folder(&path, &to),
            false => drop(fs::copy(&path, &to).unwrap()),
        }
    }
}

/// Every file and folder below `dir`, but for what the harness itself keeps there.
pub fn listing(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let own = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".job-"));
        if path.is_dir() {
            found.extend(listing(&path));
        }
        if !own {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// A run that is yet to be started.
pub struct Job<'a> {
    home: &'a Home,
    config: PathBuf,
    ranks: usize,
    command: Command,
}

impl<'a> Job<'a> {
    pub fn ranks(mut self, ranks: usize) -> Self {
        self.ranks = ranks;
        self
    }

    /// `--set`; `HOME` and `DATA` stand for folders, as in the configuration.
    pub fn set(mut self, item: &str) -> Self {
        self.command.args(["--set", &self.home.filled(item)]);
        self
    }

    pub fn sets(self, items: &[&str]) -> Self {
        items.iter().fold(self, |job, item| job.set(item))
    }

    /// Any other words of the command line.
    pub fn words(mut self, words: &[&str]) -> Self {
        self.command.args(words);
        self
    }

    /// Starts it and stays with it to its end.
    pub fn run(self) -> Ran {
        self.start().end()
    }

    pub fn start(mut self) -> Running {
        self.command.args(["--nproc", &self.ranks.to_string()]).arg(&self.config);
        self.home.start(self.command)
    }

    /// The same through a shell, which runs `before` first.
    pub fn run_after(self, before: &str) -> Ran {
        self.through(&["sh", "-c", &format!("{before}; exec \"$0\" \"$@\"")]).run()
    }

    /// The same as the last words of another command line.
    pub fn through(mut self, words: &[&str]) -> Self {
        let mut outer = Command::new(words[0]);
        outer.args(&words[1..]).arg(self.command.get_program()).args(self.command.get_args());
        outer.env_clear().stdin(Stdio::null());
        outer.envs(self.command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        self.command = outer;
        self
    }
}

/// A run under way.
pub struct Running {
    pub child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    out: PathBuf,
}

impl Running {
    /// Until optimizer step `step` is in `metrics.jsonl`.
    pub fn wait_for_step(&mut self, step: u64) {
        let there = |row: &Value| row.get("grad_norm").is_some() && row["step"].as_u64() >= Some(step);
        self.wait_until(&format!("step {step}"), |running| running.rows().iter().any(there));
    }

    /// Until it has said `words` on standard error.
    pub fn wait_for_words(&mut self, words: &str) {
        self.wait_until(words, |running| running.told().contains(words));
    }

    fn wait_until(&mut self, what: &str, come: impl Fn(&Running) -> bool) {
        let since = Instant::now();
        while !come(self) {
            assert!(self.child.try_wait().unwrap().is_none(), "it ended before {what}: {}", self.told());
            assert!(since.elapsed() < Duration::from_secs(120), "{what} does not come: {}", self.told());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn told(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap()
    }

    fn rows(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.out.join("metrics.jsonl")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    pub fn end(mut self) -> Ran {
        let status = self.child.wait().unwrap().code();
        let read = |path: &Path| String::from_utf8(fs::read(path).unwrap()).unwrap();
        Ran { status, stdout: read(&self.stdout), stderr: read(&self.stderr) }
    }
}

/// A run that has ended.
#[derive(Debug)]
pub struct Ran {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// It did all its work.
    #[track_caller]
    pub fn done(self) -> Ran {
        assert_eq!(self.status, Some(0), "{}", self.stderr);
        self
    }

    /// It failed while running: one last line that holds all `pieces`.
    #[track_caller]
    pub fn failed(self, pieces: &[&str]) -> Ran {
        assert_eq!(self.status, Some(1), "{}", self.stderr);
        let last = self.stderr.lines().last().unwrap_or_default();
        assert!(pieces.iter().all(|piece| last.contains(piece)), "{}\nlacks one of {pieces:?}", self.stderr);
        self.said_without_panic()
    }

    /// The request was wrong, and nothing was printed but what is wrong, a paragraph a problem. Returns those.
    #[track_caller]
    pub fn refused(self) -> Vec<String> {
        assert_eq!(self.status, Some(2), "{}", self.stderr);
        let ran = self.said_without_panic();
        assert_eq!(ran.stdout, "");
        let problem = |line: &str| line.strip_prefix("dblaunch: ").unwrap_or_else(|| panic!("{line}")).to_string();
        let problems: Vec<String> = ran.stderr.lines().map(problem).collect();
        assert!(!problems.is_empty());
        problems
    }

    #[track_caller]
    fn said_without_panic(self) -> Ran {
        assert!(!self.stderr.contains("panicked") && !self.stderr.contains("RUST_BACKTRACE"), "{}", self.stderr);
        self
    }

    #[track_caller]
    pub fn says(&self, piece: &str) {
        assert!(self.stderr.contains(piece), "{}\nlacks {piece:?}", self.stderr);
    }
}

/// The rows of a run's `metrics.jsonl`, without what differs from run to run.
pub fn rows(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let row = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        for key in ["seconds", "images_per_second", "peak_vram_bytes", "peak_rss_bytes"] {
            row.as_object_mut().unwrap().remove(key);
        }
        row
    };
    text.lines().map(row).collect()
}

/// The values of `key` in the rows that have it.
pub fn column(rows: &[Value], key: &str) -> Vec<f64> {
    rows.iter().filter_map(|row| row.get(key)?.as_f64()).collect()
}

/// The bytes of the trained weights that a run has left.
pub fn weights(out: &Path) -> [Vec<u8>; 2] {
    ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
        .map(|file| fs::read(out.join(file)).unwrap_or_else(|error| panic!("{file}: {error}")))
}

/// The fp32 tensors of a file.
pub fn tensors(path: &Path) -> HashMap<String, Vec<f32>> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |raw: &[u8]| raw.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    file.iter().map(|(name, tensor)| (name.to_string(), values(tensor.data()))).collect()
}

/// The largest relative difference of two columns of the same length.
#[track_caller]
pub fn apart(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(a, b)| (a - b).abs() / b.abs()).fold(0.0, f64::max)
}

//! One generation of ranks: their processes, the pipes from them, and what each said last.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, PipeReader, Read};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};

use super::cores::{self, Share};
use super::event::{Event, Failure};
use super::progress::Show;
use super::supervise::LaunchRequest;
use super::variable;
use crate::comm::{Window, process};

/// A line longer than this is cut in pieces.
const LONGEST_LINE: u64 = 64 << 10;
/// How long to wait for the pipes of processes that have ended.
const LINGER: Duration = Duration::from_secs(1);

/// Which generation this is.
#[derive(Clone, Copy, Default)]
pub(super) struct Restart {
    pub count: usize,
    /// Whether an earlier generation came as far as its first step.
    pub goes_on: bool,
}

/// One rank's process.
pub(super) struct Member {
    pub rank: usize,
    pub ended: Option<Ended>,
    child: Child,
    notes: Arc<Mutex<Notes>>,
}

/// How a process ended.
#[derive(Clone, Copy)]
pub(super) struct Ended {
    pub status: ExitStatus,
    /// Whether it had been told to.
    pub told: bool,
}

impl Ended {
    /// Whether it ended by the signal that told it to.
    pub fn by_order(self) -> bool {
        self.told && self.status.signal() == Some(libc::SIGTERM)
    }
}

/// What a rank said.
#[derive(Default)]
struct Notes {
    /// Whether the first step was about to start.
    begun: bool,
    failure: Option<Failure>,
    last_line: Option<String>,
    /// The line of a panic and the one after it, which say more than the last ones; or what ran out of memory.
    panic: Vec<String>,
}

pub(super) struct Group {
    pub members: Vec<Member>,
    /// Closed by the last reader.
    readers: mpsc::Receiver<()>,
    told: bool,
}

impl Group {
    /// Starts all ranks, or none.
    pub fn spawn(request: &LaunchRequest, restart: Restart, show: &SyncSender<Show>) -> Result<Group> {
        let shares = cores::shares(request.nproc, request.threads_total);
        let window = (request.nproc > 1).then(|| Window::create(request.nproc)).transpose()?;
        let port = free_port();
        let (alive, readers) = mpsc::sync_channel(0);
        let mut group = Group { members: Vec::new(), readers, told: false };
        for (rank, share) in shares.into_iter().enumerate() {
            let (events, to_launcher) = std::io::pipe().context("cannot make a pipe")?;
            let mut command = Command::new(&request.program);
            command.args(&request.args).envs(place(rank, request.nproc, port, &share, restart));
            command.env(variable::EVENTS, to_launcher.as_raw_fd().to_string());
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut descriptors: Vec<&dyn AsRawFd> = vec![&to_launcher];
            if let Some(window) = &window {
                command.env(variable::WINDOW, window.file().as_raw_fd().to_string());
                descriptors.push(window.file());
            }
            if super::shares_gpu() {
                // NCCL takes ranks for ranks of different machines then, and not for a mistake.
                command.env("NCCL_HOSTID", format!("rank-{rank}"));
            }
            command.envs(request.environment.iter().cloned());
            process::prepare(&mut command, &descriptors, share.cores.as_deref());
            let child =
                command.spawn().with_context(|| format!("cannot start rank {rank}: {}", request.program.display()))?;
            let mut member = Member { rank, ended: None, child, notes: Arc::default() };
            let prefix = if request.nproc > 1 { format!("[rank {rank}] ") } else { String::new() };
            member.listen(events, prefix, show, &alive);
            group.members.push(member);
        }
        Ok(group)
    }

    /// Notes who has ended meanwhile.
    pub fn reap(&mut self) {
        for member in self.members.iter_mut().filter(|member| member.ended.is_none()) {
            // A child that cannot be waited for is none of ours any more.
            if let Ok(Some(status)) = member.child.try_wait() {
                member.ended = Some(Ended { status, told: self.told });
                // Whatever it started and left behind goes with it.
                process::signal_group(member.child.id(), libc::SIGKILL);
            }
        }
    }

    /// Whether the run had come as far as its first step.
    pub fn has_begun(&self) -> bool {
        self.members.iter().any(|member| member.notes().begun)
    }

    pub fn all_ended(&self) -> bool {
        self.members.iter().all(|member| member.ended.is_some())
    }

    /// Sends a signal to every rank that still runs, and to what it started.
    pub fn signal(&mut self, signal: i32) {
        self.told = true;
        for member in self.members.iter().filter(|member| member.ended.is_none()) {
            process::signal_group(member.child.id(), signal);
        }
    }

    /// Waits until everything that the ended ranks said has been read; not for long, since a process that left its
    /// group could hold a pipe open.
    pub fn hear_out(&self) {
        let _ = self.readers.recv_timeout(LINGER);
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(libc::SIGKILL);
        for member in self.members.iter_mut().filter(|member| member.ended.is_none()) {
            let _ = member.child.wait();
        }
    }
}

impl Member {
    /// What the rank reported of its failure.
    pub fn failure(&self) -> Option<Failure> {
        self.notes().failure.clone()
    }

    /// What the rank printed last on standard error, if anything.
    pub fn last_words(&self) -> Option<String> {
        let notes = self.notes();
        if notes.panic.is_empty() { notes.last_line.clone() } else { Some(notes.panic.join(" ")) }
    }

    fn notes(&self) -> std::sync::MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// One thread for each of the rank's three pipes; each holds `alive` until its pipe is closed.
    fn listen(&mut self, events: PipeReader, prefix: String, show: &SyncSender<Show>, alive: &SyncSender<()>) {
        let stdout = self.child.stdout.take();
        let stderr = self.child.stderr.take();
        if let Some(stdout) = stdout {
            let (show, prefix) = (show.clone(), prefix.clone());
            read(stdout, alive, move |line| drop(show.send(Show::Stdout(format!("{prefix}{line}")))));
        }
        if let Some(stderr) = stderr {
            let (show, notes) = (show.clone(), self.notes.clone());
            read(stderr, alive, move |line| {
                notes.lock().unwrap_or_else(|e| e.into_inner()).hear(line);
                drop(show.send(Show::Stderr(format!("{prefix}{line}"))));
            });
        }
        let (show, notes) = (show.clone(), self.notes.clone());
        read(events, alive, move |line| match serde_json::from_str(line) {
            Ok(Event::Failed(failure)) => {
                notes.lock().unwrap_or_else(|e| e.into_inner()).failure.get_or_insert(failure);
            }
            Ok(event @ Event::Start { .. }) => {
                notes.lock().unwrap_or_else(|e| e.into_inner()).begun = true;
                drop(show.send(Show::Event(event)));
            }
            // The next step says it all again, so a step is not worth waiting for the terminal.
            Ok(event @ Event::Step { step, total, .. }) if step < total => drop(show.try_send(Show::Event(event))),
            Ok(event @ Event::Pictures { calls: 1.., .. }) => drop(show.try_send(Show::Event(event))),
            Ok(event) => drop(show.send(Show::Event(event))),
            // Half a line of a process that was killed.
            Err(_) => {}
        });
    }
}

impl Notes {
    fn hear(&mut self, line: &str) {
        if line.starts_with("thread '") && line.contains("panicked at") {
            self.panic = vec![line.trim().to_string()];
        } else if line.starts_with("memory allocation of") {
            let remedy =
                "lower train.batch_size or data.resolution, set train.recompute = true, or raise the ZeRO stage";
            self.panic = vec![format!("{}:", line.trim()), remedy.to_string()];
        } else if self.panic.len() == 1 {
            self.panic.push(line.trim().to_string());
        }
        if !line.trim().is_empty() {
            self.last_line = Some(line.trim().to_string());
        }
    }
}

/// Calls `heard` with every line of `pipe`, on a thread of its own.
fn read(pipe: impl Read + Send + 'static, alive: &SyncSender<()>, mut heard: impl FnMut(&str) + Send + 'static) {
    let alive = alive.clone();
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while matches!(pipe.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line), Ok(1..)) {
            let text = String::from_utf8_lossy(&line);
            heard(text.trim_end_matches(['\n', '\r']));
            line.clear();
        }
        drop(alive);
    });
}

/// The variables that tell a rank its place: torchrun's, ours, and the number of threads for every library that asks.
fn place(rank: usize, nproc: usize, port: u16, share: &Share, restart: Restart) -> Vec<(&'static str, OsString)> {
    let number = |number: usize| OsString::from(number.to_string());
    vec![
        ("RANK", number(rank)),
        ("LOCAL_RANK", number(rank)),
        ("WORLD_SIZE", number(nproc)),
        ("LOCAL_WORLD_SIZE", number(nproc)),
        ("MASTER_ADDR", "127.0.0.1".into()),
        ("MASTER_PORT", number(port.into())),
        (variable::RANK, number(rank)),
        (variable::THREADS, number(share.threads)),
        (variable::RESTART, number(restart.count)),
        (variable::GOES_ON, number(usize::from(restart.goes_on))),
        ("RAYON_NUM_THREADS", number(share.threads)),
        ("OMP_NUM_THREADS", number(share.threads)),
        ("MKL_NUM_THREADS", number(share.threads)),
        ("OPENBLAS_NUM_THREADS", number(share.threads)),
    ]
}

/// A port that nobody listens on right now; torchrun's usual one if the system gives none.
fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    listener.map_or(29500, |address| address.port())
}

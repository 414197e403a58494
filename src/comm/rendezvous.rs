//! How ranks that somebody else started (torchrun, mpirun, srun) on one machine find each other's window: rank 0 makes
//! it and leaves a small file under a name all ranks know; the others open the window through it; then the file goes.
//! A file that an earlier, killed run left behind is told by the process it names.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use twox_hash::XxHash3_64;

use super::process::{self, Process};
use super::shared::Shared;
use super::window::Window;

const POLL: Duration = Duration::from_millis(10);

/// Whether nobody wants to wait any longer, as after an interrupt.
type Stopped<'a> = &'a dyn Fn() -> bool;

/// A place to meet, known to all ranks of one job of one user on one machine.
pub struct Rendezvous {
    path: PathBuf,
}

/// What the file says.
struct Notice {
    process: Process,
    nonce: u64,
    window: PathBuf,
}

impl Rendezvous {
    /// `job` is the same text for all ranks of a job and for no other job of this user.
    pub fn new(job: &str) -> Rendezvous {
        let shared = Path::new("/dev/shm");
        let folder = if shared.is_dir() { shared.to_path_buf() } else { std::env::temp_dir() };
        Rendezvous::within(&folder, job)
    }

    /// As [`Rendezvous::new`], in a folder of the caller's choice, which all ranks can write.
    pub fn within(folder: &Path, job: &str) -> Rendezvous {
        let name = format!("dblaunch-{}-{:016x}", process::user_id(), XxHash3_64::oneshot(job.as_bytes()));
        Rendezvous { path: folder.join(name) }
    }

    /// Joins the world as `rank`; everyone waits until rank 0 has opened it, and rank 0 until everyone has joined, at
    /// most `timeout`, which is then also the communicator's. Ends early if it is `stopped`.
    pub fn join(&self, rank: usize, world_size: usize, timeout: Duration, stopped: Stopped) -> Result<Shared> {
        let since = Instant::now();
        if rank == 0 {
            let result = self.open_world(world_size, timeout, since, stopped);
            // Also after an error: nobody shall find a world that is not to be.
            let _ = fs::remove_file(&self.path);
            return result;
        }
        let mut found = "there is none".to_string();
        while since.elapsed() < timeout && !stopped() {
            match self.try_join(rank, world_size, timeout)? {
                Ok(shared) => return Ok(shared),
                Err(why) => found = why,
            }
            std::thread::sleep(POLL);
        }
        bail!(
            "rank {rank} waited {:.1} s for rank 0's rendezvous file {}: {found}",
            since.elapsed().as_secs_f64(),
            self.path.display()
        )
    }

    fn open_world(&self, world_size: usize, timeout: Duration, since: Instant, stopped: Stopped) -> Result<Shared> {
        let (window, path) = if cfg!(target_os = "linux") {
            let window = Window::create(world_size)?;
            let path = format!("/proc/{}/fd/{}", std::process::id(), window.file().as_raw_fd());
            (window, PathBuf::from(path))
        } else {
            let path = self.path.with_extension(format!("window-{}", std::process::id()));
            (Window::create_in(private(&path)?, world_size)?, path)
        };
        let window = Arc::new(window);
        let shared = Shared::join(window.clone(), 0, timeout)?;
        self.publish(&Notice { process: Process::this(), nonce: window.nonce(), window: path.clone() })?;
        while !window.complete() && since.elapsed() < timeout && !stopped() {
            std::thread::sleep(Duration::from_millis(1));
        }
        if !cfg!(target_os = "linux") {
            let _ = fs::remove_file(&path);
        }
        let missing: Vec<_> =
            (0..world_size).filter(|&r| window.control(r).process().is_none()).map(|r| r.to_string()).collect();
        ensure!(
            missing.is_empty(),
            "of {world_size} ranks, these have not come within {:.1} s: {}",
            since.elapsed().as_secs_f64(),
            missing.join(", ")
        );
        Ok(shared)
    }

    /// Whole or absent, and in place of whatever lay there.
    fn publish(&self, notice: &Notice) -> Result<()> {
        let aside = self.path.with_extension(notice.process.pid.to_string());
        let _ = fs::remove_file(&aside);
        let Notice { process, nonce, window } = notice;
        let text = format!("{} {} {nonce} {}\n", process.pid, process.started, window.display());
        let written = private(&aside).and_then(|mut file| Ok(file.write_all(text.as_bytes())?));
        written
            .and_then(|()| Ok(fs::rename(&aside, &self.path)?))
            .with_context(|| format!("cannot write the ranks' rendezvous file {}", self.path.display()))
    }

    /// One look: the communicator, or (inner error) what is there instead of a world to join.
    fn try_join(&self, rank: usize, world_size: usize, timeout: Duration) -> Result<Result<Shared, String>> {
        let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Err("there is none".into())),
            Err(error) => return Ok(Err(error.to_string())),
        };
        if file.metadata()?.uid() != process::user_id() {
            return Ok(Err("it belongs to another user".into()));
        }
        let Some(notice) = std::io::read_to_string(file).ok().and_then(|text| parse(&text)) else {
            return Ok(Err("it is not readable".into()));
        };
        if !notice.process.lives() {
            return Ok(Err(format!("it is of process {}, which has ended", notice.process.pid)));
        }
        let window = match File::options().read(true).write(true).open(&notice.window) {
            Ok(file) => Window::open(file),
            Err(error) => return Ok(Err(format!("cannot open {}: {error}", notice.window.display()))),
        };
        match window {
            Ok(window) if window.nonce() == notice.nonce => {
                let theirs = window.world_size();
                ensure!(theirs == world_size, "rank 0 was told of {theirs} ranks, and rank {rank} of {world_size}");
                Ok(Shared::join(Arc::new(window), rank, timeout).map_err(|error| error.to_string()))
            }
            Ok(_) => Ok(Err("its window is another run's".into())),
            Err(error) => Ok(Err(format!("{error:#}"))),
        }
    }
}

/// A new file that only this user can open.
fn private(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(path).with_context(|| format!("cannot make {}", path.display()))
}

fn parse(text: &str) -> Option<Notice> {
    let mut fields = text.strip_suffix('\n')?.splitn(4, ' ');
    let process = Process { pid: fields.next()?.parse().ok()?, started: fields.next()?.parse().ok()? };
    Some(Notice { process, nonce: fields.next()?.parse().ok()?, window: fields.next()?.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{Communicator, CommunicatorExt};

    fn meet(folder: &Path, timeout: Duration, ranks: &[usize], world_size: usize) -> Vec<Result<f64>> {
        let join = |rank: usize| -> Result<f64> {
            let shared = Rendezvous::within(folder, "job 7").join(rank, world_size, timeout, &|| false)?;
            shared.barrier()?;
            shared.all_reduce_f64((rank + 1) as f64)
        };
        std::thread::scope(|scope| {
            let ranks: Vec<_> = ranks.iter().map(|&rank| scope.spawn(move || join(rank))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn ranks_find_each_other_past_a_dead_runs_file() {
        let folder = tempfile::tempdir().unwrap();
        let rendezvous = Rendezvous::within(folder.path(), "job 7");
        let dead = Process { pid: 4_000_000, started: 1 };
        rendezvous.publish(&Notice { process: dead, nonce: 5, window: "/proc/4000000/fd/3".into() }).unwrap();
        for sum in meet(folder.path(), Duration::from_secs(60), &[2, 1, 0], 3) {
            assert_eq!(sum.unwrap(), 6.0);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "something was left behind");
    }

    #[test]
    fn whoever_does_not_come_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let results = meet(folder.path(), Duration::from_millis(300), &[0, 1], 3);
        let message = results[0].as_ref().unwrap_err().to_string();
        assert!(message.contains("have not come within 0.3 s: 2"), "{message}");
        let results = meet(folder.path(), Duration::from_millis(50), &[1], 2);
        assert!(results[0].as_ref().unwrap_err().to_string().contains("there is none"));
    }
}

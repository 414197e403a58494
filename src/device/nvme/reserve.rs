//! The file: its name, its lock, its room. Nothing here moves state.
//!
//! A state file belongs to the process that holds its lock (`flock`), which the system takes away when the process ends,
//! however it ends. So a file of that name and with our first bytes, whose lock can be taken, is a dead run's, and is
//! removed. Between making a file and locking it somebody else may take it for such a one: whoever makes a file looks
//! after locking it whether it is still there, and begins anew if not.

use std::fs::{DirEntry, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Error, Result};
use bytesize::ByteSize;
use candle_core::DType;

use crate::Refusal;
use crate::device::buffer::PAGE;
use crate::device::{Buffer, free_disk_bytes};

/// Before the state: a page that says what this is.
pub(super) const HEADER_BYTES: u64 = PAGE as u64;

const MAGIC: &[u8; 16] = b"dblaunch state 1";
const PREFIX: &str = "dblaunch-state-";
const SUFFIX: &str = ".bin";

/// A locked file with all its room, removed when dropped.
#[derive(Debug)]
pub(super) struct Reserved {
    pub file: Arc<File>,
    pub path: PathBuf,
    /// Whether it passes by the page cache.
    pub direct: bool,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // Nothing depends on it: what stays is removed by the next run.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes what dead runs have left in `dir`, and makes a file for `bytes` of state there. Errors that are the folder's
/// are [`Refusal`]s.
pub(super) fn reserve(dir: &Path, rank: usize, bytes: u64, direct: Option<bool>) -> Result<Reserved> {
    let shown = dir.display();
    match std::fs::metadata(dir) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => {
            return Err(Refusal::error(format!("{shown} is not a folder: name one on a fast drive ([zero] nvme_dir)")));
        }
        Err(e) => {
            return Err(Refusal::error(format!(
                "{shown} cannot be used for the run's state: {e}. Make that folder, or name one on a fast drive ([zero] \
                 nvme_dir)"
            )));
        }
    }
    let total = bytes.saturating_add(HEADER_BYTES);
    clear_room(dir, rank, total)?;
    let mut reserved = make(dir, rank)?;
    write_header(&reserved.file, rank, bytes).with_context(|| format!("writing to {}", reserved.path.display()))?;
    match take_room(&reserved.file, total) {
        Ok(()) => {}
        Err(e) if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge) => {
            return Err(too_small(dir, rank, total, free_disk_bytes(dir).ok()));
        }
        Err(e) => return Err(e).with_context(|| format!("reserving {total} bytes for {}", reserved.path.display())),
    }
    if direct != Some(false) {
        reserved.direct = try_direct(&reserved.file);
        if direct == Some(true) && !reserved.direct {
            return Err(Refusal::error(format!("{shown}: this file system cannot read and write past its cache")));
        }
    }
    Ok(reserved)
}

fn too_small(dir: &Path, rank: usize, need: u64, free: Option<u64>) -> Error {
    let size = |bytes: u64| ByteSize(bytes).display().iec();
    let free = free.map_or("less is free".to_string(), |free| format!("{} are free", size(free)));
    Refusal::error(format!(
        "{}: rank {rank} needs {} there for its state, and {free}: make room, name a folder on a larger drive ([zero] \
         nvme_dir), or let less rest there ([zero] offload_optimizer, offload_params)",
        dir.display(),
        size(need)
    ))
}

/// A new file under a name of its own, locked.
fn make(dir: &Path, rank: usize) -> Result<Reserved> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    loop {
        // The number of a process is not enough: containers that share a folder have the same.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
        let mark = now.wrapping_add(NUMBER.fetch_add(1, Relaxed));
        let path = dir.join(format!("{PREFIX}{}-{mark:016x}-rank-{rank}{SUFFIX}", std::process::id()));
        let file = match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
            Err(e) => {
                return Err(Refusal::error(format!(
                    "{}: no file can be made there: {e}. The run's state needs a folder that can be written ([zero] \
                     nvme_dir)",
                    dir.display()
                )));
            }
        };
        let reserved = Reserved { file: Arc::new(file), path, direct: false };
        reserved.file.lock().with_context(|| format!("locking {}", reserved.path.display()))?;
        // Otherwise somebody has removed it before it was locked.
        if is_at(&reserved.file, &reserved.path) {
            without_copies(&reserved.file);
            return Ok(reserved);
        }
    }
}

/// Whether `path` is the name of this very file.
fn is_at(file: &File, path: &Path) -> bool {
    let id = |meta: Metadata| (meta.dev(), meta.ino());
    matches!((file.metadata().map(id), std::fs::symlink_metadata(path).map(id)), (Ok(a), Ok(b)) if a == b)
}

fn write_header(file: &File, rank: usize, bytes: u64) -> io::Result<()> {
    let mut header = vec![0; PAGE];
    header[..MAGIC.len()].copy_from_slice(MAGIC);
    let note = format!(
        "\nrank {rank} of process {}: {bytes} bytes of a run's state; of no use to another\n",
        std::process::id()
    );
    header[MAGIC.len()..MAGIC.len() + note.len()].copy_from_slice(note.as_bytes());
    file.write_all_at(&header, 0)?;
    // So that it is known for what it is even after the power has failed.
    file.sync_all()
}

/// Has the file system set aside `bytes`, so that no write ends for want of room.
fn take_room(file: &File, bytes: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        let length = libc::off_t::try_from(bytes).map_err(|_| io::Error::from(ErrorKind::FileTooLarge))?;
        loop {
            // SAFETY: a call without pointers on an open descriptor.
            if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, length) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // This file system knows no such thing.
                Some(libc::EOPNOTSUPP | libc::ENOSYS) => break,
                _ => return Err(error),
            }
        }
    }
    write_zeros(file, bytes)
}

/// The slow way to have room.
fn write_zeros(file: &File, bytes: u64) -> io::Result<()> {
    let zeros = vec![0; 4 << 20];
    let mut at = HEADER_BYTES;
    while at < bytes {
        let length = (bytes - at).min(zeros.len() as u64);
        file.write_all_at(&zeros[..length as usize], at)?;
        at += length;
    }
    // Some find out only now that there is no room.
    file.sync_all()
}

/// Sets a file to pass by the cache, if its file system lets pages be read and written that way.
#[cfg(target_os = "linux")]
fn try_direct(file: &File) -> bool {
    use std::os::fd::AsRawFd;
    let set = |flags: i32| {
        // SAFETY: a call without pointers on an open descriptor.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) == 0 }
    };
    // SAFETY: as above.
    let before = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if before < 0 || !set(before | libc::O_DIRECT) {
        return false;
    }
    let works = Buffer::unbudgeted(DType::U8, PAGE).is_ok_and(|mut page| {
        file.read_exact_at(page.bytes_mut(), 0).is_ok() && file.write_all_at(page.bytes(), 0).is_ok()
    });
    if !works {
        set(before);
    }
    works
}

#[cfg(not(target_os = "linux"))]
fn try_direct(_file: &File) -> bool {
    false
}

/// A file system that copies on write would need more room than was set aside; btrfs can leave it for a file that is
/// still empty. It does not matter if this fails: others do not know it.
fn without_copies(file: &File) {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        const FS_NOCOW_FL: libc::c_int = 0x0080_0000;
        let mut flags: libc::c_int = 0;
        // SAFETY: both calls read or write one int, which is there.
        unsafe {
            if libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS, &mut flags) == 0 {
                flags |= FS_NOCOW_FL;
                libc::ioctl(file.as_raw_fd(), libc::FS_IOC_SETFLAGS, &flags);
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = file;
}

/// Removes what dead runs have left, and makes sure that `total` bytes are free. A run that was killed a moment ago may
/// still be held by what it had asked of the drive, so that room is waited for a little where there are such files.
fn clear_room(dir: &Path, rank: usize, total: u64) -> Result<()> {
    const TRIES: usize = 20;
    for attempt in 1.. {
        let seen = remove_leftovers(dir);
        let free = free_disk_bytes(dir)?;
        if free >= total {
            break;
        }
        if seen == 0 || attempt == TRIES {
            return Err(too_small(dir, rank, total, Some(free)));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Removes the state files of runs that have ended without doing so themselves; the number of state files there were.
/// Whatever cannot be opened, locked or removed is left alone.
fn remove_leftovers(dir: &Path) -> usize {
    let mut seen = 0;
    for path in state_files(dir) {
        seen += 1;
        // An error is somebody else's file, or one that has gone meanwhile. Removed while it is held: else its maker could
        // take it in between.
        if let Ok(Some(_held)) = dead(&path) {
            let _ = std::fs::remove_file(&path);
        }
    }
    seen
}

/// Bytes of `dir`'s file system that [`remove_leftovers`] would free.
pub fn left_by_dead_runs(dir: &Path) -> u64 {
    let bytes = |file: File| file.metadata().map_or(0, |meta| meta.blocks() * 512);
    state_files(dir).filter_map(|path| dead(&path).ok().flatten()).map(bytes).sum()
}

/// What is called as a state file is.
fn state_files(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let named = |name: &str| name.starts_with(PREFIX) && name.ends_with(SUFFIX);
    let ours = move |entry: &DirEntry| {
        entry.file_name().to_str().is_some_and(named) && entry.file_type().is_ok_and(|kind| kind.is_file())
    };
    std::fs::read_dir(dir).into_iter().flatten().flatten().filter(ours).map(|entry| entry.path())
}

/// A state file that no process holds, now held by us.
fn dead(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    if file.try_lock().is_err() || !is_at(&file, path) {
        return Ok(None);
    }
    let mut magic = [0; MAGIC.len()];
    // An empty one is of a run that was killed before it could mark it, or is about to: its maker will see.
    if file.metadata()?.len() > 0 {
        file.read_exact_at(&mut magic, 0)?;
        if &magic != MAGIC {
            return Ok(None);
        }
    }
    Ok(Some(file))
}

//! Mapped files and the disks they lie on.

use std::fs::File;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use memmap2::Mmap;

/// Maps a file that nobody is expected to change while the program runs.
pub fn map_file(file: &File) -> io::Result<Mmap> {
    // SAFETY: the map is read-only. Another process that truncates the file meanwhile would make reads fail with a
    // signal, which is what happens to every program that maps its model files; lengths are checked when opening.
    unsafe { Mmap::map(file) }
}

/// Bytes that this user may still write to the disk that holds `path`, or its nearest folder that exists.
pub fn free_disk_bytes(path: &Path) -> Result<u64> {
    let absolute = std::path::absolute(path).with_context(|| format!("resolving {}", path.display()))?;
    let existing = absolute.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let name = std::ffi::CString::new(existing.as_os_str().as_encoded_bytes())?;
    // SAFETY: `statvfs` is plain data, for which zero is valid; `name` ends in a zero byte.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call.
    if unsafe { libc::statvfs(name.as_ptr(), &mut stat) } != 0 {
        return Err(io::Error::last_os_error())
            .with_context(|| format!("asking for free space at {}", existing.display()));
    }
    Ok(stat.f_bavail as u64 * stat.f_frsize as u64)
}

/// The largest resident size of this process so far, in bytes.
pub fn peak_rss_bytes() -> u64 {
    // SAFETY: `rusage` is plain data, for which zero is valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid for the call.
    if unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) } != 0 {
        return 0;
    }
    // Kilobytes on Linux, bytes on macOS.
    usage.ru_maxrss as u64 * if cfg!(target_os = "macos") { 1 } else { 1024 }
}

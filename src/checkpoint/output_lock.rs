//! The output folder belongs to one run at a time: the lock of its rank 0 on the folder itself (`flock`), which the system
//! takes away when the process ends, however it does.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::Refusal;

/// How long a run waits for those who only look whether somebody holds the lock.
const LOOKERS: Duration = Duration::from_secs(1);

/// Takes `dir`, which is there, for as long as what is given back lives. None where folders cannot be locked, as on some
/// network drives. A [`Refusal`] if another run has it.
pub fn hold(dir: &Path) -> Result<Option<File>> {
    let Ok(folder) = File::open(dir) else { return Ok(None) };
    let until = Instant::now() + LOOKERS;
    loop {
        match folder.try_lock() {
            Ok(()) => return Ok(Some(folder)),
            Err(TryLockError::Error(_)) => return Ok(None),
            Err(TryLockError::WouldBlock) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            Err(TryLockError::WouldBlock) => return Err(Refusal::error(format!("{}: {TAKEN}", dir.display()))),
        }
    }
}

/// Whether a run that is under way has `dir`.
pub fn is_held(dir: &Path) -> bool {
    // Shared, so that those who look do not see each other.
    File::open(dir).is_ok_and(|folder| matches!(folder.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// What to say of a folder that is held.
pub const TAKEN: &str =
    "another run that is under way writes into this folder: wait for its end, stop it, or name another folder";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_one_runs_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_held(dir.path()) && !is_held(&dir.path().join("nowhere")));
        let held = hold(dir.path()).unwrap();
        assert!(held.is_some() && is_held(dir.path()));
        let refused = hold(dir.path()).unwrap_err();
        assert!(refused.to_string().contains("another run that is under way"), "{refused}");
        drop(held);
        assert!(!is_held(dir.path()) && hold(dir.path()).unwrap().is_some());
    }
}

//! Signals, as launcher and ranks take them.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGCHLD, SIGXFSZ};
use signal_hook::{flag, low_level};

use crate::comm::process;

/// What comes within so long of a first signal is the same request to stop: a terminal that is closed, a system that shuts
/// down, and launchers that pass on what their group was sent already send several at once.
pub(super) const ONE_REQUEST: Duration = Duration::from_millis(500);

/// What every process of this program begins with, whatever it inherited.
pub fn prepare() -> Result<()> {
    // Where it is ignored the system does not say how a child ended.
    process::obey(SIGCHLD);
    // A file that grows past a limit is an error of the write that does it, which names the file.
    flag::register(SIGXFSZ, Arc::default()).context("cannot listen for signals")?;
    Ok(())
}

/// Those of `signals` that whoever started this process does not want ignored: `nohup` wants SIGHUP so, and a shell's
/// script SIGINT for what it starts in the background.
pub(super) fn not_ignored(signals: &[i32]) -> Vec<i32> {
    signals.iter().copied().filter(|&signal| !process::is_ignored(signal)).collect()
}

/// Raises `flag` at the first of these signals; one that comes later than [`ONE_REQUEST`] after it ends the process at once
/// with `status`.
pub(super) fn stop_at(signals: &[i32], flag: &Arc<AtomicBool>, status: u8) -> Result<()> {
    let first = Arc::new(AtomicI64::new(i64::MIN));
    for &signal in signals {
        let (first, flag) = (first.clone(), flag.clone());
        let handle = move || {
            let now = process::milliseconds() as i64;
            match first.compare_exchange(i64::MIN, now, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => flag.store(true, Ordering::Relaxed),
                Err(then) if now - then >= ONE_REQUEST.as_millis() as i64 => low_level::exit(status.into()),
                Err(_) => {}
            }
        };
        // Nothing else may be done in a signal's handler than such: atomics, reading a clock, leaving.
        process::at_signal(signal, handle).context("cannot listen for signals")?;
    }
    Ok(())
}

/// A line on standard error. A disk that is full, or a reader that has gone, is no reason to stop.
pub fn tell(what: &dyn std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{what}");
}

#[cfg(test)]
mod tests {
    use signal_hook::consts::{SIGUSR1, SIGUSR2};

    use super::*;

    #[test]
    fn what_is_ignored_stays_ignored() {
        process::ignore(SIGUSR2);
        assert_eq!(not_ignored(&[SIGUSR1, SIGUSR2]), [SIGUSR1]);
        process::obey(SIGUSR2);
        assert_eq!(not_ignored(&[SIGUSR1, SIGUSR2]), [SIGUSR1, SIGUSR2]);
    }

    #[test]
    fn several_signals_at_once_are_one_request() {
        let flag = Arc::new(AtomicBool::new(false));
        stop_at(&[SIGUSR1], &flag, 77).unwrap();
        for _ in 0..3 {
            low_level::raise(SIGUSR1).unwrap();
        }
        // Still here.
        assert!(flag.load(Ordering::Relaxed));
    }
}

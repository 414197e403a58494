//! Signals, as launcher and ranks take them.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGCHLD, SIGXFSZ};
use signal_hook::{flag, low_level};

/// What comes within so long of a first signal is the same request to stop: a terminal that is closed, a system that shuts
/// down, and launchers that pass on what their group was sent already send several at once.
pub(super) const ONE_REQUEST: Duration = Duration::from_millis(500);

/// What every process of this program begins with, whatever it inherited.
pub fn prepare() -> Result<()> {
    // Where it is ignored the system does not say how a child ended.
    // SAFETY: the default action; no handler of ours is replaced.
    unsafe { libc::signal(SIGCHLD, libc::SIG_DFL) };
    // A file that grows past a limit is an error of the write that does it, which names the file.
    flag::register(SIGXFSZ, Arc::default()).context("cannot listen for signals")?;
    Ok(())
}

/// Those of `signals` that whoever started this process does not want ignored: `nohup` wants SIGHUP so, and a shell's
/// script SIGINT for what it starts in the background.
pub(super) fn not_ignored(signals: &[i32]) -> Vec<i32> {
    let is_ignored = |signal: i32| {
        // SAFETY: all zeros is a valid value of this structure; the call changes nothing but that.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
        }
    };
    signals.iter().copied().filter(|&signal| !is_ignored(signal)).collect()
}

/// Raises `flag` at the first of these signals; one that comes later than [`ONE_REQUEST`] after it ends the process at once
/// with `status`.
pub fn stop_at(signals: &[i32], flag: &Arc<AtomicBool>, status: u8) -> Result<()> {
    let first = Arc::new(AtomicI64::new(i64::MIN));
    for &signal in signals {
        let (first, flag) = (first.clone(), flag.clone());
        let handle = move || {
            let now = milliseconds();
            match first.compare_exchange(i64::MIN, now, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => flag.store(true, Ordering::Relaxed),
                Err(then) if now - then >= ONE_REQUEST.as_millis() as i64 => low_level::exit(status.into()),
                Err(_) => {}
            }
        };
        // SAFETY: it does nothing that may not be done in a signal's handler: atomics, reading a clock, leaving.
        unsafe { low_level::register(signal, handle) }.context("cannot listen for signals")?;
    }
    Ok(())
}

/// Of a clock that only goes forward.
fn milliseconds() -> i64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a place for the time; may be called in a signal's handler (POSIX).
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as i64 * 1000 + now.tv_nsec as i64 / 1_000_000
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
        // SAFETY: nobody else uses this signal.
        unsafe { libc::signal(SIGUSR2, libc::SIG_IGN) };
        assert_eq!(not_ignored(&[SIGUSR1, SIGUSR2]), [SIGUSR1]);
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

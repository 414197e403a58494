//! The processes of runs under way, and signals to them.
#![cfg(target_os = "linux")]

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::{Home, Running};

/// Whoever runs the tests may have ignored interrupts, as scripts do for what they start in the background: not so this one.
pub fn hearing_interrupts(command: &mut Command) -> &mut Command {
    let hear = || {
        // SAFETY: no memory effects.
        unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
        Ok(())
    };
    // SAFETY: that call is all that happens between fork and exec.
    unsafe { command.pre_exec(hear) }
}

pub fn kill(signal: &str, pid: u32) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

/// All at once; some may be gone.
pub fn kill_all(signal: &str, pids: &[u32]) {
    Command::new("kill").arg(signal).args(pids.iter().map(u32::to_string)).output().unwrap();
}

/// Waits until all are gone.
pub fn wait_gone(pids: &[u32]) {
    let since = Instant::now();
    while !gone(pids) {
        assert!(since.elapsed() < Duration::from_secs(20), "still running");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Both ranks' processes, once they are there.
pub fn both_ranks(launcher: &Running) -> Vec<u32> {
    let since = Instant::now();
    loop {
        let found = ranks(launcher);
        if found.len() == 2 {
            return found;
        }
        assert!(since.elapsed() < Duration::from_secs(60), "no ranks");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The ranks' processes, by rank.
pub fn ranks(launcher: &Running) -> Vec<u32> {
    let parent = launcher.child.id().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Some(fields) = fields(pid) else { continue };
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        let rank = environment.split(|byte| *byte == 0).find_map(|variable| variable.strip_prefix(b"RANK="));
        if fields[1] == parent
            && let Some(rank) = rank
        {
            found.push((rank.to_vec(), pid));
        }
    }
    found.sort();
    found.into_iter().map(|(_, pid)| pid).collect()
}

/// State and parent of a process, if there is one.
fn fields(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(PathBuf::from("/proc").join(pid.to_string()).join("stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(str::to_string).collect())
}

/// Whether all are gone, or only to be buried.
pub fn gone(pids: &[u32]) -> bool {
    pids.iter().all(|pid| fields(*pid).is_none_or(|fields| fields[0] == "Z"))
}

/// The checkpoints in the output folder, and what is half one.
pub fn checkpoints(home: &Home) -> Vec<String> {
    let names = fs::read_dir(home.out()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains("checkpoint")).collect()
}

//! What can go wrong with a run whose states rest on a drive: a folder that will not do is refused before anything is
//! written; whatever happens later ends the run with its cause, leaves its last checkpoint whole, and touches nothing
//! that is not the run's own.
#![cfg(target_os = "linux")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dblaunch::checkpoint::{self, Checkpoint};

use crate::harness::{Home, Job, PLAIN, Ran, Running, listing, rows};
use crate::processes::{checkpoints, gone, kill, kill_all, ranks, wait_gone};

/// Everything that can rest on a drive does.
const OFFLOADED: [&str; 4] = [
    "zero.offload_params=nvme",
    "zero.offload_optimizer=nvme",
    "zero.offload_gradients=host",
    "zero.nvme_dir=HOME/drive",
];
/// In which all must have stopped after a failure.
const SOON: Duration = Duration::from_secs(10);
const ENDLESS: &str = "train.max_steps=4000";

fn home() -> Home {
    let home = Home::new();
    fs::create_dir(home.path("drive")).unwrap();
    home
}

fn job(home: &Home, ranks: usize) -> Job<'_> {
    home.job(PLAIN).ranks(ranks).sets(&OFFLOADED)
}

fn unet(home: &Home, out: &str) -> Vec<u8> {
    fs::read(home.path(out).join("unet/diffusion_pytorch_model.safetensors")).unwrap()
}

/// The state files in the folder, by rank.
fn state_files(home: &Home) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        listing(&home.path("drive")).into_iter().filter(|path| name(path).starts_with("dblaunch-state-")).collect();
    found.sort_by_key(|path| name(path).rsplit_once("-rank-").map(|(_, rank)| rank.to_string()));
    found
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// The steps of the checkpoints that are there, in order.
fn saved(home: &Home) -> Vec<u64> {
    let names = if home.out().exists() { checkpoints(home) } else { Vec::new() };
    let mut steps: Vec<u64> = names.iter().filter_map(|name| checkpoint::number(name)).collect();
    steps.sort();
    steps
}

/// The step of the newest checkpoint. All that are there are whole.
fn last_checkpoint(home: &Home) -> Option<u64> {
    let all = saved(home);
    for step in &all {
        Checkpoint::open(&home.out().join(format!("checkpoint-{step}"))).unwrap();
    }
    all.last().copied()
}

fn wait_for_checkpoint(home: &Home, running: &mut Running, after: u64) {
    let since = Instant::now();
    while saved(home).last() <= Some(&after) {
        assert!(running.child.try_wait().unwrap().is_none(), "it ended early: {}", running.told());
        assert!(since.elapsed() < Duration::from_secs(120), "no checkpoint: {}", running.told());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A run that fails of `fault` after a checkpoint: it says `pieces`, its checkpoint is whole, and from there everything is
/// as if nothing had happened.
fn fails_and_goes_on(count: usize, pieces: &[&str], fault: impl FnOnce(&Home, &mut Running, &[u32])) {
    let home = home();
    let sets = ["checkpoint.every=1", "checkpoint.keep=2"];
    let mut running = job(&home, count).sets(&sets).set(ENDLESS).start();
    wait_for_checkpoint(&home, &mut running, 1);
    let pids = ranks(&running);
    assert_eq!(pids.len(), count);
    fault(&home, &mut running, &pids);
    let since = Instant::now();
    let ran = running.end();
    assert!(since.elapsed() < SOON && gone(&pids), "after {:?}", since.elapsed());
    ran.failed(pieces);
    assert!(state_files(&home).is_empty(), "{:?}", state_files(&home));
    let last = last_checkpoint(&home).unwrap();
    assert!(last >= 2);
    let steps = format!("train.max_steps={}", last + 2);
    let resumed = ["checkpoint.resume=latest", &steps];
    job(&home, count).sets(&sets).sets(&resumed).run().done().says(&format!("after step {last}"));
    job(&home, count).sets(&[&steps, "output.dir=HOME/whole"]).run().done();
    assert_eq!(rows(&home.out()), rows(&home.path("whole")));
    assert!(unet(&home, "out") == unet(&home, "whole"));
}

/// Changes the stopped ranks' files through `change` until the run fails of it: what is in memory just then is written
/// anew, which heals it.
fn until_it_fails(running: &mut Running, pids: &[u32], mut change: impl FnMut(u64)) {
    for attempt in 0..50 {
        pids.iter().for_each(|pid| kill("-STOP", *pid));
        change(attempt);
        pids.iter().for_each(|pid| kill("-CONT", *pid));
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(3) {
            if running.child.try_wait().unwrap().is_some() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    panic!("it goes on and on: {}", running.told());
}

fn flip_a_bit(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 16], at).unwrap();
}

#[test]
fn a_folder_that_will_not_do_is_refused_and_nothing_is_written() {
    let home = home();
    fs::write(home.path("file"), "mine").unwrap();
    let before = listing(home.path("").as_path());
    let refused = |set: &str, pieces: &[&str]| {
        for words in [&[][..], &["check"]] {
            let problems = home.job(PLAIN).words(words).sets(&OFFLOADED).set(set).ranks(2).run().refused();
            assert!(problems.len() == 1 && problems[0].contains("zero.nvme_dir"), "{problems:?}");
            assert!(pieces.iter().all(|piece| problems[0].contains(piece)), "{problems:?} lacks one of {pieces:?}");
            assert_eq!(listing(home.path("").as_path()), before);
        }
    };
    refused("zero.nvme_dir=HOME/nowhere", &["no such folder"]);
    refused("zero.nvme_dir=HOME/file", &["not a folder"]);
    // The kernel's own has room for nothing.
    refused("zero.nvme_dir=/proc/self", &["MiB there, all ranks together, and 0 B are free", "larger drive"]);
    fs::set_permissions(home.path("drive"), fs::Permissions::from_mode(0o555)).unwrap();
    match File::create(home.path("drive/probe")) {
        Err(_) => refused("zero.nvme_dir=HOME/drive", &["nothing can be written"]),
        Ok(_) => eprintln!("not tested with a folder that may only be read: this is root, who may write there, too"),
    }
}

/// Real file systems, where the system lets us have some: too small by a little, and one that may only be read.
#[test]
fn a_small_or_read_only_file_system_is_refused() {
    let mount = |options: &str| format!("mount -t tmpfs -o {options} none \"$HOME/drive\" && exec \"$0\" \"$@\"");
    let allowed = Command::new("unshare").args(["-rm", "true"]).output().is_ok_and(|out| out.status.success());
    if !allowed {
        return eprintln!("not tested: this system does not let us mount anything (unshare -rm)");
    }
    let home = home();
    let ran = |options: &str| job(&home, 2).through(&["unshare", "-rm", "sh", "-c", &mount(options)]).run();
    for (options, piece) in [("size=4m", "and 4.0 MiB are free: make room"), ("size=64m,ro", "nothing can be written")]
    {
        let problems = ran(options).refused();
        assert!(problems[0].contains("zero.nvme_dir") && problems[0].contains(piece), "{problems:?}");
        assert!(!home.out().exists());
    }
    ran("size=12m").done();
}

/// A file system in memory, which has its own ideas of direct I/O.
#[test]
fn any_file_system_gives_the_same_bits() {
    let home = home();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    home.job(PLAIN).run().done();
    let set = format!("zero.nvme_dir={}", memory.path().display());
    for stage in ["zero.stage=0", "zero.stage=3"] {
        let sets = [&set, stage, "output.dir=HOME/memory", "output.overwrite=true"];
        let ran = job(&home, 1).sets(&sets).run().done();
        ran.says(&format!("parameters and optimizer state rest in {}", memory.path().display()));
        ran.says("to the drive");
        assert_eq!(rows(&home.path("memory")), rows(&home.out()));
        assert!(unet(&home, "memory") == unet(&home, "out"));
        assert_eq!(fs::read_dir(memory.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_flipped_bit_stops_the_run_and_is_named() {
    for (count, victim) in [(1, 0), (2, 1)] {
        let pieces = ["dblaunch-state-", &format!("-rank-{victim}.bin: block 0 of "), "checksum", "last checkpoint"];
        fails_and_goes_on(count, &pieces, |home, running, pids| {
            let files = state_files(home);
            assert_eq!(files.len(), count);
            let bytes = fs::metadata(&files[victim]).unwrap().len();
            until_it_fails(running, pids, |attempt| {
                flip_a_bit(&files[victim], 4096 + (attempt * 1_234_567 + 321_000) % (bytes - 8192));
            });
        });
    }
}

#[test]
fn a_file_that_somebody_shortens_stops_the_run() {
    fails_and_goes_on(2, &["-rank-0.bin: block 0 of ", "shortened", "last checkpoint"], |home, running, pids| {
        let files = state_files(home);
        until_it_fails(running, pids, |_| {
            OpenOptions::new().write(true).open(&files[0]).unwrap().set_len(4096).unwrap();
        });
    });
}

/// What a drive that is full although its room was reserved looks like from inside: writes fail.
#[test]
fn writes_that_fail_in_the_middle_stop_the_run() {
    let pieces = ["-rank-1.bin: block 0 of ", "writing failed", "too large", "ulimit", "last checkpoint"];
    fails_and_goes_on(2, &pieces, |_, _, pids| {
        let limit = Command::new("prlimit").args(["--pid", &pids[1].to_string(), "--fsize=4096"]).status();
        assert!(limit.unwrap().success());
    });
}

/// Beside another run and foreign files in the same folder.
#[test]
fn a_killed_ranks_file_goes_with_the_next_start_and_nothing_else_does() {
    let home = home();
    let foreign = ["notes.txt", "dblaunch-state-1-00-rank-0.bin", "dblaunch-state-of-mind.bin"];
    foreign.iter().for_each(|name| fs::write(home.path("drive").join(name), "not a run's").unwrap());
    let foreign: Vec<PathBuf> = listing(&home.path("drive"));
    let mut other = home.job(PLAIN).sets(&OFFLOADED).sets(&[ENDLESS, "output.dir=HOME/other"]).start();
    other.wait_for_words("rest in");
    let living: Vec<PathBuf> = listing(&home.path("drive"));
    assert_eq!(living.len(), foreign.len() + 1);

    let sets = ["zero.stage=3", "checkpoint.every=2", "checkpoint.keep=1", "train.max_steps=14"];
    let mut running = job(&home, 2).sets(&sets).start();
    running.wait_for_step(4);
    let pids = ranks(&running);
    kill("-KILL", pids[1]);
    let since = Instant::now();
    let ran = running.end();
    assert!(since.elapsed() < SOON && gone(&pids), "after {:?}", since.elapsed());
    ran.failed(&["rank 1 of 2", "SIGKILL"]);
    assert!(last_checkpoint(&home) >= Some(2));
    let left: Vec<PathBuf> = listing(&home.path("drive")).into_iter().filter(|path| !living.contains(path)).collect();
    assert!(left.iter().any(|path| name(path).ends_with("-rank-1.bin")), "{left:?}");

    let mut again =
        job(&home, 2).sets(&sets).sets(&["checkpoint.resume=latest"]).words(&["--max-restarts", "1"]).start();
    again.wait_for_words("rest in");
    let now = listing(&home.path("drive"));
    assert!(left.iter().all(|path| !now.contains(path)) && living.iter().all(|path| now.contains(path)), "{now:?}");
    let pids = ranks(&again);
    kill("-KILL", pids[0]);
    again.end().done().says("restart 1 of 1");
    assert_eq!(listing(&home.path("drive")), living);
    job(&home, 2).sets(&sets).set("output.dir=HOME/whole").run().done();
    assert_eq!(rows(&home.out()), rows(&home.path("whole")));
    assert!(unet(&home, "out") == unet(&home, "whole"));

    kill("-TERM", other.child.id());
    assert_eq!(other.end().status, Some(130));
    assert_eq!(listing(&home.path("drive")), foreign);
}

/// The moments at which everything is killed: `DBLAUNCH_TEST_KILLS`, else this many.
const KILLS: u64 = 12;

/// Launcher and ranks at once, again and again, and each time it goes on from what it finds.
#[test]
fn everything_killed_at_any_moment_goes_on_to_the_bit() {
    let kills = std::env::var("DBLAUNCH_TEST_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    let home = home();
    fs::write(home.path("drive/notes.txt"), "mine").unwrap();
    let sets = ["zero.stage=3", "train.max_steps=6", "checkpoint.every=1", "checkpoint.keep=2"];
    let since = Instant::now();
    job(&home, 2).sets(&sets).set("output.dir=HOME/whole").run().done();
    // Within which the kills come: shorter when runs end before theirs, longer when they do not.
    let mut span = since.elapsed();
    let (mut killed, mut finished, mut killed_at, mut state) = (0, 0, Vec::new(), 0x5EED_u64);
    while killed < kills || finished == 0 {
        let running = job(&home, 2).sets(&sets).set("checkpoint.resume=latest").start();
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let moment = span.mul_f64((state >> 11) as f64 / (1u64 << 53) as f64);
        let ended = match killed < kills {
            true => ends_before(running, moment),
            false => Some(running.end()),
        };
        if let Some(ran) = ended {
            let ran = ran.done();
            finished += 1;
            span = span.mul_f64(0.7);
            assert_eq!(rows(&home.out()), rows(&home.path("whole")), "{}", ran.stderr);
            assert!(unet(&home, "out") == unet(&home, "whole"), "after {killed_at:?}");
            assert_eq!(listing(&home.path("drive")), [home.path("drive/notes.txt")], "after {killed_at:?}");
            fs::remove_dir_all(home.out()).unwrap();
            continue;
        }
        killed += 1;
        span = span.mul_f64(1.1);
        killed_at.push((last_checkpoint(&home), half_done(&home)));
        assert!(state_files(&home).len() <= 4, "leftovers pile up: {:?}", state_files(&home));
    }
    eprintln!("killed {killed} times, finished {finished} times; checkpoint and what was half done: {killed_at:?}");
}

/// The run's end, if it ends before `moment`; else it and its ranks are killed.
fn ends_before(mut running: Running, moment: Duration) -> Option<Ran> {
    let since = Instant::now();
    while since.elapsed() < moment {
        if running.child.try_wait().unwrap().is_some() {
            return Some(running.end());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut all = ranks(&running);
    all.push(running.child.id());
    kill_all("-KILL", &all);
    running.child.wait().unwrap();
    wait_gone(&all);
    None
}

/// Whether the kill came while a checkpoint was being written or deleted.
fn half_done(home: &Home) -> bool {
    home.out().exists() && checkpoints(home).iter().any(|name| name.starts_with('.'))
}

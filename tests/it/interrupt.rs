//! A run that is interrupted, or one of whose ranks dies or hangs: what is written, what is said, what is left running,
//! and that going on from there is as if nothing had happened.
#![cfg(target_os = "linux")]

use std::fs;
use std::time::{Duration, Instant};

use crate::harness::{Home, PLAIN, column, rows};
use crate::processes::{both_ranks, checkpoints, gone, kill, ranks};

/// In which all must have stopped after a failure.
const SOON: Duration = Duration::from_secs(5);
/// Steps that take long enough to be caught in the middle.
const STEPS: &str = "train.max_steps=14";

fn unet(home: &Home, out: &str) -> Vec<u8> {
    fs::read(home.path(out).join("unet/diffusion_pytorch_model.safetensors")).unwrap()
}

/// A signal to the launcher: a checkpoint, status 130, and the rest of the run gives the same weights to the bit.
fn interrupted_and_resumed(signal: &str, count: usize) {
    let home = Home::new();
    let mut running = home.job(PLAIN).ranks(count).set(STEPS).start();
    running.wait_for_step(3);
    let pids = ranks(&running);
    assert_eq!(pids.len(), count);
    kill(signal, running.child.id());
    let ran = running.end();
    assert_eq!(ran.status, Some(130), "{}", ran.stderr);
    assert!(gone(&pids), "something was left running");
    assert_eq!(checkpoints(&home).len(), 1);
    let cut = column(&rows(&home.out()), "grad_norm").len();
    assert!((3..14).contains(&cut) && checkpoints(&home)[0] == format!("checkpoint-{cut}"), "{:?}", checkpoints(&home));
    home.job(PLAIN).ranks(count).sets(&[STEPS, "checkpoint.resume=latest"]).run().done();
    home.job(PLAIN).ranks(count).sets(&[STEPS, "output.dir=HOME/whole"]).run().done();
    assert_eq!(rows(&home.out()), rows(&home.path("whole")));
    assert!(unet(&home, "out") == unet(&home, "whole"));
}

#[test]
fn ctrl_c_writes_a_checkpoint_to_go_on_from() {
    interrupted_and_resumed("-INT", 2);
}

#[test]
fn sigterm_writes_a_checkpoint_to_go_on_from() {
    interrupted_and_resumed("-TERM", 1);
}

#[test]
fn no_checkpoint_is_written_where_none_is_wanted() {
    let home = Home::new();
    let mut running = home.job(PLAIN).ranks(2).sets(&["train.max_steps=4000", "checkpoint.on_interrupt=false"]).start();
    running.wait_for_step(1);
    kill("-INT", running.child.id());
    assert_eq!(running.end().status, Some(130));
    assert_eq!(checkpoints(&home), Vec::<String>::new());
}

/// Interrupted as early as can be: it leaves with 130, and what is there can be gone on from.
#[test]
fn an_interrupt_before_the_first_step_is_heard() {
    let home = Home::new();
    let running = home.job(PLAIN).ranks(2).set(STEPS).start();
    both_ranks(&running);
    kill("-TERM", running.child.id());
    assert_eq!(running.end().status, Some(130));
    home.job(PLAIN).ranks(2).sets(&["train.max_steps=2", "checkpoint.resume=latest"]).run().done();
}

#[test]
fn a_second_interrupt_stops_at_once() {
    let home = Home::new();
    let mut running = home.job(PLAIN).ranks(2).sets(&["train.max_steps=4000"]).start();
    running.wait_for_step(1);
    let pids = ranks(&running);
    // A stopped rank cannot write a checkpoint.
    kill("-STOP", pids[1]);
    kill("-INT", running.child.id());
    running.wait_for_words("once more: stop at once");
    // What comes at the same moment is the same interrupt.
    kill("-TERM", running.child.id());
    std::thread::sleep(Duration::from_millis(700));
    assert!(!gone(&pids));
    let since = Instant::now();
    kill("-INT", running.child.id());
    assert_eq!(running.end().status, Some(130));
    assert!(since.elapsed() < SOON && gone(&pids));
    assert_eq!(checkpoints(&home).into_iter().filter(|name| name.starts_with("checkpoint-")).count(), 0);
}

/// A terminal that is closed, and a system that shuts down, send several signals at once.
#[test]
fn signals_at_once_are_one_interrupt() {
    let home = Home::new();
    let mut running = home.job(PLAIN).ranks(2).sets(&["train.max_steps=4000"]).start();
    running.wait_for_step(2);
    let launcher = running.child.id();
    ["-TERM", "-HUP", "-HUP"].iter().for_each(|signal| kill(signal, launcher));
    assert_eq!(running.end().status, Some(130));
    assert_eq!(checkpoints(&home).len(), 1);
}

/// `nohup`, and what a shell that ignores its children passes on.
#[test]
fn signals_that_were_ignored_stay_ignored() {
    let home = Home::new();
    let ignoring = ["sh", "-c", "trap '' HUP CHLD; exec \"$0\" \"$@\""];
    let mut running = home.job(PLAIN).ranks(2).set(STEPS).through(&ignoring).start();
    running.wait_for_step(2);
    kill("-HUP", running.child.id());
    running.end().done();
    assert_eq!(column(&rows(&home.out()), "grad_norm").len(), 14);
}

/// A rank whose peers do not come, under a launcher that is none of ours.
#[test]
fn a_rank_that_waits_for_others_hears_an_interrupt() {
    let home = Home::new();
    let config = home.path("train.toml");
    fs::write(&config, home.filled(PLAIN)).unwrap();
    for rank in ["0", "1"] {
        let mut command = home.program();
        command.env("PMI_RANK", rank).env("PMI_SIZE", "2").env("PMI_JOBID", rank).arg(&config);
        let running = home.start(command);
        std::thread::sleep(Duration::from_secs(2));
        kill("-TERM", running.child.id());
        let since = Instant::now();
        let ran = running.end();
        assert_eq!(ran.status, Some(130), "{}", ran.stderr);
        assert!(since.elapsed() < SOON);
        ran.says("interrupted while it waited for the other ranks");
    }
}

/// What is started again is what was started, whatever the file says by then.
#[test]
fn a_restarted_run_keeps_the_configuration_it_was_started_with() {
    let home = Home::new();
    let mut running = home.job(PLAIN).ranks(2).set(STEPS).words(&["--max-restarts", "1"]).start();
    running.wait_for_step(2);
    home.job_file(PLAIN, "learning_rate = 1e-4", "learning_rate = 1e-2\nthere is = no such key");
    kill("-KILL", ranks(&running)[1]);
    running.end().done();
    home.job(PLAIN).ranks(2).sets(&[STEPS, "output.dir=HOME/whole"]).run().done();
    assert!(unet(&home, "out") == unet(&home, "whole"));
}

/// Killed by the system: the others stop, and the message names the rank and the cause.
#[test]
fn a_killed_rank_stops_the_others_and_is_named() {
    for (count, victim) in [(2, 0), (3, 2)] {
        let home = Home::new();
        let mut running = home.job(PLAIN).ranks(count).sets(&["train.max_steps=4000", "zero.stage=3"]).start();
        running.wait_for_step(2);
        let pids = ranks(&running);
        kill("-KILL", pids[victim]);
        let since = Instant::now();
        let ran = running.end();
        assert!(since.elapsed() < SOON && gone(&pids), "after {:?}", since.elapsed());
        ran.failed(&[&format!("rank {victim} of {count}"), "SIGKILL"]);
        assert_eq!(checkpoints(&home), Vec::<String>::new());
    }
}

/// A rank that hangs is missed after the time-out, by name.
#[test]
fn a_hanging_rank_is_missed_and_named() {
    let home = Home::new();
    let mut running = home.job(PLAIN).ranks(2).sets(&["train.max_steps=4000", "zero.timeout_seconds=6"]).start();
    running.wait_for_step(1);
    let pids = ranks(&running);
    kill("-STOP", pids[1]);
    let since = Instant::now();
    let ran = running.end();
    assert!(since.elapsed() < SOON + Duration::from_secs(6) && gone(&pids), "after {:?}", since.elapsed());
    ran.failed(&["rank 1 has not joined"]);
}

/// Ranks die with their launcher, however it ends.
#[test]
fn nothing_outlives_a_killed_launcher() {
    let home = Home::new();
    let mut running = home.job(PLAIN).ranks(2).set("train.max_steps=4000").start();
    running.wait_for_step(1);
    let pids = ranks(&running);
    running.child.kill().unwrap();
    running.end();
    let since = Instant::now();
    while !gone(&pids) {
        assert!(since.elapsed() < SOON, "still running");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `--max-restarts`: the run is done all the same, and nothing shows in its results.
fn killed_and_restarted(sets: &[&str], victim: usize) {
    let home = Home::new();
    let job = || home.job(PLAIN).ranks(2).set(STEPS).sets(sets);
    let mut running = job().words(&["--max-restarts", "1"]).start();
    running.wait_for_step(4);
    kill("-KILL", ranks(&running)[victim]);
    let ran = running.end().done();
    ran.says("starting all ranks again (restart 1 of 1)");
    job().set("output.dir=HOME/whole").run().done();
    assert_eq!(rows(&home.out()), rows(&home.path("whole")));
    assert!(unet(&home, "out") == unet(&home, "whole"));
}

#[test]
fn a_restart_goes_on_from_the_newest_checkpoint() {
    killed_and_restarted(&["checkpoint.every=3", "checkpoint.keep=1"], 1);
}

#[test]
fn a_restart_without_a_checkpoint_begins_again() {
    killed_and_restarted(&[], 0);
}

/// What is started again before it had begun does not take what it was to overwrite for its own past.
#[test]
fn a_restart_does_not_go_on_from_another_run() {
    let home = Home::new();
    home.job(PLAIN).sets(&["train.max_steps=6", "checkpoint.every=3", "train.seed=11"]).run().done();
    let job = || home.job(PLAIN).ranks(2).set(STEPS);
    let running = job().set("output.overwrite=true").words(&["--max-restarts", "1"]).start();
    // While the ranks are still setting up.
    kill("-KILL", both_ranks(&running)[1]);
    running.end().done().says("restart 1 of 1");
    job().set("output.dir=HOME/whole").run().done();
    assert_eq!(rows(&home.out()), rows(&home.path("whole")));
}

/// A run that had gone on from a checkpoint elsewhere does so again.
#[test]
fn a_restart_goes_on_from_where_the_run_did() {
    let home = Home::new();
    let job = || home.job(PLAIN).ranks(2).set(STEPS);
    job().sets(&["checkpoint.every=2", "output.dir=HOME/whole"]).run().done();
    let resumed = job().set("checkpoint.resume=HOME/whole/checkpoint-2");
    let mut running = resumed.words(&["--max-restarts", "1"]).start();
    running.wait_for_step(4);
    kill("-KILL", ranks(&running)[0]);
    running.end().done();
    let whole = rows(&home.path("whole"));
    let after: Vec<_> = whole.iter().filter(|row| row["step"].as_u64() > Some(2)).cloned().collect();
    assert_eq!(rows(&home.out()), after);
}

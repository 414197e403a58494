//! Ranks as real processes: what the launcher does when they end well, fail, die, are interrupted, or lose their
//! launcher, and collectives between processes however these were started.
//!
//! This binary starts itself again as a launcher (`a_launcher`) and, through it, as ranks (`a_rank`).

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dblaunch::comm::{CommunicatorExt, Slice, SliceMut};
use dblaunch::launch::{self, Event, LaunchRequest, Output, Rank};

/// In which all must have stopped after a failure.
const SOON: Duration = Duration::from_secs(5);
/// Marks the launcher process; its value is the shell script of the ranks, empty for `a_rank`.
const SCRIPT: &str = "TEST_SCRIPT";
const OPTIONS: &str = "TEST_OPTIONS";
/// Marks a rank process; its value says what it does.
const PART: &str = "TEST_PART";

/// What a launcher did.
struct Outcome {
    status: Option<i32>,
    stdout: String,
    stderr: String,
    took: Duration,
}

impl Outcome {
    fn last_line(&self) -> &str {
        self.stderr.lines().last().unwrap_or_default()
    }

    /// The process numbers that ranks printed as `pid N`.
    fn pids(&self) -> Vec<u32> {
        self.stdout.lines().filter_map(|line| line.split_once("pid ")?.1.parse().ok()).collect()
    }
}

/// A launcher under way, with what it has printed so far.
struct Running {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
    seen: String,
}

impl Running {
    fn start(nproc: usize, max_restarts: usize, script: &str, part: &str) -> Running {
        let mut command = Command::new(std::env::current_exe().unwrap());
        #[cfg(target_os = "linux")]
        crate::processes::hearing_interrupts(&mut command);
        let mut child = command
            .args(["--exact", "ranks::a_launcher", "--nocapture"])
            .env(SCRIPT, script)
            .env(OPTIONS, format!("{nproc} {max_restarts}"))
            .env("TEST_PART_OF_RANKS", part)
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Running { child, stdout, seen: String::new() }
    }

    /// Reads on until `count` lines with `word` have come.
    fn wait_for(&mut self, word: &str, count: usize) {
        while self.seen.lines().filter(|line| line.contains(word)).count() < count {
            let read = self.stdout.read_line(&mut self.seen).unwrap();
            assert_ne!(read, 0, "the launcher ended early: {}", self.seen);
        }
    }

    fn signal(&self, signal: &str) {
        let done = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(done.success());
    }

    fn end(mut self) -> Outcome {
        let since = Instant::now();
        let mut errors = self.child.stderr.take().unwrap();
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            errors.read_to_string(&mut text).map(|_| text)
        });
        self.stdout.read_to_string(&mut self.seen).unwrap();
        let stderr = errors.join().unwrap().unwrap();
        let status = self.child.wait().unwrap().code();
        Outcome { status, stdout: self.seen, stderr, took: since.elapsed() }
    }
}

fn launch_script(nproc: usize, script: &str) -> Outcome {
    Running::start(nproc, 0, script, "").end()
}

fn launch_ranks(nproc: usize, part: &str) -> Outcome {
    Running::start(nproc, 0, "", part).end()
}

/// Whether all are gone, or nobody's but init's to bury.
fn gone(pids: &[u32]) -> bool {
    pids.iter().all(|pid| {
        let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
        stat.map_or(true, |stat| stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z')))
    })
}

/// Not a test of its own: the launcher process of the others.
#[test]
fn a_launcher() {
    let (Ok(script), Ok(options)) = (std::env::var(SCRIPT), std::env::var(OPTIONS)) else { return };
    let (nproc, restarts) = options.split_once(' ').unwrap();
    let args: &[&str] = match &*script {
        "" => &["--exact", "ranks::a_rank", "--nocapture", "--test-threads=1"],
        script => &["-c", script],
    };
    let mut request =
        LaunchRequest::this_program(nproc.parse().unwrap(), args.iter().map(OsString::from).collect()).unwrap();
    if !script.is_empty() {
        request.environment.push(("TEST_BINARY".into(), request.program.clone().into()));
        request.program = "sh".into();
    }
    request.max_restarts = restarts.parse().unwrap();
    request.environment.push((PART.into(), std::env::var("TEST_PART_OF_RANKS").unwrap().into()));
    let status = launch::run(&request, Output::standard()).unwrap();
    std::process::exit(status.into());
}

/// Not a test of its own: a rank process of the others.
#[test]
fn a_rank() {
    let Ok(part) = std::env::var(PART) else { return };
    let status = match play(&part) {
        Ok(()) => 0,
        Err(error) => launch::report_failure(&error),
    };
    std::process::exit(status.into());
}

fn play(part: &str) -> anyhow::Result<()> {
    let rank = Rank::start(Duration::from_secs(60), None)?;
    let (me, size) = (rank.world.rank, rank.world.world_size);
    println!("pid {}", std::process::id());
    match part {
        "sum" => {
            let mut data = vec![me as f32 + 1.0; 1_000_003];
            rank.communicator.all_reduce(SliceMut::F32(&mut data))?;
            let wanted = (size * (size + 1) / 2) as f32;
            anyhow::ensure!(data.iter().all(|value| *value == wanted), "wrong sum");
            let mut all = vec![0; size];
            rank.communicator.all_gather(Slice::U8(&[me as u8]), SliceMut::U8(&mut all))?;
            println!("sum {wanted} of {all:?} with {} threads", rank.threads);
        }
        "steps" => {
            rank.events.send(&Event::Start { total_steps: 3, done_steps: 0 });
            for step in 1..=3 {
                let loss = 1.0 / step as f64;
                let event = Event::Step { step, total: 3, loss, lr: 1e-5, images_per_second: 4.0, skipped: false };
                rank.events.send(&event);
            }
            rank.events.send(&Event::Done);
        }
        "one fails" if me == 1 => anyhow::bail!("in segment mid_block: no memory"),
        "one dies" if me == 1 => std::process::abort(),
        "one panics" if me == 1 => panic!("this cannot be"),
        "refused" => return Err(dblaunch::Refusal::error("data.instance_dir = \"nowhere\" does not exist")),
        "interrupted" => {
            println!("ready");
            while !rank.communicator.any(rank.interrupt.interrupted())? {
                std::thread::sleep(Duration::from_millis(1));
            }
            println!("left together");
            std::process::exit(launch::status::INTERRUPTED.into());
        }
        _ => rank.communicator.barrier()?,
    }
    Ok(())
}

#[test]
fn a_failing_rank_stops_the_others_even_stubborn_ones() {
    let script = "echo pid $$; if [ $RANK = 1 ]; then echo 'no such luck' >&2; exit 3; fi; trap '' TERM; \
                  sleep 300 & echo pid $!; wait; sleep 300";
    let outcome = launch_script(3, script);
    assert_eq!(outcome.status, Some(1), "{}", outcome.stderr);
    assert_eq!(outcome.last_line(), "dblaunch: rank 1 of 3 ended with exit status 3; its last words: no such luck");
    assert!(outcome.stderr.contains("[rank 1] no such luck"), "{}", outcome.stderr);
    assert!(outcome.took < SOON, "{:?}", outcome.took);
    assert!(!outcome.pids().is_empty() && gone(&outcome.pids()), "{}", outcome.stdout);
}

#[test]
fn a_killed_rank_is_named_with_the_signal() {
    let outcome = launch_script(2, "echo pid $$; [ $RANK = 0 ] && kill -9 $$; sleep 300");
    assert_eq!(outcome.status, Some(1));
    assert_eq!(outcome.last_line(), "dblaunch: rank 0 of 2 was killed by SIGKILL (out of memory?)");
    assert!(outcome.took < SOON && gone(&outcome.pids()));
}

#[test]
fn ranks_that_end_well_end_well() {
    let script = "echo \"$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR\"; sleep 300 & exit 0";
    let outcome = launch_script(2, script);
    assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
    for line in ["[rank 0] 0 0 2 2 127.0.0.1", "[rank 1] 1 1 2 2 127.0.0.1"] {
        assert!(outcome.stdout.lines().any(|l| l == line), "{}", outcome.stdout);
    }
    assert!(outcome.took < SOON, "what a rank left behind was waited for");
}

#[test]
fn an_interrupt_lets_ranks_leave_by_themselves() {
    let script = "trap 'echo wrote a checkpoint; exit 130' TERM; echo pid $$; while :; do sleep 0.05; done";
    let mut launcher = Running::start(2, 3, script, "");
    launcher.wait_for("pid", 2);
    launcher.signal("-INT");
    let outcome = launcher.end();
    assert_eq!(outcome.status, Some(130), "{}", outcome.stderr);
    assert_eq!(outcome.stdout.matches("wrote a checkpoint").count(), 2, "{}", outcome.stdout);
    assert!(gone(&outcome.pids()));
}

#[test]
fn the_second_interrupt_stops_at_once() {
    let mut launcher = Running::start(2, 0, "trap 'echo heard' TERM; echo pid $$; while :; do sleep 0.05; done", "");
    launcher.wait_for("pid", 2);
    launcher.signal("-TERM");
    launcher.wait_for("heard", 2);
    // What comes at the same moment is the same request.
    launcher.signal("-HUP");
    std::thread::sleep(Duration::from_millis(700));
    assert!(launcher.child.try_wait().unwrap().is_none());
    launcher.signal("-TERM");
    let outcome = launcher.end();
    assert_eq!(outcome.status, Some(130), "{}", outcome.stderr);
    assert!(outcome.took < SOON && gone(&outcome.pids()));
}

#[test]
#[cfg(target_os = "linux")]
fn ranks_die_with_their_launcher() {
    let mut launcher = Running::start(2, 0, "trap '' TERM HUP INT; echo pid $$; while :; do sleep 0.05; done", "");
    launcher.wait_for("pid", 2);
    launcher.signal("-KILL");
    let since = Instant::now();
    let outcome = launcher.end();
    while !gone(&outcome.pids()) {
        assert!(since.elapsed() < SOON, "ranks outlive a killed launcher");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn restarts_are_counted_and_limited() {
    let script = "if [ $RANK = 1 ] && [ $DBLAUNCH_RESTART -lt 2 ]; then exit 1; fi; \
                  if [ $DBLAUNCH_RESTART -lt 2 ]; then sleep 300; fi; echo done in restart $DBLAUNCH_RESTART";
    let outcome = Running::start(2, 2, script, "").end();
    assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
    assert_eq!(outcome.stdout.matches("done in restart 2").count(), 2);
    assert!(outcome.last_line().contains("starting all ranks again (restart 2 of 2)"), "{}", outcome.stderr);
    assert_eq!(Running::start(2, 1, script, "").end().status, Some(1));
    let refused = Running::start(1, 5, "echo once; exit 2", "").end();
    assert_eq!((refused.status, refused.stdout.matches("once").count()), (Some(2), 1));
}

#[test]
fn processes_sum_over_the_inherited_window() {
    let outcome = launch_ranks(3, "sum");
    assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
    assert_eq!(outcome.stdout.matches("sum 6 of [0, 1, 2] with").count(), 3, "{}", outcome.stdout);
}

#[test]
fn processes_that_another_launcher_started_find_each_other() {
    let script = "unset DBLAUNCH_RANK DBLAUNCH_WINDOW_FD DBLAUNCH_EVENTS_FD DBLAUNCH_THREADS; \
                  exec \"$TEST_BINARY\" --exact ranks::a_rank --nocapture --test-threads=1";
    let outcome = Running::start(3, 0, script, "sum").end();
    assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
    assert_eq!(outcome.stdout.matches("sum 6 of [0, 1, 2] with").count(), 3, "{}", outcome.stdout);
}

#[test]
fn the_one_message_is_the_causes() {
    let outcome = launch_ranks(3, "one fails");
    assert_eq!(outcome.status, Some(1));
    let wanted = "dblaunch: rank 1 of 3 failed (ended with exit status 1): in segment mid_block: no memory";
    assert_eq!(outcome.last_line(), wanted);
    assert_eq!(outcome.stderr.matches("no memory").count(), 1, "{}", outcome.stderr);
    let outcome = launch_ranks(2, "one dies");
    assert!(outcome.last_line().starts_with("dblaunch: rank 1 of 2 was killed by SIGABRT"), "{}", outcome.stderr);
    let outcome = launch_ranks(2, "one panics");
    assert!(outcome.last_line().contains("rank 1 of 2 ended with exit status 101"), "{}", outcome.stderr);
    assert!(outcome.last_line().ends_with("this cannot be"), "{}", outcome.stderr);
}

#[test]
fn a_refusal_is_said_once() {
    let outcome = launch_ranks(3, "refused");
    assert_eq!(outcome.status, Some(2));
    let wanted = "dblaunch: data.instance_dir = \"nowhere\" does not exist";
    assert_eq!(outcome.stderr.lines().collect::<Vec<_>>(), [wanted]);
}

#[test]
fn ranks_decide_together_to_leave_after_an_interrupt() {
    let mut launcher = Running::start(2, 1, "", "interrupted");
    launcher.wait_for("ready", 2);
    launcher.signal("-TERM");
    let outcome = launcher.end();
    assert_eq!(outcome.status, Some(130), "{}", outcome.stderr);
    assert_eq!(outcome.stdout.matches("left together").count(), 2, "{}", outcome.stdout);
}

#[test]
fn progress_is_shown_in_plain_lines_where_there_is_no_terminal() {
    let outcome = launch_ranks(2, "steps");
    assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
    assert_eq!(outcome.stderr.matches("step 3/3").count(), 1, "{}", outcome.stderr);
    assert!(outcome.last_line().starts_with("step 3/3  loss 0.3333  lr 1.000e-5  4.00 images/s"), "{}", outcome.stderr);
}

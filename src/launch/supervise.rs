//! Watching over the ranks: when one fails the others are stopped at once, an interrupt is passed on, and nothing is
//! left running. What is then said, and about whom, is `report.rs`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGKILL, SIGTERM};
use signal_hook::iterator::Signals;

use super::group::{Ended, Group, Restart};
use super::progress::Display;
pub use super::progress::Output;
use super::report::Verdict;
use super::{signals, status};
use crate::Refusal;
use crate::comm::MAX_RANKS;

/// Between two looks at the ranks.
const LOOK: Duration = Duration::from_millis(10);
/// What a sound rank gets to end by itself after another one has failed.
const MERCY: Duration = Duration::from_secs(3);

/// What to start, and how.
pub struct LaunchRequest {
    /// Ranks, 1 to [`MAX_RANKS`].
    pub nproc: usize,
    /// What every rank runs; [`LaunchRequest::this_program`] says this very program.
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// How often all ranks are started again after one has died while running.
    pub max_restarts: usize,
    /// Compute threads of all ranks together; by default the cores this process may use.
    pub threads_total: Option<usize>,
    /// After an interrupt: what the ranks get to write a checkpoint and leave.
    pub grace: Duration,
    /// Set for the ranks besides what the launcher sets.
    pub environment: Vec<(OsString, OsString)>,
}

impl LaunchRequest {
    /// `nproc` ranks of this very program, called with `args`; no restarts, a quarter of an hour's grace: a step may take
    /// minutes, and so may its checkpoint, and who cannot wait interrupts again.
    pub fn this_program(nproc: usize, args: Vec<OsString>) -> Result<LaunchRequest> {
        Ok(LaunchRequest {
            nproc,
            program: std::env::current_exe().context("cannot find this program's own file")?,
            args,
            max_restarts: 0,
            threads_total: None,
            grace: Duration::from_secs(15 * 60),
            environment: Vec::new(),
        })
    }
}

/// Starts the ranks and stays with them to their end; the exit status to leave with (see [`status`]). To be called from
/// a thread that lives as long as the ranks shall, since they die with it. An error if they cannot be started.
pub fn run(request: &LaunchRequest, output: Output) -> Result<u8> {
    if !(1..=MAX_RANKS).contains(&request.nproc) {
        return Err(Refusal::error(format!("--nproc {}: one machine takes 1 to {MAX_RANKS} ranks", request.nproc)));
    }
    // From here on a signal is noted, not obeyed.
    let noted = signals::not_ignored(&[SIGINT, SIGTERM, SIGHUP]);
    let mut signals = Signals::new(noted).context("cannot listen for signals")?;
    let display = Display::start(output);
    let result = run_generations(request, &mut signals, &display);
    display.finish();
    result
}

fn run_generations(request: &LaunchRequest, signals: &mut Signals, display: &Display) -> Result<u8> {
    let mut goes_on = false;
    for count in 0.. {
        display.begin();
        let mut group = Group::spawn(request, Restart { count, goes_on }, &display.sender())?;
        let interrupted = Watch { request, signals, display, group: &mut group }.until_the_end();
        group.hear_out();
        let verdict = Verdict::of(&group);
        // What is left of a failure after an interrupt is what a rank itself has reported, such as a full disk.
        let Some(verdict) = verdict.filter(|verdict| verdict.reported || !interrupted) else {
            if interrupted {
                display.say("interrupted; all ranks have stopped");
            }
            return Ok(if interrupted { status::INTERRUPTED } else { status::DONE });
        };
        if interrupted || !verdict.can_restart() || count >= request.max_restarts {
            display.say(&verdict.message);
            return Ok(verdict.status);
        }
        goes_on |= group.has_begun();
        let (next, most) = (count + 1, request.max_restarts);
        display.say(&format!("{}; starting all ranks again (restart {next} of {most})", verdict.message));
    }
    Ok(status::FAILED)
}

/// One generation's watch.
struct Watch<'a> {
    request: &'a LaunchRequest,
    signals: &'a mut Signals,
    display: &'a Display,
    group: &'a mut Group,
}

impl Watch<'_> {
    /// Returns when no rank runs any more; whether that was because of an interrupt.
    fn until_the_end(self) -> bool {
        let mut interrupted = false;
        let mut first: Option<Instant> = None;
        let mut failing = false;
        let mut alone = false;
        let mut deadline: Option<Instant> = None;
        loop {
            self.group.reap();
            if self.group.all_ended() {
                return interrupted;
            }
            for _ in 0..self.signals.pending().count() {
                if first.get_or_insert_with(Instant::now).elapsed() >= signals::ONE_REQUEST {
                    self.group.signal(SIGKILL);
                } else if !interrupted {
                    self.display.say("interrupted; the ranks finish their step and leave (once more: stop at once)");
                    self.group.signal(SIGTERM);
                    deadline = Some(Instant::now() + self.request.grace);
                }
                interrupted = true;
            }
            if !failing && self.somebody_failed() {
                failing = true;
                // Who died at the same moment did so by itself, not because it was told to.
                self.group.reap();
                self.group.signal(SIGTERM);
                deadline = Some(Instant::now() + MERCY);
            } else if !interrupted && self.somebody_left() {
                // Somebody interrupted the rank itself; it has told the others.
                interrupted = true;
                deadline = Some(Instant::now() + self.request.grace);
            } else if !alone && self.somebody_was_too_young() {
                // The others would wait for it to join them. The second signal ends them at once.
                alone = true;
                self.group.signal(SIGTERM);
                deadline = Some(Instant::now() + MERCY);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                deadline = None;
                if !failing {
                    let grace = self.request.grace.as_secs_f64();
                    self.display.say(&format!("the ranks did not stop within {grace} s and were killed"));
                }
                self.group.signal(SIGKILL);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Whether a rank ended in another way than by completing its work or leaving after an interrupt.
    fn somebody_failed(&self) -> bool {
        self.group.members.iter().filter_map(|member| member.ended).any(|ended| match ended.status.code() {
            Some(code) => code != 0 && code != i32::from(status::INTERRUPTED),
            None => !ended.by_order(),
        })
    }

    /// Whether a rank ended by the signal itself: it came before the rank listened, so there was nothing to save yet.
    fn somebody_was_too_young(&self) -> bool {
        self.group.members.iter().filter_map(|member| member.ended).any(Ended::by_order)
    }

    fn somebody_left(&self) -> bool {
        let left = Some(i32::from(status::INTERRUPTED));
        self.group.members.iter().filter_map(|member| member.ended).any(|ended| ended.status.code() == left)
    }
}

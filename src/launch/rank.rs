//! Being a rank: everything a process needs to take part in a run, however it was started.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::event::{Event, EventSink, Failure};
use super::world::{Starter, World};
use super::{cores, signals, status, variable};
use crate::Refusal;
use crate::comm::{Communicator, CommunicatorExt, PeerFailure, Rendezvous, Shared, Solo, Window, process};
use crate::device::threads::set_threads;

/// One rank of a run.
pub struct Rank {
    pub world: World,
    pub communicator: Arc<dyn Communicator>,
    /// How the launcher learns of progress; does nothing where there is no launcher. Progress is the same for all ranks,
    /// so only rank 0's is heard, and nobody needs to ask for the rank before sending.
    pub events: EventSink,
    /// Compute threads, already set.
    pub threads: usize,
    /// Whether the ranks were started again after the run had begun: it then goes on from its newest checkpoint, if there
    /// is one.
    pub goes_on: bool,
    pub interrupt: Interrupt,
}

impl Rank {
    /// Takes this process's place: joins the others, sets the compute threads, and notes SIGINT and SIGTERM from now on.
    /// `timeout`: how long a collective waits for ranks that do not join. `threads_total`: compute threads of all ranks
    /// together, where the launcher is another program. Once per process, before any op runs.
    pub fn start(timeout: Duration, threads_total: Option<usize>) -> Result<Rank> {
        let interrupt = Interrupt::install()?;
        let world = World::from_environment()?.unwrap_or_else(World::solo);
        let communicator =
            communicator(&world, timeout, &interrupt).map_err(|error| match interrupt.interrupted() {
                true => error.context(Interrupted),
                false => error.context("cannot join the other ranks"),
            })?;
        *running() = Some(Arc::downgrade(&communicator));
        let threads = threads(&world, &*communicator, threads_total)?;
        set_threads(threads);
        let goes_on = number(variable::GOES_ON).unwrap_or(0) > 0;
        let events = if world.rank == 0 { launcher() } else { EventSink::none() };
        Ok(Rank { world, communicator, events, threads, goes_on, interrupt })
    }

    /// Tells the user something, once for all ranks: through the launcher, or on standard error where there is none.
    pub fn say(&self, what: &str) {
        if self.events.is_heard() {
            self.events.send(&Event::Message(what.to_string()));
        } else if self.world.rank == 0 {
            signals::tell(&format_args!("dblaunch: {what}"));
        }
    }
}

/// Whether the user, or the system, has asked this rank to stop. Cheap to clone and to ask.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    raised: Arc<AtomicBool>,
}

impl Interrupt {
    /// Notes SIGINT and SIGTERM instead of ending by them; a second one, some time later, ends the process at once. A rank
    /// does this before anything else: one that ended by the first signal would leave the others waiting.
    pub fn install() -> Result<Interrupt> {
        static INSTALLED: OnceLock<Interrupt> = OnceLock::new();
        if let Some(installed) = INSTALLED.get() {
            return Ok(installed.clone());
        }
        let raised = Arc::new(AtomicBool::new(false));
        // By the latter launchers tell their ranks, whatever these inherited.
        let signals = [signals::not_ignored(&[SIGINT]), vec![SIGTERM]].concat();
        signals::stop_at(&signals, &raised, status::INTERRUPTED)?;
        Ok(INSTALLED.get_or_init(|| Interrupt { raised }).clone())
    }

    /// On this rank; whether all stop is for the ranks to decide together.
    pub fn interrupted(&self) -> bool {
        self.raised.load(Ordering::Relaxed)
    }

    /// The flag itself, for those who know nothing of launchers.
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.raised.clone()
    }
}

/// Asked to stop before there was anything to save.
#[derive(Debug)]
struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted while it waited for the other ranks")
    }
}

impl std::error::Error for Interrupted {}

/// The exit status that an error means: 2 for a wrong request, 130 for an interrupt, else 1.
pub fn exit_status(error: &anyhow::Error) -> u8 {
    match () {
        () if error.chain().any(|cause| cause.is::<Refusal>()) => status::REFUSED,
        () if error.is::<Interrupted>() => status::INTERRUPTED,
        () => status::FAILED,
    }
}

/// Tells whoever must know that this process fails: the launcher if there is one, which then writes the one message for
/// all ranks, else standard error; and the other ranks, so that they do not wait. Returns the exit status to leave with.
/// Only the first call tells; what follows is a consequence.
pub fn report_failure(error: &anyhow::Error) -> u8 {
    static TOLD: AtomicBool = AtomicBool::new(false);
    if TOLD.swap(true, Ordering::Relaxed) {
        return exit_status(error);
    }
    let status = exit_status(error);
    let message = format!("{error:#}");
    let because_of = peer_behind(error, &message).map(|failure| failure.rank);
    let failure = Failure { message, refused: status == status::REFUSED, because_of };
    let launcher = launcher();
    if launcher.is_heard() {
        launcher.send(&Event::Failed(failure.clone()));
    } else {
        let world = World::from_environment().ok().flatten().filter(|world| world.world_size > 1);
        let who = world.map_or(String::new(), |world| format!("rank {}: ", world.rank));
        failure.message.lines().for_each(|line| signals::tell(&format_args!("dblaunch: {who}{line}")));
    }
    // Only now, so that the launcher hears of the cause before it hears of consequences.
    if let Some(communicator) = running().as_ref().and_then(Weak::upgrade).filter(|_| because_of.is_none()) {
        communicator.abort(&failure.message);
    }
    status
}

/// The other rank whose failure this error is a consequence of. candle's errors carry causes as text alone, so what is known
/// of other ranks is looked for there, too.
fn peer_behind(error: &anyhow::Error, message: &str) -> Option<PeerFailure> {
    let typed = error.chain().find_map(|cause| cause.downcast_ref::<PeerFailure>()).cloned();
    let communicator = running().as_ref().and_then(Weak::upgrade);
    typed.or_else(|| communicator?.failed_peer().filter(|peer| message.contains(&peer.to_string())))
}

/// The communicator of this process, for [`report_failure`].
fn running() -> std::sync::MutexGuard<'static, Option<Weak<dyn Communicator>>> {
    static RUNNING: Mutex<Option<Weak<dyn Communicator>>> = Mutex::new(None);
    RUNNING.lock().unwrap_or_else(|e| e.into_inner())
}

/// The way to the launcher that started this process, if one did.
fn launcher() -> EventSink {
    static LAUNCHER: OnceLock<EventSink> = OnceLock::new();
    let open = || {
        let descriptor = number(variable::EVENTS)?;
        Some(EventSink::new(process::inherited(descriptor).ok()?))
    };
    LAUNCHER.get_or_init(|| open().unwrap_or_default()).clone()
}

fn communicator(world: &World, timeout: Duration, interrupt: &Interrupt) -> Result<Arc<dyn Communicator>> {
    if world.world_size == 1 {
        return Ok(Arc::new(Solo));
    }
    let window = if world.starter == Starter::Dblaunch { number(variable::WINDOW) } else { None };
    Ok(match window {
        Some(descriptor) => {
            let window = Window::open(process::inherited(descriptor).context("the launcher's shared memory")?)?;
            Arc::new(Shared::join(Arc::new(window), world.rank, timeout)?)
        }
        None => Arc::new(
            Rendezvous::new(&world.job).join(world.rank, world.world_size, timeout, &|| interrupt.interrupted())?,
        ),
    })
}

/// Whether the user wants several ranks on one GPU.
pub fn shares_gpu() -> bool {
    std::env::var_os(variable::SHARE_GPU).is_some_and(|value| !value.is_empty() && value != "0")
}

/// The launcher's word; else this rank's share of `total`, or of the cores that it and the others may run on.
fn threads(world: &World, communicator: &dyn Communicator, total: Option<usize>) -> Result<usize> {
    let given = if world.starter == Starter::Dblaunch { number(variable::THREADS) } else { None };
    let share = total.map(|total| cores::part(total, world.local_world_size, world.local_rank).max(1));
    if let Some(threads) = given.or(share) {
        return Ok(threads);
    }
    let mine: Vec<u8> = process::allowed_cores().into_iter().flat_map(|core| (core as u32).to_le_bytes()).collect();
    let everyone = communicator.gather_bytes(&mine)?;
    let everyone: Vec<Vec<usize>> = everyone
        .iter()
        .map(|bytes| bytes.as_chunks::<4>().0.iter().map(|core| u32::from_le_bytes(*core) as usize).collect())
        .collect();
    Ok(cores::own_share(&everyone, world.rank))
}

/// One of the launcher's own variables.
fn number<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_from_a_failure_however_deep() {
        let refusal = Refusal::error("no such folder").context("while reading train.toml");
        assert_eq!(exit_status(&refusal), status::REFUSED);
        assert_eq!(exit_status(&anyhow::anyhow!("disk full")), status::FAILED);
    }
}

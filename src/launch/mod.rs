//! Starting ranks and being one. The launcher starts N copies of a command, gives each its place in the world, its
//! share of the cores and a window of shared memory, shows what they print and how far they are, and stops all when one
//! fails ([`run`]). A rank finds all of that again in [`Rank::start`], whoever started it. Knows nothing of training.

mod cores;
mod event;
mod group;
mod progress;
mod rank;
mod report;
mod signals;
mod supervise;
mod world;

pub use event::{Event, EventSink, Failure};
pub use rank::{Interrupt, Rank, exit_status, report_failure, shares_gpu};
pub use signals::{prepare, tell};
pub use supervise::{LaunchRequest, Output, run};
pub use world::{Starter, World};

/// Exit statuses that ranks and the launcher share.
pub mod status {
    /// All is done.
    pub const DONE: u8 = 0;
    /// It failed while running.
    pub const FAILED: u8 = 1;
    /// The request is wrong; nothing was started or written.
    pub const REFUSED: u8 = 2;
    /// The user, or the system, asked it to stop.
    pub const INTERRUPTED: u8 = 130;
}

/// The launcher's own variables, besides those that torchrun has as well.
mod variable {
    /// Marks a process that `run` started; its value is the rank.
    pub const RANK: &str = "DBLAUNCH_RANK";
    /// The inherited descriptor of the shared memory.
    pub const WINDOW: &str = "DBLAUNCH_WINDOW_FD";
    /// The inherited descriptor that events are written to.
    pub const EVENTS: &str = "DBLAUNCH_EVENTS_FD";
    /// The rank's number of compute threads.
    pub const THREADS: &str = "DBLAUNCH_THREADS";
    /// How often the ranks were started again.
    pub const RESTART: &str = "DBLAUNCH_RESTART";
    /// 1 if the run had come as far as its first step before they were started again.
    pub const GOES_ON: &str = "DBLAUNCH_GOES_ON";
    /// Set by whoever wants several ranks on one GPU, as tests do; by mistake it is refused.
    pub const SHARE_GPU: &str = "DBLAUNCH_SHARE_GPU";
}

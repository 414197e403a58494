//! How ranks over shared memory wait for each other, and what they find out when somebody does not come.
//!
//! Note: meetings. A collective is a row of meetings, counted over the life of the communicator. A rank prepares a
//! staging buffer, names its call beside it, publishes the meeting's number in `arrived`, and waits until everyone has
//! published it. Then all read each other's buffers, and prepare the *other* buffer for the next meeting: who comes to
//! meeting k + 1 has read everything of meeting k, so two buffers and one wait a chunk are enough. Mismatched calls
//! show at the first meeting, before anybody reads, and to every rank alike.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Error, Result, anyhow};

use super::PeerFailure;
use super::call::Call;
use super::process::{self, Process};
use super::window::Window;

/// Looks before the core is offered to others, where every rank can have one.
const SPINS: u32 = 1000;
/// Offers of the core before sleeping.
const YIELDS: u32 = 30;
/// The longest sleep between two looks at the abort flag and the clock.
const NAP: Duration = Duration::from_millis(50);
/// How often a waiting rank looks whether the missing ranks' processes live.
const PULSE: Duration = Duration::from_millis(100);

/// One rank's way through one collective.
pub(super) struct Meeting<'a> {
    pub window: &'a Window,
    pub rank: usize,
    pub timeout: Duration,
    /// The last meeting everyone came to, or the one under way.
    pub turn: u32,
    pub sequence: u64,
    pub call: Call,
}

impl Meeting<'_> {
    /// Where this rank prepares what it brings to the next meeting.
    pub fn own(&mut self) -> &mut [u8] {
        // SAFETY: between meetings this rank alone uses this buffer (Note: meetings); `&mut self` keeps it the only
        // reference. After a failed meeting the communicator never makes another `Meeting`.
        unsafe { self.window.own(self.rank, self.turn.wrapping_add(1)) }
    }

    /// What `rank` brought to the last meeting.
    pub fn staged(&self, rank: usize) -> &[u8] {
        // SAFETY: everyone came to `turn`, and nobody writes this buffer before this rank comes to the next one.
        unsafe { self.window.staged(rank, self.turn) }
    }

    /// What every rank brought to the last meeting, and where to prepare for the next: the two different buffers.
    pub fn buffers(&mut self) -> (Vec<&[u8]>, &mut [u8]) {
        let next = self.turn.wrapping_add(1);
        let window = self.window;
        // SAFETY: as for `staged` and `own`.
        unsafe {
            ((0..window.world_size()).map(|r| window.staged(r, self.turn)).collect(), window.own(self.rank, next))
        }
    }

    /// Comes to the next meeting and waits for everyone; an error if somebody does not come, or came for another call.
    pub fn meet(&mut self) -> Result<()> {
        self.turn = self.turn.wrapping_add(1);
        let mine = self.window.control(self.rank);
        mine.announce(self.turn, self.sequence, &self.call);
        mine.arrived.store(self.turn, Ordering::SeqCst);
        if mine.sleepers.load(Ordering::SeqCst) > 0 {
            process::wake(&mine.arrived);
        }
        let mut wait = Wait { since: Instant::now(), next_pulse: PULSE };
        for rank in self.others() {
            self.wait_for(rank, &mut wait)?;
        }
        if self.others().any(|rank| self.window.control(rank).announced(self.turn) != (self.sequence, self.call)) {
            return Err(self.mismatch());
        }
        Ok(())
    }

    /// All ranks but this one, the next one first, so that not all look at rank 0.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, world_size) = (self.rank, self.window.world_size());
        (1..world_size).map(move |i| (rank + i) % world_size)
    }

    fn has_come(&self, rank: usize) -> bool {
        let arrived = self.window.control(rank).arrived.load(Ordering::SeqCst);
        arrived.wrapping_sub(self.turn) as i32 >= 0
    }

    fn wait_for(&self, rank: usize, wait: &mut Wait) -> Result<()> {
        let spins = if self.window.world_size() <= cores() { SPINS } else { 0 };
        for look in 0..spins + YIELDS {
            if self.has_come(rank) {
                return Ok(());
            }
            if look < spins { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let control = self.window.control(rank);
        loop {
            if let Some(error) = self.trouble(wait) {
                // It may have come, and even left again, while we looked.
                return if self.has_come(rank) { Ok(()) } else { Err(error) };
            }
            // Either this rank sees the arrival here, or the arriving rank sees the sleeper and wakes it.
            control.sleepers.fetch_add(1, Ordering::SeqCst);
            let seen = control.arrived.load(Ordering::SeqCst);
            if !self.has_come(rank) {
                process::sleep_on(&control.arrived, seen, NAP.min(self.timeout));
            }
            control.sleepers.fetch_sub(1, Ordering::SeqCst);
            if self.has_come(rank) {
                return Ok(());
            }
        }
    }

    /// Why waiting on is of no use, if so.
    fn trouble(&self, wait: &mut Wait) -> Option<Error> {
        if let Some((rank, message)) = self.window.aborted() {
            return Some(PeerFailure { rank, message }.into());
        }
        let waited = wait.since.elapsed();
        let gone = |rank: usize| self.window.control(rank).left.load(Ordering::Acquire) == 1;
        if let Some(rank) = self.others().find(|&rank| gone(rank) && !self.has_come(rank)) {
            return Some(self.lost(rank, format!("it ended before {}", self.here())));
        }
        if waited >= wait.next_pulse {
            wait.next_pulse = waited + PULSE;
            if let Some((rank, process)) = self.others().find_map(|rank| self.dead(rank)) {
                return Some(self.lost(rank, format!("its process ({}) died before {}", process.pid, self.here())));
            }
        }
        (waited >= self.timeout).then(|| self.timed_out())
    }

    fn dead(&self, rank: usize) -> Option<(usize, Process)> {
        let process = self.window.control(rank).process()?;
        let foreign = process.pid != std::process::id();
        (foreign && !self.has_come(rank) && !process.lives() && !self.has_come(rank)).then_some((rank, process))
    }

    /// The same error on every rank: it is the missing one's failure.
    fn lost(&self, rank: usize, what: String) -> Error {
        let message = format!("{what}; {}", self.whereabouts(rank));
        self.window.abort(rank, &message);
        let (rank, message) = self.window.aborted().unwrap_or((rank, message));
        PeerFailure { rank, message }.into()
    }

    fn timed_out(&self) -> Error {
        let (missing, present): (Vec<_>, Vec<_>) =
            (0..self.window.world_size()).partition(|&rank| rank != self.rank && !self.has_come(rank));
        let (here, elsewhere): (Vec<_>, Vec<_>) = present
            .into_iter()
            .partition(|&rank| self.window.control(rank).announced(self.turn) == (self.sequence, self.call));
        let has = if missing.len() == 1 { "has" } else { "have" };
        let wait = if here.len() == 1 { "waits" } else { "wait" };
        let mut message = format!(
            "{} {has} not joined {} within {} s ({} {wait} in it",
            ranks(&missing),
            self.here(),
            self.timeout.as_secs_f64(),
            ranks(&here)
        );
        for rank in elsewhere {
            message += &format!(", {}", self.whereabouts(rank));
        }
        let seen: Vec<_> = missing.iter().map(|&rank| self.whereabouts(rank)).collect();
        message += &format!("); {}", seen.join("; "));
        self.window.abort(self.rank, &message);
        anyhow!(message)
    }

    fn mismatch(&self) -> Error {
        let mut groups: Vec<(String, Vec<usize>)> = Vec::new();
        for rank in 0..self.window.world_size() {
            let (sequence, call) = self.window.control(rank).announced(self.turn);
            let what = call.describe(sequence);
            match groups.iter_mut().find(|group| group.0 == what) {
                Some(group) => group.1.push(rank),
                None => groups.push((what, vec![rank])),
            }
        }
        let called: Vec<_> = groups.iter().map(|(what, who)| format!("{} called {what}", ranks(who))).collect();
        anyhow!("the ranks called different collectives: {}", called.join(", "))
    }

    fn here(&self) -> String {
        self.call.describe(self.sequence)
    }

    /// What is known of a rank, for messages.
    fn whereabouts(&self, rank: usize) -> String {
        let control = self.window.control(rank);
        let arrived = control.arrived.load(Ordering::SeqCst);
        let ago = process::milliseconds().saturating_sub(control.seen.load(Ordering::Relaxed)) as f64 / 1000.0;
        if control.process().is_none() {
            return format!("rank {rank} has never started");
        }
        if arrived == 0 {
            return format!("rank {rank} started {ago:.1} s ago and has not called any collective");
        }
        let (sequence, call) = control.announced(arrived);
        let call = call.describe(sequence);
        if control.inside.load(Ordering::Relaxed) == 1 && self.has_come(rank) {
            format!("rank {rank} waits in {call}")
        } else {
            format!("rank {rank} was last seen in {call}, {ago:.1} s ago")
        }
    }
}

struct Wait {
    since: Instant,
    next_pulse: Duration,
}

/// `rank 2`, `ranks 0, 1`.
fn ranks(list: &[usize]) -> String {
    let names: Vec<_> = list.iter().map(usize::to_string).collect();
    format!("{} {}", if list.len() == 1 { "rank" } else { "ranks" }, names.join(", "))
}

fn cores() -> usize {
    static CORES: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    // The machine's, not this rank's share of them: a rank pinned to one core still has another's to wait for.
    *CORES.get_or_init(process::online_cores)
}

//! Watching collectives that a device does by itself: whether they end, and whether they still can. Decisions only, over
//! anything that has points to be reached; `nccl.rs` asks them and acts.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Error, Result, anyhow};

use super::PeerFailure;

/// A point in a device's work.
pub trait Point {
    /// Errors are those of the work before it.
    fn is_reached(&self) -> Result<bool>;
}

/// Collectives under way, in the order in which the device does them.
pub struct Watch<P> {
    /// How long one may take from the moment at which everything before it was done.
    timeout: Duration,
    flights: VecDeque<Flight<P>>,
}

/// One collective (or several in a group) under way.
pub struct Flight<P> {
    /// The call and what it is for: `all_gather #17 (f32, 1024 elements) of down.0`.
    pub what: String,
    /// Everything before it on its stream is done.
    pub begun: P,
    pub done: P,
    /// When it was first seen to have begun.
    since: Option<Instant>,
}

impl<P> Flight<P> {
    pub fn new(what: String, begun: P, done: P) -> Self {
        Flight { what, begun, done, since: None }
    }
}

/// Why waiting on is of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Another rank failed.
    Peer {
        what: String,
        failure: PeerFailure,
    },
    /// The library, or the device, reports an error.
    Failed {
        what: String,
        why: String,
    },
    TimedOut {
        what: String,
        after: Duration,
    },
}

impl Trouble {
    /// The error of the rank that sees it. Whoever reports an error says which rank that is.
    pub fn error(&self) -> Error {
        match self {
            Trouble::Peer { what, failure } => Error::new(failure.clone()).context(format!("in {what}")),
            Trouble::Failed { what, why } => anyhow!("{what} failed: {why}"),
            Trouble::TimedOut { what, after } => anyhow!(
                "{what} has not ended within {} s: another rank has not joined it, or the connection between \
                 the GPUs is broken",
                after.as_secs_f64()
            ),
        }
    }
}

impl<P: Point> Watch<P> {
    pub fn new(timeout: Duration) -> Self {
        Watch { timeout, flights: VecDeque::new() }
    }

    pub fn add(&mut self, flight: Flight<P>) {
        self.flights.push_back(flight);
    }

    pub fn is_idle(&self) -> bool {
        self.flights.is_empty()
    }

    /// One look at time `now`: forgets what is done, and says whether what is left can still end. `peer`: a rank that is
    /// known to have failed; `library`: what the library reports.
    pub fn look(&mut self, now: Instant, peer: Option<PeerFailure>, library: Result<(), String>) -> Option<Trouble> {
        while let Some(first) = self.flights.front() {
            match first.done.is_reached() {
                Ok(true) => drop(self.flights.pop_front()),
                Ok(false) => break,
                Err(error) => return Some(Trouble::Failed { what: first.what.clone(), why: format!("{error:#}") }),
            }
        }
        // With nothing under way nobody hangs: a rank that has ended may simply have been the first to finish.
        let first = self.flights.front_mut()?;
        let what = first.what.clone();
        // Before the library's word: what it reports is then a consequence.
        if let Some(failure) = peer {
            return Some(Trouble::Peer { what, failure });
        }
        if let Err(why) = library {
            return Some(Trouble::Failed { what, why });
        }
        if first.since.is_none() {
            match first.begun.is_reached() {
                Ok(true) => first.since = Some(now),
                Ok(false) => {}
                Err(error) => return Some(Trouble::Failed { what, why: format!("{error:#}") }),
            }
        }
        let waited = first.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        (waited >= self.timeout).then_some(Trouble::TimedOut { what, after: self.timeout })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    /// Reached, not reached, or gone wrong; changed from outside.
    #[derive(Clone, Default)]
    struct Scripted(Rc<Cell<u8>>);

    impl Point for Scripted {
        fn is_reached(&self) -> Result<bool> {
            match self.0.get() {
                0 => Ok(false),
                1 => Ok(true),
                _ => Err(anyhow!("illegal address")),
            }
        }
    }

    fn watch(count: usize) -> (Watch<Scripted>, Vec<(Scripted, Scripted)>) {
        let mut watch = Watch::new(Duration::from_secs(10));
        let points: Vec<(Scripted, Scripted)> = (0..count).map(|_| Default::default()).collect();
        for (i, (begun, done)) in points.iter().enumerate() {
            watch.add(Flight::new(format!("all_gather #{i} of down.{i}"), begun.clone(), done.clone()));
        }
        (watch, points)
    }

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn the_clock_of_a_collective_starts_when_what_is_before_it_is_done() {
        let (mut watch, points) = watch(2);
        let start = Instant::now();
        // A long computation before it is no hang.
        assert_eq!(watch.look(at(start, 1000), None, Ok(())), None);
        points[0].0.0.set(1);
        assert_eq!(watch.look(at(start, 1001), None, Ok(())), None);
        assert_eq!(watch.look(at(start, 1010), None, Ok(())), None);
        let trouble = watch.look(at(start, 1011), None, Ok(())).unwrap();
        let message = trouble.error().to_string();
        assert!(message.starts_with("all_gather #0 of down.0 has not ended within 10 s"), "{message}");
    }

    #[test]
    fn what_is_done_is_forgotten_and_the_next_gets_its_own_time() {
        let (mut watch, points) = watch(2);
        let start = Instant::now();
        points[0].0.0.set(1);
        assert_eq!(watch.look(start, None, Ok(())), None);
        points[0].1.0.set(1);
        points[1].0.0.set(1);
        assert_eq!(watch.look(at(start, 9), None, Ok(())), None);
        assert_eq!(watch.look(at(start, 18), None, Ok(())), None);
        points[1].1.0.set(1);
        assert_eq!(watch.look(at(start, 100), None, Ok(())), None);
        assert!(watch.is_idle());
    }

    #[test]
    fn a_failed_peer_counts_only_while_something_is_under_way_and_before_the_librarys_word() {
        let (mut watch, points) = watch(1);
        let peer = PeerFailure { rank: 1, message: "disk full".into() };
        let trouble = watch.look(Instant::now(), Some(peer.clone()), Err("remote error".into())).unwrap();
        assert_eq!(trouble.error().downcast_ref::<PeerFailure>(), Some(&peer));
        let trouble = watch.look(Instant::now(), None, Err("remote error".into())).unwrap();
        assert_eq!(trouble.error().to_string(), "all_gather #0 of down.0 failed: remote error");
        points[0].1.0.set(1);
        assert_eq!(watch.look(Instant::now(), Some(peer), Ok(())), None);
    }

    #[test]
    fn an_error_of_the_device_names_the_collective() {
        let (mut watch, points) = watch(1);
        points[0].1.0.set(2);
        let trouble = watch.look(Instant::now(), None, Ok(())).unwrap();
        assert_eq!(trouble.error().to_string(), "all_gather #0 of down.0 failed: illegal address");
    }
}

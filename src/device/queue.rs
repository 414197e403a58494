//! Work that goes on beside the computation: copies, collectives, disk requests, the optimizer. A queue does one thing
//! after another, in the order in which they were asked for, as a stream of a GPU does. A wait is a value.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::threads::same_threads;
use super::trace::{self, SpanName};

/// The result of something that was begun. Dropping it does not stop the work.
#[must_use = "what was begun must be waited for"]
pub struct Pending<T>(Kind<T>);

enum Kind<T> {
    Ready(Result<T>),
    Coming(Receiver<Result<T>>),
    After(Box<dyn FnOnce() -> Result<T> + Send>),
}

/// The other end: whoever does the work keeps it.
pub struct Promise<T>(Sender<Result<T>>);

/// A result that is to come, and the way to deliver it.
pub fn promise<T>() -> (Promise<T>, Pending<T>) {
    let (sender, receiver) = channel();
    (Promise(sender), Pending(Kind::Coming(receiver)))
}

impl<T> Promise<T> {
    pub fn keep(self, result: Result<T>) {
        // Nobody waits any more: then nobody misses it.
        let _ = self.0.send(result);
    }
}

impl<T> Pending<T> {
    pub fn ready(value: T) -> Self {
        Pending(Kind::Ready(Ok(value)))
    }

    /// What is done already, well or not.
    pub fn done(result: Result<T>) -> Self {
        Pending(Kind::Ready(result))
    }

    /// What `wait` gives, which waits for work that something else does: a device.
    pub fn after(wait: impl FnOnce() -> Result<T> + Send + 'static) -> Self {
        Pending(Kind::After(Box::new(wait)))
    }

    /// Waits until it is done.
    pub fn wait(self) -> Result<T> {
        self.wait_for("wait")
    }

    /// The same; `what` names the wait in a recording of where the time goes.
    pub fn wait_for(self, what: impl SpanName) -> Result<T> {
        match self.0 {
            Kind::Ready(result) => result,
            Kind::After(wait) => {
                let _span = trace::span(trace::Row::Wait, what);
                wait()
            }
            Kind::Coming(receiver) => {
                let come = receiver.try_recv().or_else(|_| {
                    let _span = trace::span(trace::Row::Wait, what);
                    receiver.recv()
                });
                come.map_err(|_| anyhow!("what was begun was given up before it was done"))?
            }
        }
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// A thread that does what it is given, in order.
pub struct Queue {
    work: Option<Sender<Work>>,
    thread: Option<JoinHandle<()>>,
    delays: Option<Arc<Delays>>,
}

impl Queue {
    pub fn new(name: &str) -> Result<Self> {
        Self::late(name, None)
    }

    /// A queue that is late now and then, for tests.
    pub fn late(name: &str, delays: Option<Arc<Delays>>) -> Result<Self> {
        let (work, todo) = channel::<Work>();
        let thread = Builder::new()
            .name(name.to_string())
            .spawn(same_threads(move || todo.into_iter().for_each(|work| work())))
            .with_context(|| format!("starting the thread {name}"))?;
        Ok(Queue { work: Some(work), thread: Some(thread), delays })
    }

    /// Does `work` after everything that was submitted before.
    pub fn submit<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Pending<T> {
        let (promise, pending) = promise();
        let delays = self.delays.clone();
        let work: Work = Box::new(move || {
            if let Some(delays) = delays {
                delays.dawdle();
            }
            promise.keep(work());
        });
        if let Some(queue) = &self.work {
            // A thread that has ended by a panic drops the promise, which the wait reports.
            let _ = queue.send(work);
        }
        pending
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        drop(self.work.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the work was told to whoever waited for it.
            let _ = thread.join();
        }
    }
}

/// Sleeps before every second piece of work or so, so that a missing wait shows; which, and how long, follows from the
/// seed and the running number.
#[derive(Debug)]
pub struct Delays {
    seed: u64,
    longest: Duration,
    sequence: Mutex<u64>,
}

impl Delays {
    pub fn new(seed: u64, longest: Duration) -> Arc<Self> {
        Arc::new(Delays { seed, longest, sequence: Mutex::new(0) })
    }

    pub fn dawdle(&self) {
        let sequence = {
            let mut sequence = self.sequence.lock().unwrap_or_else(|e| e.into_inner());
            *sequence += 1;
            *sequence
        };
        let draw = twox_hash::XxHash3_64::oneshot([self.seed, sequence].map(u64::to_le_bytes).as_flattened());
        if draw & 1 == 1 {
            std::thread::sleep(self.longest.mul_f64((draw >> 11) as f64 / (1u64 << 53) as f64));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_keeps_the_order_and_hands_results_back() {
        let queue = Queue::late("test", Some(Delays::new(1, Duration::from_millis(2)))).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let pending: Vec<_> = (0..20)
            .map(|i| {
                let seen = seen.clone();
                queue.submit(move || {
                    seen.lock().unwrap().push(i);
                    if i == 7 { Err(anyhow!("seven")) } else { Ok(i * i) }
                })
            })
            .collect();
        let results: Vec<_> = pending.into_iter().map(Pending::wait).collect();
        assert_eq!(*seen.lock().unwrap(), (0..20).collect::<Vec<_>>());
        assert_eq!(results[19].as_ref().unwrap(), &361);
        assert_eq!(results[7].as_ref().unwrap_err().to_string(), "seven");
    }

    #[test]
    fn a_wait_for_something_else_runs_when_it_is_waited_for() {
        let pending = Pending::after(|| Ok(3));
        assert_eq!(pending.wait().unwrap(), 3);
        assert!(Pending::<()>::after(|| Err(anyhow!("lost"))).wait().is_err());
    }

    #[test]
    fn work_that_panics_is_an_error_for_who_waits() {
        let queue = Queue::new("test").unwrap();
        let pending = queue.submit::<()>(|| panic!("on purpose"));
        assert!(pending.wait().unwrap_err().to_string().contains("given up"));
    }
}

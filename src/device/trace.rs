//! Where the time goes: named spans of every thread of this process, recorded between [`begin`] and [`take`]. Off, a
//! span costs one relaxed load. What becomes of the recording is for `track::profile` to say. What an accelerator does beside
//! the host is recorded with its own clock ([`watch`]).

mod beside;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use beside::{ACCELERATOR, on_accelerator, watch};
use beside::{Beside, OpenThere};

/// What kind of work a span is; with its thread, the row of the picture that it is drawn on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Row {
    /// A whole optimizer step.
    Step,
    /// Networks and what surrounds them. The name's first word says which part: "forward ...", "recompute ...",
    /// "backward ...".
    Compute,
    Optimizer,
    Collective,
    /// Between tiers.
    Copy,
    Disk,
    /// For the result of something that goes on elsewhere.
    Wait,
}

impl Row {
    /// All, in the order in which they are shown.
    pub const ALL: [Row; 7] =
        [Row::Step, Row::Compute, Row::Optimizer, Row::Collective, Row::Copy, Row::Disk, Row::Wait];

    /// In words, for rows of a picture and of a table.
    pub fn label(self) -> &'static str {
        match self {
            Row::Step => "steps",
            Row::Compute => "compute",
            Row::Optimizer => "optimizer",
            Row::Collective => "collectives",
            Row::Copy => "copies",
            Row::Disk => "disk",
            Row::Wait => "waiting",
        }
    }
}

/// One finished span.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub row: Row,
    pub name: String,
    /// Index into [`Trace::threads`].
    pub thread: usize,
    /// Nanoseconds since [`begin`].
    pub start: u64,
    /// Nanoseconds.
    pub duration: u64,
    /// What was moved, where that was said.
    pub bytes: Option<u64>,
    /// The most of an accelerator's memory that was in use meanwhile, by whoever; where it computes and says.
    #[serde(default)]
    pub peak: Option<u64>,
}

impl Event {
    /// Nanoseconds since [`begin`].
    pub fn end(&self) -> u64 {
        self.start + self.duration
    }
}

/// What one rank recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    pub rank: usize,
    /// Names of the threads that had spans, and of what is no thread of ours ([`happened`]); the first is the one that
    /// called [`begin`].
    pub threads: Vec<String>,
    /// In the order in which they ended.
    pub events: Vec<Event>,
}

/// A span's name: a text, or a closure that makes one and is called only while a recording runs.
pub trait SpanName {
    fn text(self) -> String;
}

impl SpanName for &str {
    fn text(self) -> String {
        self.to_string()
    }
}

impl<F: FnOnce() -> String> SpanName for F {
    fn text(self) -> String {
        self()
    }
}

static ON: AtomicBool = AtomicBool::new(false);
static RECORDING: Mutex<Option<Recording>> = Mutex::new(None);

struct Recording {
    trace: Trace,
    /// The thread of each entry of `trace.threads`, by [`thread_number`]; None for what is no thread.
    numbers: Vec<Option<usize>>,
    began: Instant,
    beside: Option<Beside>,
}

/// Starts a recording; one that runs is thrown away. Ranks that call this right after a barrier have the same zero.
pub fn begin(rank: usize) {
    let mut trace = Trace { rank, threads: Vec::new(), events: Vec::new() };
    trace.threads.push(thread_name());
    let began = Instant::now();
    let beside = Beside::begin(began);
    *recording() = Some(Recording { trace, numbers: vec![Some(thread_number())], began, beside });
    ON.store(true, Ordering::Relaxed);
}

/// Ends the recording and hands it over; None where none runs. Spans that are still open are not in it.
pub fn take() -> Option<Trace> {
    ON.store(false, Ordering::Relaxed);
    let mut recorded = recording().take()?;
    if let Some(beside) = recorded.beside.take() {
        beside.end(&mut recorded);
    }
    Some(recorded.trace)
}

/// Whether a recording runs.
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// A span from now until the result is dropped, on the calling thread.
#[inline]
#[must_use = "a span lasts until it is dropped"]
pub fn span(row: Row, name: impl SpanName) -> Span {
    match ON.load(Ordering::Relaxed) {
        false => Span(None),
        true => {
            let far = beside::open(row);
            Span(Some(Open { row, name: name.text(), bytes: None, start: Instant::now(), far }))
        }
    }
}

/// Notes something that began at `start` and has ended now, without a thread of ours that did it: a drive's request, of
/// which many are under way at a time. `who` names the row.
pub fn happened(row: Row, who: &'static str, name: impl SpanName, start: Instant, bytes: usize) {
    if is_on() {
        note(row, name.text(), start, Some(bytes as u64), Some(who));
    }
}

fn note(row: Row, name: String, start: Instant, bytes: Option<u64>, who: Option<&'static str>) {
    let duration = nanoseconds(start.elapsed());
    let mut recording = recording();
    let Some(recording) = &mut *recording else { return };
    // What is older than the recording belongs to the one before.
    let Some(since) = start.checked_duration_since(recording.began) else { return };
    let thread = recording.thread(who);
    recording.trace.events.push(Event { row, name, thread, start: nanoseconds(since), duration, bytes, peak: None });
}

/// An open span; see [`span`].
pub struct Span(Option<Open>);

struct Open {
    row: Row,
    name: String,
    bytes: Option<u64>,
    start: Instant,
    /// The same on the accelerator.
    far: Option<OpenThere>,
}

impl Span {
    /// Says how much is moved.
    pub fn bytes(mut self, bytes: usize) -> Self {
        if let Some(open) = &mut self.0 {
            open.bytes = Some(bytes as u64);
        }
        self
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some(Open { row, name, bytes, start, far }) = self.0.take() else { return };
        if let Some(far) = far {
            beside::close(far, row, &name);
        }
        note(row, name, start, bytes, None);
    }
}

impl Recording {
    /// The index of the calling thread, or of who is none.
    fn thread(&mut self, who: Option<&'static str>) -> usize {
        let number = match who {
            Some(_) => None,
            None => Some(thread_number()),
        };
        let mut known = self.numbers.iter().zip(&self.trace.threads);
        let known = known.position(|(&n, name)| n == number && who.is_none_or(|who| who == name));
        known.unwrap_or_else(|| {
            self.numbers.push(number);
            self.trace.threads.push(who.map_or_else(thread_name, str::to_string));
            self.numbers.len() - 1
        })
    }
}

fn recording() -> MutexGuard<'static, Option<Recording>> {
    RECORDING.lock().unwrap_or_else(|e| e.into_inner())
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn thread_name() -> String {
    std::thread::current().name().unwrap_or("unnamed").to_string()
}

/// A number of the calling thread that no other thread of this process has or had.
fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static NUMBER: usize = NEXT.fetch_add(1, Ordering::Relaxed));
    NUMBER.with(|number| *number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "emulate")]
    fn what_an_accelerator_does_is_recorded_beside_the_host() {
        use crate::device::Accelerator;
        use crate::kernels::emulated::{Emulated, Order};
        let on: std::sync::Arc<dyn Accelerator> = std::sync::Arc::new(Emulated::new(80, Order::Ascending).unwrap());
        watch(&on);
        begin(0);
        let far = span(Row::Compute, "trace test far");
        let from = on.timed_moment().unwrap();
        std::thread::sleep(Duration::from_millis(5));
        let to = on.timed_moment().unwrap();
        drop(far);
        drop(span(Row::Compute, "trace test of nothing"));
        drop(span(Row::Wait, "trace test of the host"));
        on_accelerator(Row::Copy, "GPU, to the host", "trace test copy", (from, to), Some(5));
        let trace = take().unwrap();
        let named = |name: &str| trace.events.iter().filter(|e| e.name == name).collect::<Vec<_>>();
        let [far, here] = named("trace test far")[..] else { panic!("{:?}", trace.events) };
        let [far, here] = if trace.threads[far.thread] == ACCELERATOR { [far, here] } else { [here, far] };
        assert_eq!((&*trace.threads[far.thread], far.row), (ACCELERATOR, Row::Compute));
        assert!(far.start.abs_diff(here.start) < 1_000_000 && far.end().abs_diff(here.end()) < 1_000_000);
        let [copy] = named("trace test copy")[..] else { panic!("{:?}", trace.events) };
        assert_eq!((&*trace.threads[copy.thread], copy.row, copy.bytes), ("GPU, to the host", Row::Copy, Some(5)));
        assert!(copy.start >= far.start && copy.end() <= far.end() && copy.duration >= 5_000_000);
        assert_eq!((named("trace test of nothing").len(), named("trace test of the host").len()), (1, 1));
    }

    /// One test, since the recording is the process's. Other tests of the process may put spans into it.
    #[test]
    fn spans_are_recorded_between_begin_and_take_with_their_threads() {
        let asked = AtomicBool::new(false);
        drop(span(Row::Compute, || {
            asked.store(true, Ordering::Relaxed);
            String::new()
        }));
        assert!(take().is_none() && !asked.load(Ordering::Relaxed), "off, nobody asks for names");

        begin(3);
        let before = span(Row::Compute, "before");
        begin(4);
        drop(before);
        {
            let _outer = span(Row::Compute, || format!("trace test {}", 1));
            drop(span(Row::Wait, "trace test 2"));
            let queue = super::super::Queue::new("trace test queue").unwrap();
            let work = || {
                drop(span(Row::Copy, "trace test 3").bytes(7));
                Ok(())
            };
            queue.submit(work).wait().unwrap();
            happened(Row::Disk, "drive", "trace test 4", Instant::now(), 3);
            happened(Row::Disk, "drive", "trace test 5", Instant::now(), 3);
        }
        let open = span(Row::Disk, "trace test open");
        let trace = take().unwrap();
        drop(open);
        assert!(!is_on() && take().is_none());

        assert_eq!(trace.rank, 4);
        let mine = |e: &&Event| e.name.starts_with("trace test");
        let events: Vec<&Event> = trace.events.iter().filter(mine).collect();
        assert_eq!(events.len(), 5, "{events:?}");
        assert!(trace.events.iter().all(|e| e.name != "before"));
        let [inner, copy, read, again, outer] = events[..] else { unreachable!() };
        assert_eq!((&*trace.threads[read.thread], read.thread, read.bytes), ("drive", again.thread, Some(3)));
        assert_eq!((inner.row, copy.row, outer.row), (Row::Wait, Row::Copy, Row::Compute));
        assert_eq!((inner.thread, outer.thread, copy.bytes), (0, 0, Some(7)));
        assert_eq!(trace.threads[copy.thread], "trace test queue");
        assert!(outer.start <= inner.start && inner.end() <= copy.start && copy.end() <= outer.end());
        let text = serde_json::to_string(&trace).unwrap();
        assert_eq!(serde_json::from_str::<Trace>(&text).unwrap(), trace);
        #[cfg(feature = "emulate")]
        what_an_accelerator_does_is_recorded_beside_the_host();
    }
}

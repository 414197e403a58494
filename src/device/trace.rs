//! Where the time goes: named spans of every thread of this process, recorded between [`begin`] and [`take`]. Off, a
//! span costs one relaxed load. What becomes of the recording is for `track::profile` to say.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

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
    /// Names of the threads that had spans; the first is the one that called [`begin`].
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
    /// The thread of each entry of `trace.threads`, by [`thread_number`].
    numbers: Vec<usize>,
    began: Instant,
}

/// Starts a recording; one that runs is thrown away. Ranks that call this right after a barrier have the same zero.
pub fn begin(rank: usize) {
    let mut trace = Trace { rank, threads: Vec::new(), events: Vec::new() };
    trace.threads.push(thread_name());
    *recording() = Some(Recording { trace, numbers: vec![thread_number()], began: Instant::now() });
    ON.store(true, Ordering::Relaxed);
}

/// Ends the recording and hands it over; None where none runs. Spans that are still open are not in it.
pub fn take() -> Option<Trace> {
    ON.store(false, Ordering::Relaxed);
    Some(recording().take()?.trace)
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
        true => Span(Some(Open { row, name: name.text(), bytes: None, start: Instant::now() })),
    }
}

/// An open span; see [`span`].
#[derive(Debug)]
pub struct Span(Option<Open>);

#[derive(Debug)]
struct Open {
    row: Row,
    name: String,
    bytes: Option<u64>,
    start: Instant,
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
        let Some(open) = self.0.take() else { return };
        let end = Instant::now();
        if let Some(recording) = &mut *recording() {
            recording.add(open, end, thread_number(), thread_name);
        }
    }
}

/// A line of its own for what no single thread does, such as a drive's requests; takes the place of a thread.
#[derive(Debug)]
pub struct Track {
    number: usize,
    name: String,
}

impl Track {
    pub fn new(name: impl Into<String>) -> Self {
        Track { number: new_number(), name: name.into() }
    }

    /// A span that has ended. Spans of a track are to be apart, or inside one another.
    pub fn add(&self, row: Row, name: impl SpanName, span: Range<Instant>, bytes: u64) {
        if !is_on() {
            return;
        }
        let open = Open { row, name: name.text(), bytes: Some(bytes), start: span.start };
        if let Some(recording) = &mut *recording() {
            recording.add(open, span.end, self.number, || self.name.clone());
        }
    }
}

impl Recording {
    fn add(&mut self, open: Open, end: Instant, number: usize, thread_name: impl FnOnce() -> String) {
        let Open { row, name, bytes, start } = open;
        // A span that is older than the recording belongs to the one before.
        let Some(since) = start.checked_duration_since(self.began) else { return };
        let duration = nanoseconds(end.saturating_duration_since(start));
        let thread = self.thread(number, thread_name);
        self.trace.events.push(Event { row, name, thread, start: nanoseconds(since), duration, bytes });
    }

    /// The index of a thread, or of a track.
    fn thread(&mut self, number: usize, name: impl FnOnce() -> String) -> usize {
        if let Some(known) = self.numbers.iter().position(|&n| n == number) {
            return known;
        }
        self.numbers.push(number);
        self.trace.threads.push(name());
        self.numbers.len() - 1
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
    thread_local!(static NUMBER: usize = new_number());
    NUMBER.with(|number| *number)
}

fn new_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        }
        let open = span(Row::Disk, "trace test open");
        let (track, started) = (Track::new("trace test track"), Instant::now());
        track.add(Row::Disk, "trace test 4", started..started + Duration::from_nanos(9), 11);
        let trace = take().unwrap();
        drop(open);
        track.add(Row::Disk, "trace test 5", started..started, 0);
        assert!(!is_on() && take().is_none());

        assert_eq!(trace.rank, 4);
        let mine = |e: &&Event| e.name.starts_with("trace test");
        let events: Vec<&Event> = trace.events.iter().filter(mine).collect();
        assert_eq!(events.len(), 4, "{events:?}");
        assert!(trace.events.iter().all(|e| e.name != "before"));
        let [inner, copy, outer, disk] = events[..] else { unreachable!() };
        assert_eq!((disk.row, disk.duration, disk.bytes), (Row::Disk, 9, Some(11)));
        assert_eq!(trace.threads[disk.thread], "trace test track");
        assert_eq!((inner.row, copy.row, outer.row), (Row::Wait, Row::Copy, Row::Compute));
        assert_eq!((inner.thread, outer.thread, copy.bytes), (0, 0, Some(7)));
        assert_eq!(trace.threads[copy.thread], "trace test queue");
        assert!(outer.start <= inner.start && inner.end() <= copy.start && copy.end() <= outer.end());
        let text = serde_json::to_string(&trace).unwrap();
        assert_eq!(serde_json::from_str::<Trace>(&text).unwrap(), trace);
    }
}

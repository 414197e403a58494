//! What an accelerator did, when: moments in its row of work around spans, whose times are read when the recording ends.

use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use super::{Event, Recording, Row, SpanName, nanoseconds, recording};
use crate::device::{Accelerator, Moment};

/// Whose row of work spans of computation are also drawn in.
pub const ACCELERATOR: &str = "GPU";

/// Shorter ones are those of computation that had nothing for the accelerator: two marks, one after the other.
const SHORTEST: u64 = 4_000;

static WATCHED: Mutex<Option<Weak<dyn Accelerator>>> = Mutex::new(None);

/// From the next recording on, spans of computation and of the optimizer are recorded as this accelerator does them, too.
pub fn watch(accelerator: &Arc<dyn Accelerator>) {
    *WATCHED.lock().unwrap_or_else(|e| e.into_inner()) = Some(Arc::downgrade(accelerator));
}

/// Notes what an accelerator does between two timed moments: a copy, a collective. `who` names the row.
pub fn on_accelerator(
    row: Row,
    who: &'static str,
    name: impl SpanName,
    (from, to): (Moment, Moment),
    bytes: Option<usize>,
) {
    if super::is_on()
        && let Some(beside) = recording().as_mut().and_then(|recording| recording.beside.as_mut())
    {
        beside.marked.push(Marked { row, who, name: name.text(), from, to, bytes, peak: None });
    }
}

/// A span that the accelerator's row of work has, too.
pub(super) struct OpenThere {
    from: Moment,
    number: usize,
}

/// Where the watched accelerator is in its row, if what is of this kind is put there.
pub(super) fn open(row: Row) -> Option<OpenThere> {
    if !matches!(row, Row::Compute | Row::Optimizer) {
        return None;
    }
    let mut recording = recording();
    let beside = recording.as_mut()?.beside.as_mut()?;
    // An error is told by whatever comes next.
    let from = beside.on.timed_moment().ok()?;
    beside.look();
    beside.opened += 1;
    let number = beside.opened;
    beside.open.push((number, 0));
    Some(OpenThere { from, number })
}

/// The span has ended on the host, and will when the accelerator has come here.
pub(super) fn close(OpenThere { from, number }: OpenThere, row: Row, name: &str) {
    let mut recording = recording();
    let Some(beside) = recording.as_mut().and_then(|recording| recording.beside.as_mut()) else { return };
    beside.look();
    let Some(at) = beside.open.iter().position(|&(n, _)| n == number) else { return };
    let (_, peak) = beside.open.swap_remove(at);
    let Ok(to) = beside.on.timed_moment() else { return };
    let peak = (peak > 0).then_some(peak);
    beside.marked.push(Marked { row, who: ACCELERATOR, name: name.to_string(), from, to, bytes: None, peak });
}

/// The accelerator of a recording.
pub(super) struct Beside {
    on: Arc<dyn Accelerator>,
    /// A moment, and when it was, in nanoseconds since the recording began.
    zero: (Moment, u64),
    marked: Vec<Marked>,
    /// Spans so far.
    opened: usize,
    /// Those that are open, by number: the most memory that was in use since.
    open: Vec<(usize, usize)>,
}

struct Marked {
    row: Row,
    who: &'static str,
    name: String,
    from: Moment,
    to: Moment,
    bytes: Option<usize>,
    peak: Option<usize>,
}

impl Beside {
    /// Waits for what the accelerator has to do, so that both clocks can be compared. None where none is watched.
    pub fn begin(began: Instant) -> Option<Beside> {
        let on = WATCHED.lock().unwrap_or_else(|e| e.into_inner()).as_ref()?.upgrade()?;
        let now = || -> anyhow::Result<(Moment, u64)> {
            let moment = on.timed_moment()?;
            on.seconds(&moment, &moment)?;
            Ok((moment, nanoseconds(began.elapsed())))
        };
        // The first answer may be late for other reasons.
        let _ = now().ok()?;
        let zero = now().ok()?;
        Some(Beside { on, zero, marked: Vec::new(), opened: 0, open: Vec::new() })
    }

    /// The memory that was in use since the last look was so for all spans that are open.
    fn look(&mut self) {
        let Ok(Some(most)) = self.on.turn() else { return };
        self.open.iter_mut().for_each(|(_, peak)| *peak = most.max(*peak));
    }

    /// Adds what was marked to the recording, once it is done. What has failed is left out.
    pub fn end(self, recorded: &mut Recording) {
        let (zero, at) = &self.zero;
        for Marked { row, who, name, from, to, bytes, peak } in self.marked {
            let when = |moment: &Moment| self.on.seconds(zero, moment);
            let (Ok(from), Ok(to)) = (when(&from), when(&to)) else { continue };
            let [start, end] = [from, to].map(|seconds| at.saturating_add_signed((1e9 * seconds) as i64));
            let duration = end.saturating_sub(start);
            if duration < SHORTEST && who == ACCELERATOR {
                continue;
            }
            let thread = recorded.thread(Some(who));
            let [bytes, peak] = [bytes, peak].map(|bytes| bytes.map(|bytes| bytes as u64));
            recorded.trace.events.push(Event { row, name, thread, start, duration, bytes, peak });
        }
    }
}

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
        beside.marked.push(Marked { row, who, name: name.text(), from, to, bytes });
    }
}

/// Where the watched accelerator is in its row, if what is of this kind is put there.
pub(super) fn moment(row: Row) -> Option<Moment> {
    if !matches!(row, Row::Compute | Row::Optimizer) {
        return None;
    }
    let on = recording().as_ref()?.beside.as_ref()?.on.clone();
    // An error is told by whatever comes next.
    on.timed_moment().ok()
}

/// The accelerator of a recording.
pub(super) struct Beside {
    on: Arc<dyn Accelerator>,
    /// A moment, and when it was, in nanoseconds since the recording began.
    zero: (Moment, u64),
    marked: Vec<Marked>,
}

struct Marked {
    row: Row,
    who: &'static str,
    name: String,
    from: Moment,
    to: Moment,
    bytes: Option<usize>,
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
        Some(Beside { on, zero, marked: Vec::new() })
    }

    /// Adds what was marked to the recording, once it is done. What has failed is left out.
    pub fn end(self, recorded: &mut Recording) {
        let (zero, at) = &self.zero;
        for Marked { row, who, name, from, to, bytes } in self.marked {
            let when = |moment: &Moment| self.on.seconds(zero, moment);
            let (Ok(from), Ok(to)) = (when(&from), when(&to)) else { continue };
            let [start, end] = [from, to].map(|seconds| at.saturating_add_signed((1e9 * seconds) as i64));
            let duration = end.saturating_sub(start);
            if duration < SHORTEST && who == ACCELERATOR {
                continue;
            }
            let thread = recorded.thread(Some(who));
            let bytes = bytes.map(|bytes| bytes as u64);
            recorded.trace.events.push(Event { row, name, thread, start, duration, bytes });
        }
    }
}

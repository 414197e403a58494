//! What a state file has moved, and what that does to the drive.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use bytesize::ByteSize;

use crate::device::trace::{Row, Track};

/// Bytes moved so far, and the time during which at least one request was under way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub busy_seconds: f64,
}

/// Keeps the count, and has requests in the recording of where the time goes.
#[derive(Debug)]
pub(super) struct Meter {
    count: Mutex<Count>,
    track: Track,
}

#[derive(Debug, Default)]
struct Count {
    under_way: usize,
    since: Option<Instant>,
    /// When a request last ended.
    ended: Option<Instant>,
    busy: Duration,
    read: u64,
    written: u64,
}

impl Default for Meter {
    fn default() -> Self {
        Meter { count: Mutex::default(), track: Track::new("state file") }
    }
}

impl Meter {
    pub fn begin(&self) {
        let mut count = self.count.lock().unwrap_or_else(|e| e.into_inner());
        count.under_way += 1;
        count.since.get_or_insert_with(Instant::now);
    }

    /// A request is done, of `name` in recordings. Many may be under way; what each is given there is the time since the
    /// one before it was done, or since there was nothing to do: so they add up to the time in which the drive is busy.
    pub fn end(&self, read: u64, written: u64, name: impl FnOnce() -> String) {
        let now = Instant::now();
        let mut count = self.count.lock().unwrap_or_else(|e| e.into_inner());
        count.read += read;
        count.written += written;
        count.under_way -= 1;
        let Some(since) = count.since else { return };
        // Two may ask for the time and end in another order.
        let from = count.ended.map_or(since, |ended| ended.max(since));
        count.ended = Some(now.max(from));
        if count.under_way == 0 {
            count.since = None;
            count.busy += now.saturating_duration_since(since);
        }
        self.track.add(Row::Disk, name, from..now.max(from), read + written);
    }

    pub fn traffic(&self) -> Traffic {
        let count = self.count.lock().unwrap_or_else(|e| e.into_inner());
        let busy = count.busy + count.since.map_or(Duration::ZERO, |since| since.elapsed());
        Traffic { read_bytes: count.read, written_bytes: count.written, busy_seconds: busy.as_secs_f64() }
    }
}

/// What common consumer drives are warranted for, in bytes written for each terabyte that they hold: 200 to 600 times
/// their size, by the data sheets of drives with four and three bits a cell.
const RATED_BYTES: f64 = 300e12;

/// What a run will write to the drive, and what that is of a common drive's life.
pub fn wear_note(bytes_written_per_step: u64, steps: u64) -> String {
    let size = |bytes: u64| ByteSize(bytes).display().si();
    let total = bytes_written_per_step.saturating_mul(steps);
    let share = 100.0 * total as f64 / RATED_BYTES;
    let share = if share < 0.01 { "less than 0.01".to_string() } else { format!("{share:.2}") };
    format!(
        "{steps} steps write {} to the drive ({} a step): {share} % of the rated life of a consumer drive of 1 TB (300 TB \
         written assumed; see yours)",
        size(total),
        size(bytes_written_per_step)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wear_is_told_in_bytes_and_share() {
        let note = wear_note(10_000_000_000, 1000);
        assert!(note.contains("10.0 TB") && note.contains("10.0 GB") && note.contains("3.33 %"), "{note}");
        assert!(wear_note(1000, 3).contains("less than 0.01 %"));
    }

    #[test]
    fn busy_time_ends_with_the_last_request() {
        let meter = Meter::default();
        meter.begin();
        meter.begin();
        meter.end(5, 0, String::new);
        assert!(meter.count.lock().unwrap().since.is_some());
        meter.end(0, 7, String::new);
        assert!(meter.count.lock().unwrap().since.is_none());
        let traffic = meter.traffic();
        assert_eq!((traffic.read_bytes, traffic.written_bytes), (5, 7));
        assert_eq!(meter.traffic(), traffic);
    }
}

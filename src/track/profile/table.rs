//! Recordings as a table: where the steps' time went, per rank.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::Range;

use crate::device::trace::{ACCELERATOR, Event, Row, Trace};

/// So many segments are told apart by the memory that was in use while they ran.
const SHOWN: usize = 6;

/// One line of the table, in nanoseconds over all steps.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    label: String,
    row: Row,
    /// Of the thread that trains, without what went on inside in other spans: these lines add up to the steps' time.
    training: u64,
    /// Of all threads together; more than the steps' time where several work at once.
    all: u64,
}

/// The whole file.
pub fn table(traces: &[Trace]) -> String {
    let mut text = String::new();
    for trace in traces {
        // Writing to a string cannot fail.
        let _ = rank_table(trace, &mut text);
    }
    text += "The lines of the thread that trains add up to a step; \"all threads\" has what went on beside it, too.\n\
             Waiting: for results that are to come, for other ranks, for copies and for the disk. What a GPU does is told below,\n\
             by its own clock.\n";
    text
}

fn rank_table(trace: &Trace, out: &mut String) -> std::fmt::Result {
    let steps: Vec<&Event> = trace.events.iter().filter(|e| e.row == Row::Step).collect();
    let total: u64 = steps.iter().map(|e| e.duration).sum();
    let (Some(first), Some(last)) = (steps.first(), steps.last()) else {
        return writeln!(out, "rank {}: no whole step was recorded\n", trace.rank);
    };
    let count = steps.len() as f64;
    let seconds = |nanoseconds: u64| nanoseconds as f64 / 1e9 / count;
    let share = |nanoseconds: u64| 100.0 * nanoseconds as f64 / total.max(1) as f64;
    let lines = lines(trace, &steps);
    let waits = |line: &&Line| matches!(line.row, Row::Wait | Row::Collective | Row::Copy | Row::Disk);
    let waiting: u64 = lines.iter().filter(waits).map(|line| line.training).sum();
    let which = if steps.len() == 1 { first.name.clone() } else { format!("{} to {}", first.name, last.name) };
    writeln!(
        out,
        "rank {}, {which}: {:.3} s a step, {:.1} % of it waiting",
        trace.rank,
        seconds(total),
        share(waiting)
    )?;
    writeln!(out, "  {:<22} {:>20} {:>12}", "", "thread that trains", "all threads")?;
    for line in &lines {
        writeln!(
            out,
            "  {:<22} {:>10.4} s {:>5.1} % {:>10.4} s",
            line.label,
            seconds(line.training),
            share(line.training),
            seconds(line.all)
        )?;
    }
    let other = total.saturating_sub(lines.iter().map(|line| line.training).sum());
    writeln!(out, "  {:<22} {:>10.4} s {:>5.1} %", "other", seconds(other), share(other))?;
    let steps: Vec<Range<u64>> = steps.iter().map(|e| e.start..e.end()).collect();
    for (thread, name) in trace.threads.iter().enumerate().filter(|(_, name)| name.starts_with(ACCELERATOR)) {
        let busy = busy(trace, thread, &steps);
        writeln!(out, "  {name:<22} {:>10.4} s {:>5.1} % of the time", seconds(busy), share(busy))?;
    }
    for (name, bytes) in fullest(trace).into_iter().take(SHOWN) {
        writeln!(out, "  {:>10.1} MiB of the GPU's memory at most: {name}", bytes as f64 / f64::from(1 << 20))?;
    }
    writeln!(out)
}

/// What went on during the steps, in the order of [`Row::ALL`] and of first appearance.
fn lines(trace: &Trace, steps: &[&Event]) -> Vec<Line> {
    let steps: Vec<Range<u64>> = steps.iter().map(|e| e.start..e.end()).collect();
    let mut lines: Vec<Line> = Vec::new();
    // What the host and an accelerator do at once is not added up.
    for thread in (0..trace.threads.len()).filter(|&thread| !trace.threads[thread].starts_with(ACCELERATOR)) {
        let mut events: Vec<&Event> =
            trace.events.iter().filter(|e| e.thread == thread && e.row != Row::Step).collect();
        // The outer one of two that begin together comes first.
        events.sort_by_key(|e| (e.start, u64::MAX - e.end()));
        // Requests of a drive overlap; what counts is when it had any.
        let requests = thread > 0 && events.iter().all(|e| e.row == Row::Disk);
        let own = if requests { busy_time(&events, &steps) } else { own_time(&events, &steps) };
        for (event, own) in events.iter().zip(own) {
            let label = label(event);
            let known = lines.iter().position(|line| line.label == label);
            let line = known.unwrap_or_else(|| {
                lines.push(Line { label, row: event.row, training: 0, all: 0 });
                lines.len() - 1
            });
            lines[line].all += own;
            if thread == 0 {
                lines[line].training += own;
            }
        }
    }
    // Stable, so that parts of the same row stay in the order in which they appeared.
    lines.sort_by_key(|line| line.row);
    lines
}

/// How long each of a thread's spans lasted during the steps, without the spans inside it. `events`: by start, outer
/// ones first.
fn own_time(events: &[&Event], steps: &[Range<u64>]) -> Vec<u64> {
    let mut own: Vec<u64> = events.iter().map(|e| overlap(&(e.start..e.end()), steps)).collect();
    let mut open: Vec<usize> = Vec::new();
    for (i, event) in events.iter().enumerate() {
        while open.last().is_some_and(|&outer| events[outer].end() <= event.start) {
            open.pop();
        }
        if let Some(&outer) = open.last() {
            let inside = event.start..event.end().min(events[outer].end());
            own[outer] = own[outer].saturating_sub(overlap(&inside, steps));
        }
        open.push(i);
    }
    own
}

/// What took how much of an accelerator's memory at most, the most first.
fn fullest(trace: &Trace) -> Vec<(&str, u64)> {
    let mut most: BTreeMap<&str, u64> = BTreeMap::new();
    for (event, peak) in trace.events.iter().filter_map(|event| Some((event, event.peak?))) {
        let known = most.entry(&event.name).or_default();
        *known = peak.max(*known);
    }
    let mut most: Vec<_> = most.into_iter().collect();
    most.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
    most
}

/// How long a thread had any span during the steps.
fn busy(trace: &Trace, thread: usize, steps: &[Range<u64>]) -> u64 {
    let mut events: Vec<&Event> = trace.events.iter().filter(|e| e.thread == thread).collect();
    events.sort_by_key(|e| e.start);
    busy_time(&events, steps).iter().sum()
}

/// For each of `events`, by start: how long it lasted during the steps after all before it had ended.
fn busy_time(events: &[&Event], steps: &[Range<u64>]) -> Vec<u64> {
    let mut until = 0;
    let own = |event: &&Event| {
        let own = overlap(&(event.start.max(until)..event.end()), steps);
        until = until.max(event.end());
        own
    };
    events.iter().map(own).collect()
}

fn overlap(span: &Range<u64>, steps: &[Range<u64>]) -> u64 {
    steps.iter().map(|step| span.end.min(step.end).saturating_sub(span.start.max(step.start))).sum()
}

/// Computation is told apart by its names' first words.
fn label(event: &Event) -> String {
    match event.row {
        Row::Compute => format!("compute: {}", event.name.split(' ').next().unwrap_or_default()),
        row => row.label().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(row: Row, name: &str, thread: usize, span: Range<u64>) -> Event {
        let (start, duration) = (span.start, span.end - span.start);
        let peak = (thread == 3).then_some(start << 20);
        Event { row, name: name.into(), thread, start, duration, bytes: None, peak }
    }

    #[test]
    fn what_is_inside_another_span_counts_once_and_only_during_steps() {
        let events = vec![
            event(Row::Wait, "wait", 0, 40..50),
            event(Row::Compute, "forward a", 0, 0..60),
            event(Row::Collective, "all-gather", 1, 10..30),
            event(Row::Compute, "backward b", 0, 60..90),
            event(Row::Step, "step 2", 0, 0..100),
            event(Row::Disk, "read", 2, 95..110),
            event(Row::Disk, "read", 2, 10..20),
            event(Row::Disk, "read", 2, 12..25),
            event(Row::Compute, "validation", 0, 100..200),
            event(Row::Compute, "forward a", 0, 200..280),
            event(Row::Step, "step 3", 0, 200..300),
            event(Row::Compute, "forward a", 3, 20..80),
            event(Row::Compute, "recompute a", 3, 30..40),
            event(Row::Compute, "backward a", 3, 90..130),
            event(Row::Copy, "copy", 4, 210..230),
        ];
        let threads = ["main", "queue", "drive", "GPU", "GPU, to the host"].map(String::from).to_vec();
        let trace = Trace { rank: 0, threads, events };
        let steps: Vec<&Event> = trace.events.iter().filter(|e| e.row == Row::Step).collect();
        let got: Vec<_> =
            lines(&trace, &steps).into_iter().map(|l| (l.label, l.training, l.all)).filter(|l| l.2 > 0).collect();
        let want = [
            ("compute: forward", 130, 130),
            ("compute: backward", 30, 30),
            ("collectives", 0, 20),
            ("disk", 0, 20),
            ("waiting", 10, 10),
        ];
        assert_eq!(got, want.map(|(label, training, all)| (label.to_string(), training, all)));
        let text = table(&[trace]);
        assert!(text.contains("rank 0, step 2 to step 3: 0.000 s a step, 5.0 % of it waiting"), "{text}");
        // 20 to 80 and 90 to 100 of two steps of 100.
        assert!(text.contains("\n  GPU                        0.0000 s  35.0 % of the time\n"), "{text}");
        assert!(text.contains("\n  GPU, to the host           0.0000 s  10.0 % of the time\n"), "{text}");
        let memory = "90.0 MiB of the GPU's memory at most: backward a\n        30.0 MiB of the GPU's memory at most: recompute a\n";
        assert!(text.contains(memory), "{text}");
        assert!(table(&[Trace { rank: 1, threads: vec![], events: vec![] }]).contains("no whole step"));
    }
}

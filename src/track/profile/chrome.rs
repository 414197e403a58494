//! Recordings in Chrome's trace event format ("Trace Event Format", Google, 2016): complete events (ph "X"), times in
//! microseconds. A process is a rank; a thread is a row: a kind of work on one thread of the program.

use std::collections::BTreeSet;
use std::fmt::Write;

use anyhow::Result;

use crate::device::trace::{Event, Row, Trace};

/// The whole file.
pub fn json(traces: &[Trace]) -> Result<String> {
    let mut lines = Vec::new();
    for trace in traces {
        let lanes = lanes(&trace.events);
        // The order of rows, the same on every rank: by kind, then by thread.
        let rows: BTreeSet<Drawn> = trace.events.iter().zip(&lanes).map(|(e, &lane)| (e.row, e.thread, lane)).collect();
        let rows: Vec<Drawn> = rows.into_iter().collect();
        let pid = trace.rank;
        lines.push(metadata(pid, 0, "process_name", &format!("rank {pid}"))?);
        lines.push(format!(r#"{{"ph":"M","name":"process_sort_index","pid":{pid},"args":{{"sort_index":{pid}}}}}"#));
        for (number, &row) in rows.iter().enumerate() {
            let tid = number + 1;
            lines.push(metadata(pid, tid, "thread_name", &row_name(trace, row))?);
            lines.push(format!(
                r#"{{"ph":"M","name":"thread_sort_index","pid":{pid},"tid":{tid},"args":{{"sort_index":{tid}}}}}"#
            ));
        }
        for (event, lane) in trace.events.iter().zip(lanes) {
            let drawn = (event.row, event.thread, lane);
            let tid = rows.iter().position(|&row| row == drawn).map_or(0, |n| n + 1);
            lines.push(complete(event, pid, tid)?);
        }
    }
    Ok(format!("{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{}\n]}}\n", lines.join(",\n")))
}

/// A row of the picture: kind of work, thread, and lane.
type Drawn = (Row, usize, usize);

/// Rows of threads other than the one that trains carry their thread's name.
fn row_name(trace: &Trace, (row, thread, lane): Drawn) -> String {
    let mut name = row.label().to_string();
    if thread > 0 {
        name += &format!(": {}", trace.threads[thread]);
    }
    if lane > 0 {
        name += &format!(" ({})", lane + 1);
    }
    name
}

/// A lane for every event: 0, unless another one of its row and thread is under way that it is not inside of.
fn lanes(events: &[Event]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..events.len()).collect();
    order.sort_by_key(|&i| (events[i].row, events[i].thread, events[i].start, u64::MAX - events[i].end()));
    let mut lanes = vec![0; events.len()];
    // Of the present row and thread: the ends of what is open in each lane, outer ones first.
    let mut open: Vec<Vec<u64>> = Vec::new();
    let mut last = None;
    for i in order {
        let event = &events[i];
        if last.replace((event.row, event.thread)) != Some((event.row, event.thread)) {
            open.clear();
        }
        open.iter_mut().for_each(|lane| lane.retain(|&end| end > event.start));
        let fits = |lane: &Vec<u64>| lane.last().is_none_or(|&end| event.end() <= end);
        let lane = open.iter().position(fits).unwrap_or_else(|| {
            open.push(Vec::new());
            open.len() - 1
        });
        open[lane].push(event.end());
        lanes[i] = lane;
    }
    lanes
}

fn metadata(pid: usize, tid: usize, kind: &str, name: &str) -> Result<String> {
    let name = serde_json::to_string(name)?;
    Ok(format!(r#"{{"ph":"M","name":"{kind}","pid":{pid},"tid":{tid},"args":{{"name":{name}}}}}"#))
}

fn complete(event: &Event, pid: usize, tid: usize) -> Result<String> {
    let mut line = format!(
        r#"{{"ph":"X","name":{},"cat":"{}","pid":{pid},"tid":{tid},"ts":{},"dur":{}"#,
        serde_json::to_string(&event.name)?,
        event.row.label(),
        microseconds(event.start),
        microseconds(event.duration)
    );
    if let Some(bytes) = event.bytes {
        write!(line, r#","args":{{"bytes":{bytes}"#)?;
        if event.duration > 0 {
            // A byte per nanosecond is a gigabyte per second.
            write!(line, r#","GB/s":{:.3}"#, bytes as f64 / event.duration as f64)?;
        }
        line.push('}');
    } else if let Some(peak) = event.peak {
        write!(line, r#","args":{{"bytes in use at most":{peak}}}"#)?;
    }
    line.push('}');
    Ok(line)
}

/// With all digits, which a float of the whole number would lose after some hours.
fn microseconds(nanoseconds: u64) -> String {
    format!("{}.{:03}", nanoseconds / 1000, nanoseconds % 1000)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn requests_that_overlap_have_lanes_and_what_is_nested_has_none() {
        let event = |start, end| Event {
            row: Row::Disk,
            name: String::new(),
            thread: 1,
            start,
            duration: end - start,
            bytes: None,
            peak: None,
        };
        let events = [event(0, 10), event(2, 6), event(5, 12), event(3, 4), event(12, 13), event(9, 20)];
        assert_eq!(lanes(&events), [0, 0, 1, 0, 0, 2]);
    }

    #[test]
    fn every_rank_is_a_process_and_every_kind_of_work_on_a_thread_a_row() {
        let event = |row, thread, start, bytes| {
            let peak = (row == Row::Compute).then_some(77);
            Event { row, name: "a \"name\"".into(), thread, start, duration: 1500, bytes, peak }
        };
        let events = vec![
            event(Row::Copy, 1, 2_000_000, Some(3000)),
            event(Row::Compute, 0, 1, None),
            event(Row::Wait, 0, 7, None),
        ];
        let threads = vec!["main".to_string(), "fetch".to_string()];
        let traces = [0, 1].map(|rank| Trace { rank, threads: threads.clone(), events: events.clone() });
        let file: Value = serde_json::from_str(&json(&traces).unwrap()).unwrap();
        let all = file["traceEvents"].as_array().unwrap();
        let of = |kind: &str| all.iter().filter(|e| e["name"] == kind).collect::<Vec<_>>();
        assert_eq!(of("process_name").len(), 2);
        let rows: Vec<_> = of("thread_name").iter().map(|e| e["args"]["name"].as_str().unwrap().to_string()).collect();
        assert_eq!(rows[..3], ["compute", "copies: fetch", "waiting"]);
        let spans: Vec<_> = all.iter().filter(|e| e["ph"] == "X").collect();
        assert_eq!(spans.len(), 6);
        assert_eq!((&spans[0]["tid"], &spans[0]["name"]), (&2.into(), &"a \"name\"".into()));
        assert_eq!(spans[0]["ts"].as_f64(), Some(2000.0));
        assert_eq!(spans[0]["dur"].as_f64(), Some(1.5));
        assert_eq!(spans[0]["args"]["GB/s"].as_f64(), Some(2.0));
        assert_eq!(spans[1]["args"]["bytes in use at most"].as_u64(), Some(77));
        assert_eq!((&spans[1]["tid"], &spans[4]["pid"]), (&1.into(), &1.into()));
    }
}

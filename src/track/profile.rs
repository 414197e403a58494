//! `--profile N`: records N optimizer steps after one that warms up, and leaves `profile.json`, a trace of all ranks for
//! Perfetto (<https://ui.perfetto.dev>) or `chrome://tracing`, and `profile.txt`, a table of where the time went. What is
//! recorded is for those who do the work to say ([`trace::span`]).

mod chrome;
mod table;

use std::fs;
use std::num::NonZeroU32;
use std::path::Path;

use anyhow::{Context, Result};

use crate::comm::{Communicator, CommunicatorExt};
use crate::device::trace::{self, Row, Span, Trace};

/// Steps before those that are recorded.
const WARM_UP: u64 = 1;

/// Which steps of a run are recorded, and how far that is. Its functions are collectives where a recording begins or
/// ends.
#[derive(Debug, Default)]
pub struct Profiler {
    /// To record; 0: nothing.
    wanted: u64,
    /// Steps of this process so far.
    seen: u64,
    recorded: u64,
}

impl Profiler {
    /// Records `steps` steps; None: nothing.
    pub fn new(steps: Option<NonZeroU32>) -> Self {
        Profiler { wanted: steps.map_or(0, |steps| steps.get().into()), seen: 0, recorded: 0 }
    }

    /// Step `step` begins; dropping what this returns ends it.
    pub fn step(&mut self, comm: &dyn Communicator, step: u64) -> Result<Span> {
        if self.wanted > 0 && self.recorded == 0 && self.seen == WARM_UP {
            // All ranks' clocks have the same zero, to within what it takes to leave a barrier.
            comm.barrier()?;
            trace::begin(comm.rank());
        }
        self.seen += 1;
        if trace::is_on() {
            self.recorded += 1;
        }
        Ok(trace::span(Row::Step, || format!("step {step}")))
    }

    /// Writes the profile into `dir` once all wanted steps are recorded, or, at the run's `end`, those that are. Returns
    /// the table then.
    pub fn finish(&mut self, comm: &dyn Communicator, dir: &Path, end: bool) -> Result<Option<String>> {
        if self.wanted == 0 || self.recorded < self.wanted && !end {
            return Ok(None);
        }
        self.wanted = 0;
        let Some(own) = trace::take() else {
            return Ok(Some(format!("nothing to profile: the run had no step after the first {WARM_UP}")));
        };
        let all = comm.gather_bytes(&serde_json::to_vec(&own)?)?;
        let written = match comm.rank() {
            0 => write(dir, &all),
            _ => Ok(String::new()),
        };
        comm.agree(written).map(Some)
    }
}

fn write(dir: &Path, all: &[Vec<u8>]) -> Result<String> {
    let traces = all.iter().map(|bytes| serde_json::from_slice(bytes)).collect::<Result<Vec<Trace>, _>>()?;
    let json = dir.join("profile.json");
    let writing = |path: &Path| format!("writing {}", path.display());
    fs::write(&json, chrome::json(&traces)?).with_context(|| writing(&json))?;
    let table = table::table(&traces);
    let text = dir.join("profile.txt");
    fs::write(&text, &table).with_context(|| writing(&text))?;
    Ok(format!("{table}\nas a picture, in https://ui.perfetto.dev: {}", json.display()))
}

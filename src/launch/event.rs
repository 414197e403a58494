//! What ranks tell the launcher, as one JSON object a line on an inherited pipe: how far the run is (rank 0), and why a
//! rank failed (each).

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Deserializer, Serialize};

/// One thing worth telling.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The first step is about to start.
    Start {
        /// Steps of the whole run.
        total_steps: u64,
        /// Steps that a run before this one has done (after a resume).
        done_steps: u64,
    },
    /// An optimizer step is done, or was tried.
    Step {
        /// Steps made.
        step: u64,
        total: u64,
        #[serde(deserialize_with = "number")]
        loss: f64,
        #[serde(deserialize_with = "number")]
        lr: f64,
        #[serde(deserialize_with = "number")]
        images_per_second: f64,
        /// The update was left out, on all ranks; then `step` has not gone up.
        skipped: bool,
    },
    /// Pictures are being made, by the command that does nothing else or in between steps.
    Pictures {
        /// Pictures that are done, of all ranks.
        done: u64,
        total: u64,
        /// The network's call for the pictures in hand, counted from 0, and how many there are; 0 of 0 between them.
        call: u64,
        calls: u64,
    },
    /// A line for the user.
    Message(String),
    CheckpointWritten {
        step: u64,
        path: PathBuf,
    },
    /// This rank fails.
    Failed(Failure),
    /// The run is complete.
    Done,
}

/// Why a rank fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The error and its causes, for the user.
    pub message: String,
    /// The request was wrong (exit status 2).
    pub refused: bool,
    /// The rank whose failure ended this one; none if this is a cause of its own.
    pub because_of: Option<usize>,
}

/// JSON has no infinity and no NaN; both are written as null.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// Where a rank's events go. Cheap to clone; does nothing in a process that the launcher did not start.
#[derive(Clone, Debug, Default)]
pub struct EventSink {
    pipe: Option<Arc<Mutex<File>>>,
}

impl EventSink {
    /// A sink that drops everything.
    pub fn none() -> EventSink {
        EventSink::default()
    }

    pub(super) fn new(pipe: OwnedFd) -> EventSink {
        EventSink { pipe: Some(Arc::new(Mutex::new(pipe.into()))) }
    }

    /// Whether anybody listens.
    pub fn is_heard(&self) -> bool {
        self.pipe.is_some()
    }

    /// Tells the launcher; if that has gone, nobody, since progress is no reason to fail.
    pub fn send(&self, event: &Event) {
        let Some(pipe) = &self.pipe else { return };
        if let Ok(mut line) = serde_json::to_vec(event) {
            line.push(b'\n');
            let _ = pipe.lock().unwrap_or_else(|e| e.into_inner()).write_all(&line);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn events_survive_the_pipe_even_with_infinite_numbers() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let sink = EventSink::new(writer.into());
        let step = |loss| Event::Step { step: 3, total: 9, loss, lr: 5e-6, images_per_second: 1.5, skipped: true };
        let failure = Failure { message: "two\nlines".into(), refused: false, because_of: Some(1) };
        let sent = [Event::Start { total_steps: 9, done_steps: 2 }, step(0.25), Event::Failed(failure), Event::Done];
        sent.iter().for_each(|event| sink.send(event));
        sink.send(&step(f64::INFINITY));
        drop(sink);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let got: Vec<Event> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(got[..4], sent);
        assert!(matches!(got[4], Event::Step { loss, .. } if loss.is_nan()));
        EventSink::none().send(&Event::Done);
    }
}

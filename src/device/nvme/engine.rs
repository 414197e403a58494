//! What moves requests: a ring (`ring.rs`) with two threads that compute checksums, or, where there is no ring, as many
//! threads as the drive is to be given pieces at a time, which do both. Requests are begun in the order in which they
//! are asked for and end in any.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{Builder, JoinHandle};

use anyhow::{Context, Result};

use super::area::Area;
use super::piece::Piece;
use super::request::{Ask, Common, Request, Way};
use super::tuning::Tuning;
use crate::device::{Buffer, Pending, promise};

/// Threads beside a ring: one sums several GB/s.
const SUM_THREADS: usize = 2;

pub(super) struct Engine {
    common: Arc<Common>,
    ring: Option<Ring>,
    todo: Arc<Todo>,
    threads: Vec<JoinHandle<()>>,
}

#[cfg(target_os = "linux")]
use super::ring::Ring;
/// Only Linux has rings.
#[cfg(not(target_os = "linux"))]
enum Ring {}

pub(super) enum Task {
    Move(Piece),
    Landed(Piece, io::Result<()>),
    Sum(Arc<Request>, usize),
}

impl Engine {
    /// Errors: no threads, or no ring although `tuning` has one.
    pub fn start(file: &Arc<File>, tuning: &Tuning, common: Common) -> Result<Self> {
        let todo = Arc::new(Todo::default());
        let count = if tuning.ring { SUM_THREADS } else { tuning.depth };
        let mut engine = Engine { common: Arc::new(common), ring: None, todo, threads: Vec::new() };
        for i in 0..count {
            let (file, todo) = (file.clone(), engine.todo.clone());
            let thread = Builder::new().name(format!("state-file-{i}")).spawn(move || todo.work(&file));
            engine.threads.push(thread.context("starting a thread for the state file")?);
        }
        #[cfg(not(target_os = "linux"))]
        if tuning.ring {
            anyhow::bail!("only Linux has io_uring");
        }
        #[cfg(target_os = "linux")]
        if tuning.ring {
            engine.ring = Some(Ring::start(file.clone(), tuning.depth, engine.todo.clone())?);
        }
        Ok(engine)
    }

    pub fn submit(&self, area: &Arc<Area>, way: Way, at: usize, bytes: usize, buffer: Buffer) -> Pending<Buffer> {
        if bytes == 0 {
            return Pending::ready(buffer);
        }
        let (promise, pending) = promise();
        if let Some((request, pieces)) = Request::begin(area, Ask { way, at, bytes, buffer, promise }, &self.common) {
            match &self.ring {
                #[cfg(target_os = "linux")]
                Some(ring) => ring.submit(pieces),
                #[cfg(not(target_os = "linux"))]
                Some(ring) => match *ring {},
                None => self.todo.add(pieces.into_iter().map(Task::Move)),
            }
            if way == Way::Write {
                self.todo.add((0..request.groups()).map(|group| Task::Sum(request.clone(), group)));
            }
        }
        pending
    }
}

impl Drop for Engine {
    /// Does what has been asked for to its end.
    fn drop(&mut self) {
        // The ring's pieces land in `todo`.
        drop(self.ring.take());
        self.todo.close();
        for thread in self.threads.drain(..) {
            // A panic was told to whoever waited, by the promise that it dropped.
            let _ = thread.join();
        }
    }
}

/// Tasks for whichever thread is free.
#[derive(Default)]
pub(super) struct Todo {
    tasks: Mutex<(VecDeque<Task>, bool)>,
    there: Condvar,
}

impl Todo {
    pub fn add(&self, tasks: impl IntoIterator<Item = Task>) {
        let mut queue = self.tasks.lock().unwrap_or_else(|e| e.into_inner());
        let before = queue.0.len();
        queue.0.extend(tasks);
        match queue.0.len() - before {
            0 => {}
            1 => self.there.notify_one(),
            _ => self.there.notify_all(),
        }
    }

    fn close(&self) {
        self.tasks.lock().unwrap_or_else(|e| e.into_inner()).1 = true;
        self.there.notify_all();
    }

    /// The next task; none when there are no more and will be none.
    fn next(&self) -> Option<Task> {
        let mut queue = self.tasks.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            if let Some(task) = queue.0.pop_front() {
                return Some(task);
            }
            if queue.1 {
                return None;
            }
            queue = self.there.wait(queue).unwrap_or_else(|e| e.into_inner());
        }
    }

    fn work(&self, file: &File) {
        while let Some(task) = self.next() {
            match task {
                Task::Move(piece) => {
                    let (piece, result) = piece.run(file);
                    piece.request.landed(&piece, result);
                }
                Task::Landed(piece, result) => piece.request.landed(&piece, result),
                Task::Sum(request, group) => request.sum_group(group),
            }
        }
    }
}

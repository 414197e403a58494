//! io_uring: one thread keeps the drive busy with as many pieces at a time as the tuning says. It only hands pieces to
//! the kernel and takes the answers; sums are others' work.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::engine::{Task, Todo};
use super::piece::{Piece, Step};
use super::request::Way;

pub(super) struct Ring {
    door: Arc<Door>,
    thread: Option<JoinHandle<()>>,
}

/// Where pieces are handed in. The ring's thread sleeps in the kernel, for the drive and for `bell`.
struct Door {
    waiting: Mutex<Waiting>,
    bell: File,
}

#[derive(Default)]
struct Waiting {
    pieces: Vec<Piece>,
    closed: bool,
}

/// Marks the answer that the bell has rung; all others are indices of pieces.
const BELL: u64 = u64::MAX;

impl Ring {
    /// Errors: a kernel without rings, or one that does not let this process have them.
    pub fn start(file: Arc<File>, depth: usize, landed: Arc<Todo>) -> Result<Self> {
        let ring = IoUring::new((depth as u32 + 1).next_power_of_two()).context("setting up an io_uring")?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).context("asking an io_uring what it can do")?;
        if ![opcode::Read::CODE, opcode::Write::CODE, opcode::PollAdd::CODE].into_iter().all(|c| probe.is_supported(c))
        {
            anyhow::bail!("this kernel's io_uring cannot read and write");
        }
        // SAFETY: the call takes no pointers.
        let bell = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if bell < 0 {
            return Err(io::Error::last_os_error()).context("making an eventfd");
        }
        // SAFETY: the descriptor was just made and is owned here alone.
        let bell = unsafe { File::from_raw_fd(bell) };
        let door = Arc::new(Door { waiting: Mutex::default(), bell });
        let driver = Driver {
            ring,
            file,
            door: door.clone(),
            landed,
            waiting: VecDeque::new(),
            flying: (0..depth).map(|_| None).collect(),
            listening: false,
        };
        let thread = Builder::new().name("state-file-ring".to_string()).spawn(|| driver.run());
        Ok(Ring { door, thread: Some(thread.context("starting a thread for the state file")?) })
    }

    pub fn submit(&self, pieces: Vec<Piece>) {
        self.door.waiting.lock().unwrap_or_else(|e| e.into_inner()).pieces.extend(pieces);
        self.door.ring();
    }
}

impl Drop for Ring {
    /// All pieces have landed after this.
    fn drop(&mut self) {
        self.door.waiting.lock().unwrap_or_else(|e| e.into_inner()).closed = true;
        self.door.ring();
        if let Some(thread) = self.thread.take() {
            // It panics nowhere; if it did, there would be nobody left to tell.
            let _ = thread.join();
        }
    }
}

impl Door {
    fn ring(&self) {
        // Fails only if the counter were full, when it has rung.
        let _ = (&self.bell).write_all(&1u64.to_ne_bytes());
    }
}

struct Driver {
    ring: IoUring,
    file: Arc<File>,
    door: Arc<Door>,
    landed: Arc<Todo>,
    waiting: VecDeque<Piece>,
    /// What the kernel has, by index.
    flying: Vec<Option<Piece>>,
    /// Whether the kernel waits for the bell.
    listening: bool,
}

impl Driver {
    fn run(mut self) {
        loop {
            let closed = {
                let mut waiting = self.door.waiting.lock().unwrap_or_else(|e| e.into_inner());
                self.waiting.extend(waiting.pieces.drain(..));
                waiting.closed
            };
            self.hand_over();
            if closed && self.flying.iter().all(Option::is_none) && self.waiting.is_empty() {
                return;
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // The kernel is short of memory, or has answers that must be taken first.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(e) => return self.give_up(&e),
            }
            self.take_answers();
        }
    }

    /// Gives the kernel what waits, as far as the depth goes.
    fn hand_over(&mut self) {
        let fd = types::Fd(self.file.as_raw_fd());
        let Driver { ring, waiting, flying, .. } = self;
        let mut queue = ring.submission();
        if !self.listening {
            let entry = opcode::PollAdd::new(types::Fd(self.door.bell.as_raw_fd()), libc::POLLIN as u32).build();
            // SAFETY: the bell's descriptor lives as long as the ring's thread; no memory is involved.
            self.listening = unsafe { queue.push(&entry.user_data(BELL)) }.is_ok();
        }
        for (i, place) in flying.iter_mut().enumerate().filter(|(_, place)| place.is_none()) {
            let Some(piece) = waiting.pop_front() else { break };
            let entry = entry(&piece, fd).user_data(i as u64);
            // SAFETY: the piece's memory is its own and lives until its answer is here: `flying` keeps its request.
            if unsafe { queue.push(&entry) }.is_err() {
                // No room: as soon as the kernel has taken what is there.
                waiting.push_front(piece);
                break;
            }
            *place = Some(piece);
        }
    }

    fn take_answers(&mut self) {
        let mut landed = Vec::new();
        for answer in self.ring.completion() {
            if answer.user_data() == BELL {
                self.listening = false;
                // Empties the counter; there is something in it, so this does not block.
                let _ = (&self.door.bell).read(&mut [0; 8]);
                continue;
            }
            let Some(piece) = self.flying.get_mut(answer.user_data() as usize).and_then(Option::take) else { continue };
            let result = match answer.result() {
                error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
                moved => Ok(moved as usize),
            };
            match piece.advance(result) {
                Step::More(piece) => self.waiting.push_front(piece),
                Step::Landed(piece, result) => landed.push(Task::Landed(piece, result)),
            }
        }
        self.landed.add(landed);
    }

    /// The kernel refuses to talk. What it has, it may still write to, so that memory is never freed.
    fn give_up(mut self, why: &io::Error) {
        for piece in self.flying.drain(..).flatten() {
            piece.request.give_up(why);
            std::mem::forget(piece);
        }
        loop {
            let (pieces, closed) = {
                let mut waiting = self.door.waiting.lock().unwrap_or_else(|e| e.into_inner());
                (std::mem::take(&mut waiting.pieces), waiting.closed)
            };
            let fail = |piece| Task::Landed(piece, Err(io::Error::new(why.kind(), why.to_string())));
            self.landed.add(self.waiting.drain(..).chain(pieces).map(fail));
            if closed {
                return;
            }
            // Blocks until somebody asks for something, or the end.
            let _ = (&self.door.bell).read(&mut [0; 8]);
        }
    }
}

fn entry(piece: &Piece, fd: types::Fd) -> squeue::Entry {
    let len = piece.len as u32;
    match piece.request.way {
        Way::Read => opcode::Read::new(fd, piece.memory, len).offset(piece.at).build(),
        Way::Write => opcode::Write::new(fd, piece.memory, len).offset(piece.at).build(),
    }
}

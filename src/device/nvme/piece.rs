//! A piece of a request: what goes to the drive by itself. Knows where in the file and in memory, nothing of blocks.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::request::{Request, Way};
use crate::device::buffer::PAGE;

pub(super) struct Piece {
    pub request: Arc<Request>,
    /// The request's group that it belongs to.
    pub group: usize,
    /// Where in the file.
    pub at: u64,
    /// In memory that the request owns; this piece's alone until it has landed.
    pub memory: *mut u8,
    /// What is left to move.
    pub len: usize,
}

// SAFETY: `memory` points into memory that `request` owns, at a range that no other piece has.
unsafe impl Send for Piece {}

/// What is to be done with a piece after the drive has answered.
pub(super) enum Step {
    /// It goes on from where it is now.
    More(Piece),
    Landed(Piece, io::Result<()>),
}

impl Piece {
    /// The drive has moved so many bytes, or has not. Less than everything is no error: the rest is asked for anew, from
    /// a whole page on as direct I/O wants it. But nothing at all is: reading, it means that the file ends there.
    pub fn advance(mut self, answer: io::Result<usize>) -> Step {
        let moved = match answer {
            Ok(moved) if moved >= self.len => return Step::Landed(self, Ok(())),
            Ok(moved) => moved & !(PAGE - 1),
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => return Step::More(self),
            Err(e) => return Step::Landed(self, Err(e)),
        };
        if moved == 0 {
            let nothing = match self.request.way {
                Way::Read => ErrorKind::UnexpectedEof,
                Way::Write => ErrorKind::WriteZero,
            };
            return Step::Landed(self, Err(nothing.into()));
        }
        // SAFETY: less than what is left of the range.
        self.memory = unsafe { self.memory.add(moved) };
        self.at += moved as u64;
        self.len -= moved;
        Step::More(self)
    }

    /// Moves all of it, on this thread.
    pub fn run(mut self, file: &File) -> (Piece, io::Result<()>) {
        loop {
            let answer = match self.request.way {
                // SAFETY: nothing else uses the range of a piece that has not landed.
                Way::Read => file.read_at(unsafe { std::slice::from_raw_parts_mut(self.memory, self.len) }, self.at),
                // SAFETY: nobody changes what is being written.
                Way::Write => file.write_at(unsafe { std::slice::from_raw_parts(self.memory, self.len) }, self.at),
            };
            match self.advance(answer) {
                Step::More(piece) => self = piece,
                Step::Landed(piece, result) => return (piece, result),
            }
        }
    }
}

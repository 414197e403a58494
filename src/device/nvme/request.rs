//! One read or write of an area, cut into pieces of the tuned size; its blocks' checksums; and its end, when all of that
//! is done. Whoever moves the pieces (`engine.rs`, `ring.rs`) knows nothing of areas and sums.

use std::hash::Hasher;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Error, Result, bail};
use candle_core::DType;
use twox_hash::XxHash3_64;

use super::area::{Area, STATE_BLOCK};
use super::piece::Piece;
use super::traffic::Meter;
use crate::device::buffer::PAGE;
use crate::device::trace::{self, Row};
use crate::device::{Buffer, Delays, Promise};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Read,
    Write,
}

/// What is asked for: the first `bytes` of `buffer`, from or to `at` of an area.
pub(super) struct Ask {
    pub way: Way,
    pub at: usize,
    pub bytes: usize,
    pub buffer: Buffer,
    pub promise: Promise<Buffer>,
}

/// What all requests of an engine share.
pub(super) struct Common {
    /// The size of the pieces: a power of two, of a page at least.
    pub piece_bytes: usize,
    pub meter: Arc<Meter>,
    pub delays: Option<Arc<Delays>>,
}

pub(super) struct Request {
    pub way: Way,
    area: Arc<Area>,
    common: Arc<Common>,
    begun: Instant,
    first_block: usize,
    bytes: usize,
    /// The travelling buffer's memory. A piece uses its own range of it until it has landed; sums read what has landed,
    /// or what is only read anyway.
    memory: *mut u8,
    /// What is not a whole page at the end goes through memory of our own, since the buffer may end before the page does,
    /// or hold something else there. For a read it holds the rest of the last block, which is needed for its sum.
    tail: Option<Buffer>,
    /// Bytes with checksums: those asked for, and for a read the rest of the last block.
    summed: usize,
    /// Pieces and blocks meet in groups: of one block with all its pieces, or one piece with all its blocks.
    group_bytes: usize,
    /// Reads: pieces of each group that have not landed.
    landing: Vec<AtomicUsize>,
    /// What the blocks must sum up to (reads), or do (writes).
    sums: Vec<AtomicU64>,
    /// What is not done: groups, and a write's pieces.
    left: AtomicUsize,
    failure: Mutex<Option<Error>>,
    end: Mutex<Option<(Buffer, Promise<Buffer>)>>,
}

// SAFETY: `memory` points into the buffer that `end` owns and is used as is said there.
unsafe impl Send for Request {}
// SAFETY: as above; all else that changes is atomic or behind a lock.
unsafe impl Sync for Request {}

impl Request {
    /// A request with its pieces; none if something is wrong with it, which its waiter has then been told.
    pub fn begin(area: &Arc<Area>, ask: Ask, common: &Arc<Common>) -> Option<(Arc<Request>, Vec<Piece>)> {
        match Self::check(area, &ask) {
            Err(error) => {
                ask.promise.keep(Err(error));
                None
            }
            Ok((summed, tail, sums)) => Some(Self::cut(area, ask, common, summed, tail, sums)),
        }
    }

    /// What is summed, the memory for the end, and the sums that a read must find. Errors are a caller's mistake, or
    /// that of a request before this one.
    fn check(area: &Area, ask: &Ask) -> Result<(usize, Option<Buffer>, Vec<AtomicU64>)> {
        let Ask { way, at, bytes, buffer, .. } = ask;
        let (at, bytes, end) = (*at, *bytes, at.saturating_add(*bytes));
        if !at.is_multiple_of(STATE_BLOCK) || end > area.bytes || bytes > buffer.bytes().len() {
            bail!("{bytes} bytes at {at}, for a buffer of {}, of a region of {}", buffer.bytes().len(), area.bytes);
        }
        let summed = end.next_multiple_of(STATE_BLOCK).min(area.bytes) - at;
        if *way == Way::Write && summed > bytes {
            bail!("a write of {bytes} bytes at {at} ends within a block of a region of {}", area.bytes);
        }
        let whole = bytes & !(PAGE - 1);
        if whole > 0 && !(buffer.bytes().as_ptr() as usize).is_multiple_of(PAGE) {
            bail!("a buffer of {bytes} bytes that does not begin at a page");
        }
        let mut tail = None;
        if summed > whole {
            let mut memory = Buffer::unbudgeted(DType::U8, (summed - whole).next_multiple_of(PAGE))?;
            if *way == Way::Write {
                memory.bytes_mut()[..bytes - whole].copy_from_slice(&buffer.bytes()[whole..bytes]);
            }
            tail = Some(memory);
        }
        let blocks = blocks(at, summed);
        let sums = match way {
            Way::Read => area.begin_read(blocks)?.into_iter().map(AtomicU64::new).collect(),
            Way::Write => {
                area.begin_write(blocks.clone())?;
                blocks.map(|_| AtomicU64::new(0)).collect()
            }
        };
        Ok((summed, tail, sums))
    }

    fn cut(
        area: &Arc<Area>,
        ask: Ask,
        common: &Arc<Common>,
        summed: usize,
        mut tail: Option<Buffer>,
        sums: Vec<AtomicU64>,
    ) -> (Arc<Request>, Vec<Piece>) {
        let Ask { way, at, bytes, mut buffer, promise } = ask;
        let memory = buffer.bytes_mut().as_mut_ptr();
        let whole = bytes & !(PAGE - 1);
        // Where in the request, where in memory, how much.
        let mut cuts: Vec<(usize, *mut u8, usize)> = (0..whole)
            .step_by(common.piece_bytes)
            // SAFETY: `from` is within the buffer.
            .map(|from| (from, unsafe { memory.add(from) }, common.piece_bytes.min(whole - from)))
            .collect();
        if let Some(tail) = &mut tail {
            let tail = tail.bytes_mut();
            cuts.push((whole, tail.as_mut_ptr(), tail.len()));
        }
        let group_bytes = common.piece_bytes.max(STATE_BLOCK);
        let groups = summed.div_ceil(group_bytes);
        let landing: Vec<AtomicUsize> = (0..groups).map(|_| AtomicUsize::new(0)).collect();
        for (from, ..) in &cuts {
            landing[from / group_bytes].fetch_add(1, Relaxed);
        }
        let left = AtomicUsize::new(groups + if way == Way::Write { cuts.len() } else { 0 });
        let request = Arc::new(Request {
            way,
            area: area.clone(),
            common: common.clone(),
            begun: Instant::now(),
            first_block: at / STATE_BLOCK,
            bytes,
            memory,
            tail,
            summed,
            group_bytes,
            landing,
            sums,
            left,
            failure: Mutex::default(),
            end: Mutex::new(Some((buffer, promise))),
        });
        common.meter.begin();
        let start = area.start + at as u64;
        let piece = |(from, memory, len): (usize, *mut u8, usize)| Piece {
            request: request.clone(),
            group: from / group_bytes,
            at: start + from as u64,
            memory,
            len,
        };
        let pieces = cuts.into_iter().map(piece).collect();
        (request, pieces)
    }

    pub fn groups(&self) -> usize {
        self.landing.len()
    }

    /// A piece has come to its end.
    pub fn landed(&self, piece: &Piece, result: io::Result<()>) {
        if let Err(error) = result {
            let way = if self.way == Way::Read { "reading" } else { "writing" };
            self.fail(self.area.failure(way, piece.at, &error));
        }
        match self.way {
            Way::Write => self.one_done(),
            Way::Read => {
                if self.landing[piece.group].fetch_sub(1, AcqRel) == 1 {
                    self.sum_group(piece.group);
                }
            }
        }
    }

    /// Sums the blocks of a group, all of whose bytes are there.
    pub fn sum_group(&self, group: usize) {
        let end = ((group + 1) * self.group_bytes).min(self.summed);
        let failed = self.way == Way::Read && self.failure.lock().unwrap_or_else(|e| e.into_inner()).is_some();
        for from in (group * self.group_bytes..end).step_by(STATE_BLOCK).take_while(|_| !failed) {
            let sum = self.sum(from..(from + STATE_BLOCK).min(end));
            let known = &self.sums[from / STATE_BLOCK];
            match self.way {
                Way::Write => known.store(sum, Relaxed),
                Way::Read if known.load(Relaxed) == sum => {}
                Way::Read => self.fail(self.area.mismatch(self.first_block + from / STATE_BLOCK, known.load(Relaxed))),
            }
        }
        self.one_done();
    }

    fn sum(&self, range: Range<usize>) -> u64 {
        // A write's buffer holds all of it; a read's end lies in the tail.
        let whole = if self.way == Way::Write { self.bytes } else { self.bytes & !(PAGE - 1) };
        let here = range.start..range.end.min(whole);
        // SAFETY: within the buffer; a read's pieces have landed there, and nobody changes what is being written.
        let here = unsafe { std::slice::from_raw_parts(self.memory.add(here.start), here.len()) };
        match &self.tail {
            Some(tail) if range.end > whole => {
                let mut sum = XxHash3_64::new();
                sum.write(here);
                sum.write(&tail.bytes()[..range.end - whole]);
                sum.finish()
            }
            _ => XxHash3_64::oneshot(here),
        }
    }

    /// The first failure is the one that is told.
    fn fail(&self, error: Error) {
        self.failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
    }

    fn one_done(&self) {
        if self.left.fetch_sub(1, AcqRel) == 1 {
            if let Some(delays) = &self.common.delays {
                delays.dawdle();
            }
            self.finish();
        }
    }

    /// Tells the waiter. No piece is under way any more.
    fn finish(&self) {
        let Some((mut buffer, promise)) = self.end.lock().unwrap_or_else(|e| e.into_inner()).take() else { return };
        let failure = self.failure.lock().unwrap_or_else(|e| e.into_inner()).take();
        let moved = (self.bytes & !(PAGE - 1)) as u64 + self.tail.as_ref().map_or(0, |tail| tail.len() as u64);
        let way = if self.way == Way::Read { "read" } else { "write" };
        let name = || format!("{way} {}", self.area.what);
        trace::happened(Row::Disk, "drive", name, self.begun, moved as usize);
        match self.way {
            Way::Read => {
                let whole = self.bytes & !(PAGE - 1);
                if let Some(tail) = &self.tail {
                    buffer.bytes_mut()[whole..self.bytes].copy_from_slice(&tail.bytes()[..self.bytes - whole]);
                }
                self.common.meter.end(moved, 0);
            }
            Way::Write => {
                self.area.end_write(self.first_block, failure.is_none().then_some(&self.sums), self.sums.len());
                self.common.meter.end(0, moved);
            }
        }
        promise.keep(failure.map_or(Ok(buffer), Err));
    }

    /// Tells the waiter that it will never be known when the drive is done with the memory, which must not be freed:
    /// the caller keeps this request for ever.
    pub fn give_up(&self, why: &io::Error) {
        let Some((buffer, promise)) = self.end.lock().unwrap_or_else(|e| e.into_inner()).take() else { return };
        std::mem::forget(buffer);
        let error = self.area.failure("asking the drive", self.area.start, why);
        if self.way == Way::Write {
            self.area.end_write(self.first_block, None, self.sums.len());
        }
        self.common.meter.end(0, 0);
        promise.keep(Err(error));
    }
}

/// The blocks of an area that `bytes` from `at` touch.
fn blocks(at: usize, bytes: usize) -> Range<usize> {
    at / STATE_BLOCK..(at + bytes).div_ceil(STATE_BLOCK)
}

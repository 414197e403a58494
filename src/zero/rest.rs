//! Values at rest: in an arena's memory, or in the run's file on a drive.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result};
use candle_core::DType;

use super::Tiers;
use super::param_store::locked;
use super::tiers::States;
use crate::device::bulk::{cast, cast_range, round, widen};
use crate::device::{Arena, Buffer, Delays, Pending, Place, Queue, Region};

/// Pieces in which values on a drive are read and written; parts of them begin at multiples of this many elements.
pub const PIECE: usize = 1 << 20;
/// Pieces that the optimizer reads ahead of the one it computes, and pieces that may still be being written behind it.
pub const AHEAD: usize = 2;
pub const BEHIND: usize = 2;
/// Its pieces in memory at a time.
pub const IN_FLIGHT: usize = AHEAD + 1 + BEHIND;

/// A flat run of values of one dtype, in one tier.
pub struct Rest {
    dtype: DType,
    len: usize,
    at: At,
}

enum At {
    Memory(Arc<Mutex<Buffer>>),
    File(Region),
}

/// The optimizer's side: where it computes, and memory there for pieces that rest elsewhere.
pub struct Staging {
    pub arena: Arena,
    /// Between the host's memory and an accelerator's, in both directions at once.
    copies: Option<Arc<Copies>>,
}

/// The ways between the host's memory and an accelerator's, for the optimizer's pieces.
pub struct Copies {
    reads: Queue,
    writes: Queue,
}

impl Copies {
    pub fn new(delays: Option<Arc<Delays>>) -> Result<Self> {
        Ok(Copies { reads: Queue::late("pieces in", delays.clone())?, writes: Queue::late("pieces out", delays)? })
    }
}

impl Staging {
    pub fn new(arena: Arena, copies: Option<Arc<Copies>>) -> Self {
        Staging { arena, copies }
    }

    /// The host's memory without a limit, nothing going on beside: for who looks at one thing after another.
    pub fn on_host(name: &str) -> Self {
        Staging { arena: Arena::new(name, None), copies: None }
    }

    /// Whether what is in `memory` must be copied to be on this side.
    pub(super) fn is_across(&self, memory: &Buffer) -> bool {
        memory.accelerator().is_some() != self.arena.accelerator().is_some()
    }

    /// A copy towards this side.
    pub(super) fn reading(&self, work: impl FnOnce() -> Result<Buffer> + Send + 'static) -> Pending<Buffer> {
        match &self.copies {
            Some(copies) => copies.reads.submit(work),
            None => Pending::done(work()),
        }
    }

    /// A copy back.
    pub(super) fn writing(&self, work: impl FnOnce() -> Result<Buffer> + Send + 'static) -> Pending<Buffer> {
        match &self.copies {
            Some(copies) => copies.writes.submit(work),
            None => Pending::done(work()),
        }
    }
}

/// A piece on its way from where it rests; nothing has to travel where that is memory on the optimizer's side.
pub struct Coming(Option<Pending<Buffer>>);

/// A piece in memory for a moment.
pub struct Piece(Option<Buffer>);

impl Rest {
    /// `len` zeros (in a file: nothing that could be read yet) in `place`; `arena` chooses among the tier's.
    pub fn allocate(
        tiers: &Tiers,
        place: Place,
        arena: impl Fn(&States) -> &Arena,
        dtype: DType,
        len: usize,
        what: &str,
    ) -> Result<Self> {
        let at = match place {
            Place::Device | Place::Host => {
                At::Memory(Arc::new(Mutex::new(arena(tiers.states(place)).alloc(dtype, len, what)?)))
            }
            Place::Nvme => At::File(tiers.drive()?.allocate(len * dtype.size_in_bytes(), what)?),
        };
        Ok(Rest { dtype, len, at })
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memory, where it rests in memory.
    pub fn memory(&self) -> Option<MutexGuard<'_, Buffer>> {
        match &self.at {
            At::Memory(memory) => Some(locked(memory)),
            At::File(_) => None,
        }
    }

    fn bytes(&self, elements: usize) -> usize {
        elements * self.dtype.size_in_bytes()
    }

    /// Whether it rests in memory of the other side.
    fn is_across(&self, side: &Staging) -> bool {
        self.memory().is_some_and(|memory| side.is_across(&memory))
    }

    /// Bytes that so many elements take in memory beside where they rest, for an optimizer on that `side`.
    pub fn staged_bytes(&self, elements: usize, side: &Staging) -> usize {
        let is_staged = matches!(self.at, At::File(_)) || self.is_across(side);
        if is_staged { self.bytes(elements) } else { 0 }
    }

    /// Begins to bring elements `range`, which starts at a multiple of [`PIECE`], to the optimizer's side.
    pub fn begin(&self, range: Range<usize>, side: &Staging, what: &str) -> Result<Coming> {
        let take = || side.arena.alloc_dirty(self.dtype, range.len(), what);
        Ok(match &self.at {
            At::File(region) if side.arena.accelerator().is_none() => {
                Coming(Some(region.read(self.bytes(range.start), self.bytes(range.len()), take()?)))
            }
            At::File(region) => {
                // Through the host's memory.
                let (from, bytes, len, mut near) =
                    (self.bytes(range.start), self.bytes(range.len()), range.len(), take()?);
                let coming = region.read(from, bytes, Buffer::unbudgeted(self.dtype, len)?);
                Coming(Some(side.reading(move || {
                    cast(&coming.wait_for("drive")?, &mut near)?;
                    Ok(near)
                })))
            }
            At::Memory(memory) if self.is_across(side) => {
                let (memory, mut near) = (memory.clone(), take()?);
                Coming(Some(side.reading(move || {
                    let len = near.len();
                    cast_range(&locked(&memory), range, &mut near, 0..len)?;
                    Ok(near)
                })))
            }
            At::Memory(_) => Coming(None),
        })
    }

    /// A place on the optimizer's side for elements `range` that are about to be written whole.
    pub fn blank(&self, range: Range<usize>, side: &Staging, what: &str) -> Result<Coming> {
        if self.staged_bytes(range.len(), side) == 0 {
            return Ok(Coming(None));
        }
        Ok(Coming(Some(Pending::ready(side.arena.alloc_dirty(self.dtype, range.len(), what)?))))
    }

    /// Hands `change` the memory that holds elements `range` now, and where in it they are.
    pub fn with<R>(
        &self,
        range: Range<usize>,
        piece: &mut Piece,
        change: impl FnOnce(&mut Buffer, Range<usize>) -> R,
    ) -> R {
        if let Some(buffer) = &mut piece.0 {
            return change(buffer, 0..range.len());
        }
        match &self.at {
            At::Memory(memory) => change(&mut locked(memory), range),
            At::File(_) => unreachable!("a piece of a file is in memory before it is changed"),
        }
    }

    /// Begins to write a changed piece back.
    pub fn end(&self, range: Range<usize>, piece: Piece, side: &Staging) -> Option<Pending<Buffer>> {
        let buffer = piece.0?;
        let (at, bytes) = (self.bytes(range.start), self.bytes(range.len()));
        Some(match &self.at {
            At::File(region) if buffer.accelerator().is_none() => region.write(at, bytes, buffer),
            At::File(region) => {
                let region = region.clone();
                side.writing(move || {
                    let mut here = Buffer::unbudgeted(buffer.dtype(), buffer.len())?;
                    cast(&buffer, &mut here)?;
                    region.write(at, bytes, here).wait_for("drive")
                })
            }
            At::Memory(memory) => {
                let memory = memory.clone();
                side.writing(move || {
                    cast_range(&buffer, 0..range.len(), &mut locked(&memory), range)?;
                    Ok(buffer)
                })
            }
        })
    }

    /// All of it into a buffer of its dtype and length.
    pub fn read_all(&self, mut into: Buffer) -> Result<Buffer> {
        match &self.at {
            At::Memory(_) => {
                if let Some(memory) = self.memory() {
                    cast(&memory, &mut into)?;
                }
                Ok(into)
            }
            At::File(region) if into.accelerator().is_none() => {
                region.read(0, self.bytes(self.len), into).wait_for("drive")
            }
            At::File(region) => {
                self.read_through_host(region, &mut into)?;
                Ok(into)
            }
        }
    }

    /// From the drive to an accelerator's memory, piece by piece, [`AHEAD`] of them on their way while one is copied.
    fn read_through_host(&self, region: &Region, into: &mut Buffer) -> Result<()> {
        let begin = |piece: Range<usize>| -> Result<_> {
            let buffer = Buffer::unbudgeted(self.dtype, piece.len())?;
            Ok((region.read(self.bytes(piece.start), self.bytes(piece.len()), buffer), piece))
        };
        let mut todo = pieces(self.len);
        let mut coming = VecDeque::new();
        loop {
            while coming.len() <= AHEAD
                && let Some(piece) = todo.next()
            {
                coming.push_back(begin(piece)?);
            }
            let Some((reading, piece)) = coming.pop_front() else { return Ok(()) };
            let here = reading.wait_for("drive")?;
            cast_range(&here, 0..here.len(), into, piece)?;
        }
    }

    /// Elements `range` as fp32.
    pub fn read(&self, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        if let Some(memory) = self.memory() {
            return widen(&memory, range, into);
        }
        let At::File(region) = &self.at else { return Ok(()) };
        for piece in pieces(self.len).filter(|p| p.start < range.end && p.end > range.start) {
            let buffer = Buffer::unbudgeted(self.dtype, piece.len())?;
            let buffer = region.read(self.bytes(piece.start), self.bytes(piece.len()), buffer).wait()?;
            let (from, to) = (piece.start.max(range.start), piece.end.min(range.end));
            let part = &mut into[from - range.start..to - range.start];
            widen(&buffer, from - piece.start..to - piece.start, part)?;
        }
        Ok(())
    }

    /// Writes all of it, piece by piece; `fill` makes elements from a place on as fp32, zeros where nothing is put.
    pub fn write(&self, mut fill: impl FnMut(usize, &mut [f32]) -> Result<()>) -> Result<()> {
        let mut values = vec![0f32; PIECE.min(self.len)];
        for piece in pieces(self.len) {
            let values = &mut values[..piece.len()];
            values.fill(0.0);
            fill(piece.start, values)?;
            match (&self.at, self.memory()) {
                (At::File(region), _) => {
                    let mut buffer = Buffer::unbudgeted(self.dtype, piece.len())?;
                    round(values, &mut buffer, 0..piece.len())?;
                    region.write(self.bytes(piece.start), self.bytes(piece.len()), buffer).wait()?;
                }
                (_, Some(mut memory)) => round(values, &mut memory, piece)?,
                _ => {}
            }
        }
        Ok(())
    }
}

impl From<Pending<Buffer>> for Coming {
    fn from(pending: Pending<Buffer>) -> Self {
        Coming(Some(pending))
    }
}

impl Piece {
    /// Its own memory, if it has been brought.
    pub fn buffer(&self) -> Option<&Buffer> {
        self.0.as_ref()
    }

    pub(super) fn into_buffer(self) -> Option<Buffer> {
        self.0
    }

    pub fn buffer_mut(&mut self) -> Option<&mut Buffer> {
        self.0.as_mut()
    }
}

impl Coming {
    pub fn nothing() -> Self {
        Coming(None)
    }

    pub fn wait(self) -> Result<Piece> {
        Ok(Piece(
            self.0.map(|coming| coming.wait_for("piece")).transpose().context("bringing what the optimizer needs")?,
        ))
    }
}

/// The pieces of a run of `len` values.
pub fn pieces(len: usize) -> impl Iterator<Item = Range<usize>> {
    pieces_of(PIECE, len)
}

/// Its pieces of at most `piece` values.
pub fn pieces_of(piece: usize, len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len.div_ceil(piece)).map(move |k| k * piece..((k + 1) * piece).min(len))
}

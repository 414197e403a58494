//! Values at rest: in an arena's memory, or in the run's file on a drive.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use anyhow::{Context, Result};
use candle_core::DType;
use half::{bf16, f16};

use super::Tiers;
use super::tiers::States;
use crate::device::threads::for_parts;
use crate::device::{Arena, Buffer, Element, Pending, Place, Region};

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
    Memory(Mutex<Buffer>),
    File(Region),
}

/// A piece on its way from where it rests; nothing has to travel where that is memory.
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
            Place::Device | Place::Host => At::Memory(Mutex::new(arena(tiers.states(place)).alloc(dtype, len, what)?)),
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
            At::Memory(memory) => Some(memory.lock().unwrap_or_else(|e| e.into_inner())),
            At::File(_) => None,
        }
    }

    fn bytes(&self, elements: usize) -> usize {
        elements * self.dtype.size_in_bytes()
    }

    /// Bytes that so many elements take in memory beside where they rest.
    pub fn staged_bytes(&self, elements: usize) -> usize {
        match &self.at {
            At::Memory(_) => 0,
            At::File(_) => self.bytes(elements),
        }
    }

    /// Begins to bring elements `range`, which starts at a multiple of [`PIECE`], near the optimizer.
    pub fn begin(&self, range: Range<usize>, staging: &Arena, what: &str) -> Result<Coming> {
        let At::File(region) = &self.at else { return Ok(Coming(None)) };
        let buffer = staging.alloc_dirty(self.dtype, range.len(), what)?;
        Ok(Coming(Some(region.read(self.bytes(range.start), self.bytes(range.len()), buffer))))
    }

    /// A place for elements `range` that are about to be written whole.
    pub fn blank(&self, range: Range<usize>, staging: &Arena, what: &str) -> Result<Coming> {
        let At::File(_) = &self.at else { return Ok(Coming(None)) };
        Ok(Coming(Some(Pending::ready(staging.alloc_dirty(self.dtype, range.len(), what)?))))
    }

    /// Hands `change` the memory that holds elements `range` now, and where in it they are.
    pub fn with<R>(
        &self,
        range: Range<usize>,
        piece: &mut Piece,
        change: impl FnOnce(&mut Buffer, Range<usize>) -> R,
    ) -> R {
        match (&mut piece.0, self.memory()) {
            (_, Some(mut memory)) => change(&mut memory, range),
            (Some(buffer), None) => change(buffer, 0..range.len()),
            (None, None) => unreachable!("a piece of a file is in memory before it is changed"),
        }
    }

    /// Begins to write a changed piece back.
    pub fn end(&self, range: Range<usize>, piece: Piece) -> Option<Pending<Buffer>> {
        let (At::File(region), Some(buffer)) = (&self.at, piece.0) else { return None };
        Some(region.write(self.bytes(range.start), self.bytes(range.len()), buffer))
    }

    /// All of it into a buffer of its dtype and length.
    pub fn read_all(&self, mut into: Buffer) -> Result<Buffer> {
        match &self.at {
            At::Memory(_) => {
                if let Some(memory) = self.memory() {
                    cast(&memory, &mut into);
                }
                Ok(into)
            }
            At::File(region) => region.read(0, self.bytes(self.len), into).wait_for("drive"),
        }
    }

    /// Elements `range` as fp32.
    pub fn read(&self, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        if let Some(memory) = self.memory() {
            widen(&memory, range, into);
            return Ok(());
        }
        let At::File(region) = &self.at else { return Ok(()) };
        for piece in pieces(self.len).filter(|p| p.start < range.end && p.end > range.start) {
            let buffer = Buffer::unbudgeted(self.dtype, piece.len())?;
            let buffer = region.read(self.bytes(piece.start), self.bytes(piece.len()), buffer).wait()?;
            let (from, to) = (piece.start.max(range.start), piece.end.min(range.end));
            let part = &mut into[from - range.start..to - range.start];
            widen(&buffer, from - piece.start..to - piece.start, part);
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
                    round(values, &mut buffer, 0..piece.len());
                    region.write(self.bytes(piece.start), self.bytes(piece.len()), buffer).wait()?;
                }
                (_, Some(mut memory)) => round(values, &mut memory, piece),
                _ => {}
            }
        }
        Ok(())
    }
}

impl Coming {
    pub fn nothing() -> Self {
        Coming(None)
    }

    pub fn wait(self) -> Result<Piece> {
        Ok(Piece(self.0.map(|coming| coming.wait_for("drive")).transpose().context("reading what rests on the drive")?))
    }
}

/// The pieces of a run of `len` values.
pub fn pieces(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len.div_ceil(PIECE)).map(move |k| k * PIECE..((k + 1) * PIECE).min(len))
}

/// Elements `range` of `from` as fp32.
pub fn widen(from: &Buffer, range: Range<usize>, into: &mut [f32]) {
    match from.dtype() {
        DType::F32 => convert(&from.as_slice::<f32>()[range], into),
        DType::BF16 => convert(&from.as_slice::<bf16>()[range], into),
        _ => convert(&from.as_slice::<f16>()[range], into),
    }
}

/// `values`, rounded to nearest, as elements `range` of `into`.
pub fn round(values: &[f32], into: &mut Buffer, range: Range<usize>) {
    match into.dtype() {
        DType::F32 => convert(values, &mut into.as_mut_slice::<f32>()[range]),
        DType::BF16 => convert(values, &mut into.as_mut_slice::<bf16>()[range]),
        _ => convert(values, &mut into.as_mut_slice::<f16>()[range]),
    }
}

/// A whole buffer into another one of the same length and any dtype.
pub fn cast(from: &Buffer, into: &mut Buffer) {
    match from.dtype() {
        DType::F32 => round(from.as_slice(), into, 0..from.len()),
        DType::BF16 => cast_half::<bf16>(from.as_slice(), into),
        _ => cast_half::<f16>(from.as_slice(), into),
    }
}

fn cast_half<A: Element>(from: &[A], into: &mut Buffer) {
    match into.dtype() {
        DType::F32 => convert(from, into.as_mut_slice::<f32>()),
        DType::BF16 => convert(from, into.as_mut_slice::<bf16>()),
        _ => convert(from, into.as_mut_slice::<f16>()),
    }
}

fn convert<A: Element, B: Element>(from: &[A], into: &mut [B]) {
    const PART: usize = 1 << 18;
    assert_eq!(from.len(), into.len(), "conversion between different lengths");
    let cost = from.len();
    let parts = into.chunks_mut(PART).zip(from.chunks(PART)).collect();
    for_parts(parts, cost, |_, (into, from): (&mut [B], &[A])| {
        into.iter_mut().zip(from).for_each(|(to, from)| *to = B::from_f32(from.to_f32()));
    });
}

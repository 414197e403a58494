//! What of a segment's parameters this rank's optimizer changes, piece by piece, wherever it rests.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::DType;

use super::ParamStore;
use super::param_store::{At, Stored, read_range};
use super::rest::{Coming, Piece, Staging};
use crate::comm::{Slice, SliceMut};
use crate::device::bulk::{cast_range, widen};
use crate::device::{Buffer, Pending};

/// The weights of a piece: what the optimizer computes with, and the rounded copy that ops read if that is another one.
pub struct Weights<'a> {
    pub values: &'a mut Buffer,
    pub at: Range<usize>,
    pub rounded: Option<(&'a mut Buffer, Range<usize>)>,
}

/// A segment's parameters as its optimizer sees them. Cheap to clone; used by one thread at a time.
#[derive(Clone)]
pub struct OwnedWeights {
    stored: Arc<Stored>,
    /// In the bucket.
    range: Range<usize>,
}

/// A piece of it on its way.
pub struct OwnedComing {
    weights: Coming,
    master: Option<Coming>,
}

/// A piece of it in memory for a moment.
pub struct OwnedPiece {
    weights: Piece,
    master: Option<Piece>,
}

impl ParamStore {
    pub fn owned(&self, i: usize) -> OwnedWeights {
        let range = self.optimizer_range(i);
        OwnedWeights { stored: self.stored[i].clone(), range }
    }

    /// Elements `range` of bucket `i`, all of them this rank's, as the optimizer has them. Waits for its work.
    pub fn read_master(&self, i: usize, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        self.settle(i)?;
        let owned = self.optimizer_range(i);
        let own = range.start - owned.start..range.end - owned.start;
        let stored = &self.stored[i];
        match (&stored.master, &stored.at) {
            (Some(master), _) => master.read(own, into),
            (None, At::Rest(rest)) => rest.read(own, into),
            (None, At::Slot) => stored.slot.update(|buffer| widen(buffer, range, into))?,
            (None, At::Files(source)) => read_range(stored.slot.layout(), range.start, into, &**source),
        }
    }

    /// The fp32 weights of segment `i`, whole, on every rank, in the host's memory: what is exported. A collective.
    pub fn whole_master(&self, i: usize) -> Result<Buffer> {
        let (range, arena) = (self.shard(i), &self.tiers.host.parameters);
        let mut mine = arena.alloc_dirty(DType::F32, range.len(), self.name(i))?;
        self.read_master(i, range, mine.as_mut_slice()).with_context(|| format!("reading {}", self.name(i)))?;
        if self.ranks.alone() {
            return Ok(mine);
        }
        let mut whole = arena.alloc_dirty(DType::F32, self.padded_len(i), self.name(i))?;
        self.ranks.comm.all_gather(Slice::F32(mine.as_slice()), SliceMut::F32(whole.as_mut_slice()))?;
        Ok(whole)
    }
}

impl OwnedWeights {
    pub fn name(&self) -> &str {
        self.stored.slot.name()
    }

    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Bytes that a piece of so many elements takes in memory beside where it rests, for an optimizer on that `side`.
    pub fn staged_bytes(&self, elements: usize, side: &Staging) -> usize {
        let stored = &self.stored;
        let rest = match &stored.at {
            At::Rest(rest) => rest.staged_bytes(elements, side),
            At::Slot if self.slot_is_across(side) => {
                elements * stored.slot.get().map_or(0, |b| b.dtype().size_in_bytes())
            }
            At::Slot | At::Files(_) => 0,
        };
        rest + stored.master.as_ref().map_or(0, |master| master.staged_bytes(elements, side))
    }

    fn slot_is_across(&self, side: &Staging) -> bool {
        matches!(self.stored.at, At::Slot) && self.stored.slot.get().is_ok_and(|buffer| side.is_across(&buffer))
    }

    /// Begins to bring elements `range`, counted from the first owned one, which starts at a multiple of
    /// [`super::PIECE`], to the optimizer's side.
    pub fn begin(&self, range: Range<usize>, side: &Staging) -> Result<OwnedComing> {
        let stored = &self.stored;
        let master = stored.master.as_ref().map(|master| master.begin(range.clone(), side, self.name())).transpose()?;
        let weights = match &stored.at {
            // Only written where there are masters: rounded anew from them.
            At::Rest(rest) if master.is_some() => rest.blank(range, side, self.name())?,
            At::Rest(rest) => rest.begin(range, side, self.name())?,
            At::Slot if self.slot_is_across(side) => self.begin_resident(range, side, master.is_none())?,
            At::Slot | At::Files(_) => Coming::nothing(),
        };
        Ok(OwnedComing { weights, master })
    }

    /// A piece of resident parameters that lie on the other side: copied if they are `read`, too.
    fn begin_resident(&self, range: Range<usize>, side: &Staging, read: bool) -> Result<Coming> {
        let dtype = self.stored.slot.get()?.dtype();
        let mut near = side.arena.alloc_dirty(dtype, range.len(), self.name())?;
        if !read {
            return Ok(Pending::ready(near).into());
        }
        let (stored, range) = (self.stored.clone(), self.in_bucket(range));
        let copied = move || {
            let len = near.len();
            stored.slot.update(|buffer| cast_range(buffer, range, &mut near, 0..len))??;
            Ok(near)
        };
        Ok(side.reading(copied).into())
    }

    fn in_bucket(&self, range: Range<usize>) -> Range<usize> {
        self.range.start + range.start..self.range.start + range.end
    }

    /// Hands the piece's weights to `change`.
    pub fn change<R>(
        &self,
        range: Range<usize>,
        piece: &mut OwnedPiece,
        change: impl FnOnce(Weights) -> R,
    ) -> Result<R> {
        let OwnedPiece { weights, master } = piece;
        let (Some(masters), Some(master)) = (&self.stored.master, master) else {
            return self.with_parameters(range, weights, |values, at| change(Weights { values, at, rounded: None }));
        };
        masters.with(range.clone(), master, |values, at| {
            self.with_parameters(range, weights, |rounded, to| {
                change(Weights { values, at, rounded: Some((rounded, to)) })
            })
        })
    }

    fn with_parameters<R>(
        &self,
        range: Range<usize>,
        piece: &mut Piece,
        change: impl FnOnce(&mut Buffer, Range<usize>) -> R,
    ) -> Result<R> {
        match &self.stored.at {
            At::Rest(rest) => Ok(rest.with(range, piece, change)),
            At::Slot | At::Files(_) => match piece.buffer_mut() {
                Some(buffer) => Ok(change(buffer, 0..range.len())),
                None => Ok(self.stored.slot.update(|buffer| change(buffer, self.in_bucket(range)))?),
            },
        }
    }

    /// Begins to write the changed piece back to where it rests.
    pub fn end(&self, range: Range<usize>, piece: OwnedPiece, side: &Staging) -> Vec<Pending<Buffer>> {
        let weights = match (&self.stored.at, piece.weights) {
            (At::Rest(rest), piece) => rest.end(range.clone(), piece, side),
            (At::Slot | At::Files(_), piece) => piece.into_buffer().map(|near| {
                let (stored, to) = (self.stored.clone(), self.in_bucket(range.clone()));
                side.writing(move || {
                    stored.slot.update(|buffer| cast_range(&near, 0..near.len(), buffer, to))??;
                    Ok(near)
                })
            }),
        };
        let masters = self.stored.master.as_ref().zip(piece.master);
        let master = masters.and_then(|(rest, piece)| rest.end(range, piece, side));
        weights.into_iter().chain(master).collect()
    }
}

impl OwnedComing {
    pub fn wait(self) -> Result<OwnedPiece> {
        Ok(OwnedPiece { weights: self.weights.wait()?, master: self.master.map(Coming::wait).transpose()? })
    }
}

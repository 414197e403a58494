//! What of a segment's parameters this rank's optimizer changes, piece by piece, wherever it rests.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::DType;
use half::{bf16, f16};

use super::ParamStore;
use super::param_store::{At, Stored, read_range};
use super::rest::{Coming, Piece, Rest, widen};
use crate::comm::{Slice, SliceMut};
use crate::device::{Arena, Buffer, Pending};

/// The weights of a piece: what the optimizer computes with, and the rounded copy that ops read if that is another one.
pub enum Weights<'a> {
    F32(&'a mut [f32]),
    BF16(&'a mut [bf16]),
    WithBf16 { master: &'a mut [f32], rounded: &'a mut [bf16] },
    WithF16 { master: &'a mut [f32], rounded: &'a mut [f16] },
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
            (None, At::Slot) => Ok(stored.slot.update(|buffer| widen(buffer, range, into))?),
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

    /// Bytes that a piece of so many elements takes in memory beside where it rests.
    pub fn staged_bytes(&self, elements: usize) -> usize {
        let rest = match &self.stored.at {
            At::Rest(rest) => rest.staged_bytes(elements),
            At::Slot | At::Files(_) => 0,
        };
        rest + self.stored.master.as_ref().map_or(0, |master| master.staged_bytes(elements))
    }

    /// Begins to bring elements `range`, counted from the first owned one, which starts at a multiple of
    /// [`super::PIECE`]; into memory of `arena`, if they rest on a drive.
    pub fn begin(&self, range: Range<usize>, arena: &Arena) -> Result<OwnedComing> {
        let bring = |rest: &Rest| rest.begin(range.clone(), arena, self.name());
        Ok(match (&self.stored.at, &self.stored.master) {
            (At::Slot | At::Files(_), None) => OwnedComing { weights: Coming::nothing(), master: None },
            (At::Slot | At::Files(_), Some(master)) => {
                OwnedComing { weights: Coming::nothing(), master: Some(bring(master)?) }
            }
            (At::Rest(rest), None) => OwnedComing { weights: bring(rest)?, master: None },
            (At::Rest(rest), Some(master)) => {
                // Only written: rounded anew from the masters.
                let weights = rest.blank(range.clone(), arena, self.name())?;
                OwnedComing { weights, master: Some(bring(master)?) }
            }
        })
    }

    /// Hands the piece's weights to `change`.
    pub fn change<R>(
        &self,
        range: Range<usize>,
        piece: &mut OwnedPiece,
        change: impl FnOnce(Weights) -> R,
    ) -> Result<R> {
        let stored = &self.stored;
        let (Some(master), Some(master_piece)) = (&stored.master, &mut piece.master) else {
            return self.with_parameters(range, &mut piece.weights, |buffer, range| {
                change(match buffer.dtype() {
                    DType::BF16 => Weights::BF16(&mut buffer.as_mut_slice()[range]),
                    _ => Weights::F32(&mut buffer.as_mut_slice()[range]),
                })
            });
        };
        let weights = &mut piece.weights;
        master.with(range.clone(), master_piece, |masters, at| {
            let master = &mut masters.as_mut_slice::<f32>()[at];
            self.with_parameters(range, weights, |buffer, range| {
                change(match buffer.dtype() {
                    DType::BF16 => Weights::WithBf16 { master, rounded: &mut buffer.as_mut_slice()[range] },
                    _ => Weights::WithF16 { master, rounded: &mut buffer.as_mut_slice()[range] },
                })
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
            At::Slot | At::Files(_) => {
                let start = self.range.start;
                Ok(self.stored.slot.update(|buffer| change(buffer, start + range.start..start + range.end))?)
            }
            At::Rest(rest) => Ok(rest.with(range, piece, change)),
        }
    }

    /// Begins to write the changed piece back to where it rests.
    pub fn end(&self, range: Range<usize>, piece: OwnedPiece) -> Vec<Pending<Buffer>> {
        let weights = match &self.stored.at {
            At::Rest(rest) => rest.end(range.clone(), piece.weights),
            At::Slot | At::Files(_) => None,
        };
        let master = self.stored.master.as_ref().zip(piece.master).and_then(|(rest, piece)| rest.end(range, piece));
        weights.into_iter().chain(master).collect()
    }
}

impl OwnedComing {
    pub fn wait(self) -> Result<OwnedPiece> {
        Ok(OwnedPiece { weights: self.weights.wait()?, master: self.master.map(Coming::wait).transpose()? })
    }
}

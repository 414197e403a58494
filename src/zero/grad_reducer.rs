//! Gradients on their way from a segment's backward to the optimizer. They travel beside the computation: while one
//! segment's are reduced and stored, the segment before it runs backward. Padding is zero throughout.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result, bail};
use candle_core::DType;

use super::early::Early;
use super::param_store::{At, locked};
use super::reduce::Room;
use super::rest::{Coming, Piece, Staging};
use super::{ParamStore, Ranks, Tiers};
use crate::comm::{Slice, SliceMut};
use crate::device::bulk::{self, accumulate, cast, cast_range, widen};
use crate::device::trace::{Row, span};
use crate::device::{Buffer, GradSlot, Pending, Place};

/// What begins when gradients are complete.
pub type Start = Box<dyn FnOnce() + Send>;

/// Sums of gradients over the micro-batches of a step: whole buckets, or owned shards where gradients are partitioned.
pub struct GradReducer {
    ranks: Ranks,
    tiers: Tiers,
    segments: Vec<Option<Arc<Summed>>>,
    /// The bucket on its way from backward to where sums rest, and what its way takes. Both are held until it is waited
    /// for: so what is held while a segment runs does not depend on how fast the one before it leaves.
    leaving: Option<Pending<Spent>>,
}

/// Memory of what has left.
type Spent = (Option<Buffer>, Room);

/// A segment's sums at rest.
pub(super) struct Summed {
    slot: Arc<GradSlot>,
    name: String,
    padded_len: usize,
    /// Whole bucket or owned shard, in the dtype of sums at rest. In the slot while the segment runs backward, where
    /// the bucket itself is what rests.
    sum: Mutex<Option<Buffer>>,
    /// Nothing was added in this step yet: what is in memory is the last step's.
    fresh: AtomicBool,
    /// Of this rank's shard, once its last micro-batch is in: eight bytes, where the shard rests.
    squares: Mutex<Buffer>,
}

/// A segment's summed gradients, as its optimizer sees them.
#[derive(Clone)]
pub struct OwnedGrads {
    summed: Arc<Summed>,
    /// Where the optimizer's range begins in what rests here.
    start: usize,
}

impl GradReducer {
    /// Allocates what is kept between micro-batches for every segment that trains.
    pub fn new<'s>(
        ranks: &Ranks,
        tiers: &Tiers,
        store: &ParamStore,
        slots: impl Iterator<Item = Option<&'s Arc<GradSlot>>>,
    ) -> Result<Self> {
        let arena = &tiers.states(tiers.placement.gradients).gradients;
        let summed = |(i, slot): (usize, Option<&Arc<GradSlot>>)| {
            let Some(slot) = slot else { return Ok(None) };
            let (name, padded_len) = (store.name(i).to_string(), store.padded_len(i));
            let len = match ranks.stage.partitions_gradients() {
                true => ranks.partition().shard(padded_len).len(),
                false => padded_len,
            };
            let sum = Mutex::new(Some(arena.alloc(tiers.gradients, len, &name)?));
            let squares = match arena.accelerator() {
                Some(_) => arena.alloc(DType::U8, size_of::<f64>(), &name)?,
                None => Buffer::unbudgeted(DType::U8, size_of::<f64>())?,
            };
            let squares = Mutex::new(squares);
            let fresh = AtomicBool::new(true);
            Ok(Some(Arc::new(Summed { slot: slot.clone(), name, padded_len, sum, fresh, squares })))
        };
        let segments = slots.enumerate().map(summed).collect::<Result<_>>()?;
        Ok(GradReducer { ranks: ranks.clone(), tiers: tiers.clone(), segments, leaving: None })
    }

    /// Lets the store read parameters early into the memory of sums that is not used.
    pub fn lend(&self, store: &ParamStore) {
        for (stored, summed) in store.stored.iter().zip(&self.segments) {
            if let (At::Rest(rest), Some(summed)) = (&stored.at, summed)
                && let Some(early) = Early::of(rest, summed)
            {
                // Once in a store's life.
                let _ = stored.early.set(early);
            }
        }
    }

    /// Whether a whole bucket, as ops fill it, is what rests on the device.
    fn rests_in_slot(&self) -> bool {
        let tiers = &self.tiers;
        !self.ranks.stage.partitions_gradients()
            && tiers.placement.gradients == Place::Device
            && tiers.gradients == DType::F32
    }

    /// Opens segment `i`'s gradient bucket for its backward.
    pub fn open(&mut self, i: usize) -> Result<()> {
        let Some(segment) = self.segments[i].clone() else { return Ok(()) };
        if self.rests_in_slot() {
            let bucket = locked(&segment.sum).take();
            let mut bucket = bucket.with_context(|| format!("{}: its gradient bucket is open", segment.name))?;
            if segment.fresh.swap(false, Relaxed) {
                bulk::zero(&mut bucket)?;
            }
            segment.slot.fill(bucket);
            return Ok(());
        }
        let arena = self.tiers.device.gradients.clone();
        let sums_here = !self.ranks.stage.partitions_gradients() && !segment.fresh.load(Relaxed);
        let bucket = match sums_here {
            // Ops add to what was there: so the sum is the same number wherever it rests.
            true => {
                let mut bucket = arena.alloc_dirty(DType::F32, segment.padded_len, &segment.name)?;
                if let Some(sum) = &*locked(&segment.sum) {
                    cast(sum, &mut bucket)?;
                }
                bucket
            }
            false => arena.alloc(DType::F32, segment.padded_len, &segment.name)?,
        };
        segment.slot.fill(bucket);
        Ok(())
    }

    /// Closes it after the backward; where gradients are partitioned that is a collective, one per micro-batch. `last`:
    /// the step's last micro-batch, after which the sums over all ranks are complete; then `then` is called. One bucket is
    /// on its way while the next one is filled; the one before it is waited for here.
    pub fn close(&mut self, i: usize, last: bool, then: Option<Start>) -> Result<()> {
        self.settle()?;
        let Some(segment) = self.segments[i].clone() else { return Ok(()) };
        let bucket =
            segment.slot.empty().with_context(|| format!("{}: its gradient bucket is not open", segment.name))?;
        bucket.note_last_use()?;
        let ranks = self.ranks.clone();
        let mut room = self.room(&segment, last)?;
        let work = move || {
            let storing = span(Row::Copy, || format!("gradients of {}", segment.name)).bytes(bucket.byte_len());
            let left = segment.store(&ranks, &mut room, bucket, last)?;
            drop(storing);
            if last {
                let _span = span(Row::Optimizer, || format!("norm of {}", segment.name));
                segment.measure(&ranks)?;
            }
            then.into_iter().for_each(|then| then());
            Ok((left, room))
        };
        if self.rests_in_slot() && (!last || self.ranks.alone()) {
            return work().map(drop);
        }
        self.leaving = Some(self.tiers.traffic.submit(work));
        Ok(())
    }

    /// What the reduction of a segment's bucket takes.
    fn room(&self, segment: &Summed, last: bool) -> Result<Room> {
        let stage = self.ranks.stage;
        if self.ranks.alone() || !(stage.partitions_gradients() || last) {
            return Ok(Room::default());
        }
        let (arena, scattered) = (&self.tiers.device.gradients, stage.partitions_optimizer());
        Room::take(&self.ranks, arena, segment.padded_len, scattered, &segment.name)
    }

    /// Waits for what is on its way.
    pub fn settle(&mut self) -> Result<()> {
        self.leaving.take().map_or(Ok(()), |leaving| leaving.wait_for("gradients").map(drop))
    }

    /// Segment `i`'s sums, for its optimizer; none if it does not train.
    pub fn owned(&self, i: usize) -> Option<OwnedGrads> {
        let summed = self.segments[i].clone()?;
        let stage = self.ranks.stage;
        let start = match stage.partitions_optimizer() && !stage.partitions_gradients() {
            true => self.ranks.partition().shard(summed.padded_len).start,
            false => 0,
        };
        Some(OwnedGrads { summed, start })
    }

    /// The whole bucket's reduced gradients on every rank; a collective.
    pub fn whole(&self, i: usize) -> Result<Option<Vec<f32>>> {
        let Some(segment) = &self.segments[i] else { return Ok(None) };
        let mut shard = vec![0f32; self.ranks.partition().shard(segment.padded_len).len()];
        if let Some(sum) = &*locked(&segment.sum) {
            widen(sum, segment.shard_here(&self.ranks, sum.len()), &mut shard)?;
        }
        let mut whole = vec![0f32; segment.padded_len];
        self.ranks.comm.all_gather(Slice::F32(&shard), SliceMut::F32(&mut whole))?;
        Ok(Some(whole))
    }

    /// Forgets segment `i`'s sums: the next micro-batch begins a new step.
    pub fn forget(&self, i: usize) {
        self.forgetting(i)();
    }

    /// [`Self::forget`], for later.
    pub fn forgetting(&self, i: usize) -> impl FnOnce() + Send + use<> {
        let segment = self.segments[i].clone();
        move || segment.iter().for_each(|segment| segment.fresh.store(true, Relaxed))
    }

    /// The sum of squares of every bucket's reduced gradients, from every rank's shard, in fp64. The same on all ranks;
    /// a collective.
    pub fn squares(&self) -> Result<Vec<f64>> {
        let of = |segment: &Option<Arc<Summed>>| match segment {
            Some(segment) => segment.squares(),
            None => Ok(0.0),
        };
        let mut squares = self.segments.iter().map(of).collect::<Result<Vec<f64>>>()?;
        self.ranks.comm.all_reduce(SliceMut::F64(&mut squares))?;
        Ok(squares)
    }
}

impl Summed {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn memory(&self) -> MutexGuard<'_, Option<Buffer>> {
        locked(&self.sum)
    }

    /// Its memory, if nothing in it matters.
    pub(super) fn unused(&self) -> Option<MutexGuard<'_, Option<Buffer>>> {
        let sum = locked(&self.sum);
        self.fresh.load(Relaxed).then_some(sum)
    }

    /// Adds a micro-batch's bucket to the sum. In stages 0 and 1 the bucket is the sum so far, this micro-batch included.
    /// Returns the bucket, unless it is what rests here.
    fn store(&self, ranks: &Ranks, room: &mut Room, mut bucket: Buffer, last: bool) -> Result<Option<Buffer>> {
        let what = || format!("reducing the gradients of {}", self.name);
        let mut sum = locked(&self.sum);
        if ranks.stage.partitions_gradients() {
            let sum = sum.as_mut().context("sums of shards stay where they are")?;
            let mine = match ranks.alone() {
                true => &bucket,
                false => room.reduce_scatter(ranks, &bucket).with_context(what)?,
            };
            accumulate(sum, mine, self.fresh.swap(false, Relaxed))?;
            return Ok(Some(bucket));
        }
        if last && !ranks.alone() {
            if ranks.stage.partitions_optimizer() {
                let mine = room.reduce_scatter(ranks, &bucket).with_context(what)?;
                cast_range(mine, 0..mine.len(), &mut bucket, ranks.partition().shard(self.padded_len))?;
            } else {
                room.all_reduce(ranks, &mut bucket).with_context(what)?;
            }
        }
        self.fresh.store(false, Relaxed);
        let Some(sum) = sum.as_mut() else {
            *sum = Some(bucket);
            return Ok(None);
        };
        cast(&bucket, sum)?;
        Ok(Some(bucket))
    }

    /// Where this rank's shard is in what rests here, `len` elements.
    fn shard_here(&self, ranks: &Ranks, len: usize) -> Range<usize> {
        let shard = ranks.partition().shard(self.padded_len);
        if len == self.padded_len { shard } else { 0..len }
    }

    fn measure(&self, ranks: &Ranks) -> Result<()> {
        let sum = locked(&self.sum);
        let sum = sum.as_ref().with_context(|| format!("{}: its gradients are in use", self.name))?;
        bulk::sum_of_squares(sum, self.shard_here(ranks, sum.len()), &mut locked(&self.squares))
    }

    fn squares(&self) -> Result<f64> {
        let mut bytes = [0; size_of::<f64>()];
        bulk::read_bytes(&locked(&self.squares), 0, &mut bytes)?;
        Ok(f64::from_le_bytes(bytes))
    }
}

impl OwnedGrads {
    fn here(&self, range: Range<usize>) -> Range<usize> {
        self.start + range.start..self.start + range.end
    }

    /// Bytes that a piece of so many elements takes in memory beside where it rests, for an optimizer on that `side`.
    pub fn staged_bytes(&self, elements: usize, side: &Staging) -> usize {
        match &*locked(&self.summed.sum) {
            Some(sum) if side.is_across(sum) => elements * sum.dtype().size_in_bytes(),
            _ => 0,
        }
    }

    /// Begins to bring elements `range`, counted from the optimizer's first one, to its side.
    pub fn begin(&self, range: Range<usize>, side: &Staging) -> Result<Coming> {
        let summed = self.summed.clone();
        let (dtype, across) = match &*locked(&summed.sum) {
            Some(sum) => (sum.dtype(), side.is_across(sum)),
            None => bail!("{}: its gradients are in use", summed.name),
        };
        if !across {
            return Ok(Coming::nothing());
        }
        let mut buffer = side.arena.alloc_dirty(dtype, range.len(), &summed.name)?;
        let range = self.here(range);
        Ok(Coming::from(side.reading(move || {
            let sum = locked(&summed.sum);
            let sum = sum.as_ref().with_context(|| format!("{}: its gradients are in use", summed.name))?;
            let len = buffer.len();
            cast_range(sum, range, &mut buffer, 0..len)?;
            Ok(buffer)
        })))
    }

    /// Hands `read` the memory that holds elements `range` now, and where in it they are.
    pub fn with<R>(
        &self,
        range: Range<usize>,
        piece: &Piece,
        read: impl FnOnce(&Buffer, Range<usize>) -> R,
    ) -> Result<R> {
        if let Some(buffer) = piece.buffer() {
            return Ok(read(buffer, 0..range.len()));
        }
        let sum = locked(&self.summed.sum);
        let sum = sum.as_ref().with_context(|| format!("{}: its gradients are in use", self.summed.name))?;
        Ok(read(sum, self.here(range)))
    }
}

//! Parameters between uses and while in use. A [`Walk`] brings segment after segment, the next one while the present one
//! is used; dropping what it returns is the release.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use anyhow::{Context, Result};
use candle_core::DType;

use super::bring::{Landed, Space, publish, read_rounded};
use super::early::Early;
use super::rest::Rest;
use super::{Partition, Stage, Tiers};
use crate::comm::Communicator;
use crate::device::{BucketLayout, GradSlot, ParamSlot, Pending};

/// The group a run is part of, and how it shares its states.
#[derive(Clone)]
pub struct Ranks {
    pub comm: Arc<dyn Communicator>,
    pub stage: Stage,
    /// Sums of gradients travel in this dtype.
    pub reduce_dtype: DType,
}

impl Ranks {
    pub fn partition(&self) -> Partition {
        Partition::new(self.comm.rank(), self.comm.world_size())
    }

    pub fn alone(&self) -> bool {
        self.comm.world_size() == 1
    }
}

/// Where parameters come from at the start: a model's files, a checkpoint, a generator.
pub trait WeightSource: Send + Sync {
    /// Elements `range` of tensor `name` into `into`, as fp32.
    fn read(&self, name: &str, range: Range<usize>, into: &mut [f32]) -> Result<()>;
}

/// A segment's parameters.
pub(super) struct Stored {
    pub slot: Arc<ParamSlot>,
    trainable: bool,
    pub padded_len: usize,
    pub at: At,
    /// fp32 weights of what the optimizer sees, where the parameters themselves are in another precision.
    pub master: Option<Rest>,
    turn: Mutex<Turn>,
    /// Where they can be read for the backward before it begins.
    pub early: OnceLock<Early>,
}

/// Where parameters are between uses.
pub(super) enum At {
    /// Where ops find them, always: replicated, on the device, in the compute dtype.
    Slot,
    /// What the optimizer of this rank sees, elsewhere: all of them in stage 0, the owned shard in the others.
    Rest(Rest),
    /// In the model's own files, which the system keeps in memory as long as there is room.
    Files(Arc<dyn WeightSource>),
}

/// What must happen before a segment's parameters may be read again.
#[derive(Default)]
struct Turn {
    /// The optimizer's work on them.
    update: Option<Pending<()>>,
    /// The owners have changed their shards, and the others do not know yet.
    stale: bool,
}

/// All parameters of a graph on this rank.
pub struct ParamStore {
    pub(super) ranks: Ranks,
    pub(super) tiers: Tiers,
    dtype: DType,
    pub(super) stored: Vec<Arc<Stored>>,
}

impl ParamStore {
    /// Allocates the parameters of `segments` (slot, gradient slot if it trains) and reads what this rank keeps.
    /// `dtype`: what ops compute in.
    pub fn load<'s>(
        ranks: &Ranks,
        dtype: DType,
        tiers: &Tiers,
        segments: impl Iterator<Item = (&'s Arc<ParamSlot>, Option<&'s Arc<GradSlot>>)>,
        source: &dyn WeightSource,
    ) -> Result<Self> {
        let mut store = ParamStore { ranks: ranks.clone(), tiers: tiers.clone(), dtype, stored: Vec::new() };
        for (slot, grads) in segments {
            let stored = store.allocate(slot, grads.is_some())?;
            store.read(&stored, source).with_context(|| format!("loading {}", slot.name()))?;
            store.stored.push(Arc::new(stored));
        }
        Ok(store)
    }

    /// Parameters that do not train and are read from `source` whenever they are used.
    pub fn in_files<'s>(
        ranks: &Ranks,
        dtype: DType,
        tiers: &Tiers,
        slots: impl Iterator<Item = &'s Arc<ParamSlot>>,
        source: Arc<dyn WeightSource>,
    ) -> Self {
        let stored = |slot: &Arc<ParamSlot>| {
            let padded_len = slot.layout().padded_len(ranks.partition().world_size);
            let at = At::Files(source.clone());
            Arc::new(Stored {
                slot: slot.clone(),
                trainable: false,
                padded_len,
                at,
                master: None,
                turn: Mutex::default(),
                early: OnceLock::new(),
            })
        };
        let stored = slots.map(stored).collect();
        ParamStore { ranks: ranks.clone(), tiers: tiers.clone(), dtype, stored }
    }

    fn allocate(&self, slot: &Arc<ParamSlot>, trainable: bool) -> Result<Stored> {
        let padded_len = slot.layout().padded_len(self.ranks.partition().world_size);
        let place = self.tiers.placement.parameters;
        let rest_dtype = if self.tiers.master == DType::BF16 { DType::BF16 } else { self.dtype };
        let resident = place == crate::device::Place::Device
            && rest_dtype == self.dtype
            && !self.ranks.stage.partitions_parameters();
        let owned = self.owned_range(padded_len).len();
        let at = if resident {
            slot.fill(Arc::new(self.tiers.device.parameters.alloc(self.dtype, padded_len, slot.name())?));
            At::Slot
        } else {
            At::Rest(Rest::allocate(&self.tiers, place, |s| &s.parameters, rest_dtype, owned, slot.name())?)
        };
        let master = match trainable && self.tiers.master == DType::F32 && rest_dtype != DType::F32 {
            true => {
                let place = self.tiers.placement.optimizer;
                Some(Rest::allocate(&self.tiers, place, |s| &s.parameters, DType::F32, owned, slot.name())?)
            }
            false => None,
        };
        let (slot, turn, early) = (slot.clone(), Mutex::default(), OnceLock::new());
        Ok(Stored { slot, trainable, padded_len, at, master, turn, early })
    }

    fn read(&self, stored: &Stored, source: &dyn WeightSource) -> Result<()> {
        let layout = stored.slot.layout();
        let start = self.owned_range(stored.padded_len).start;
        match &stored.at {
            At::Slot => stored.slot.update(|buffer| read_rounded(layout, buffer, source))??,
            At::Rest(rest) => rest.write(|at, into| read_range(layout, start + at, into, source))?,
            At::Files(_) => {}
        }
        match &stored.master {
            Some(master) => master.write(|at, into| read_range(layout, start + at, into, source)),
            None => Ok(()),
        }
    }

    pub fn len(&self) -> usize {
        self.stored.len()
    }

    pub fn is_empty(&self) -> bool {
        self.stored.is_empty()
    }

    pub fn trains(&self, i: usize) -> bool {
        self.stored[i].trainable
    }

    pub fn name(&self, i: usize) -> &str {
        self.stored[i].slot.name()
    }

    pub fn layout(&self, i: usize) -> &BucketLayout {
        self.stored[i].slot.layout()
    }

    pub fn padded_len(&self, i: usize) -> usize {
        self.stored[i].padded_len
    }

    pub fn tiers(&self) -> &Tiers {
        &self.tiers
    }

    /// The elements of bucket `i` that this rank alone answers for (norms, checkpoints), in every stage.
    pub fn shard(&self, i: usize) -> Range<usize> {
        self.ranks.partition().shard(self.stored[i].padded_len)
    }

    /// The elements of bucket `i` that this rank's optimizer updates.
    pub fn optimizer_range(&self, i: usize) -> Range<usize> {
        self.owned_range(self.stored[i].padded_len)
    }

    fn owned_range(&self, padded_len: usize) -> Range<usize> {
        match self.ranks.stage.partitions_optimizer() {
            true => self.ranks.partition().shard(padded_len),
            false => 0..padded_len,
        }
    }

    /// Notes that the optimizer is at work on segment `i`: nobody reads its parameters before that is done, and then the
    /// owners' shards are published.
    pub fn updating(&self, i: usize, update: Pending<()>) {
        let stored = &self.stored[i];
        stored.early.get().into_iter().for_each(Early::forget);
        let mut turn = locked(&stored.turn);
        turn.update = Some(update);
        turn.stale = self.ranks.stage.partitions_optimizer() && !self.ranks.alone() && matches!(stored.at, At::Slot);
    }

    /// Waits for the optimizer's work on segment `i`.
    pub fn settle(&self, i: usize) -> Result<()> {
        let update = locked(&self.stored[i].turn).update.take();
        // Its error names the segment itself.
        update.map_or(Ok(()), |update| update.wait_for(|| format!("updating {}", self.name(i))))
    }

    /// Segment after segment, in this order, each a collective where parameters are partitioned.
    pub fn walk(&self, order: impl IntoIterator<Item = usize>) -> Walk<'_> {
        Walk { store: self, order: order.into_iter().collect(), turn: None, at: 0, coming: None }
    }

    /// All segments, for a forward, and back.
    pub fn there_and_back(&self) -> Walk<'_> {
        let count = self.len();
        Walk { turn: Some(count), ..self.walk((0..count).chain((0..count).rev())) }
    }

    /// One segment alone; see [`Self::walk`].
    pub fn fetch(&self, i: usize) -> Result<Fetched<'_>> {
        self.walk([i]).fetch()
    }

    /// Begins to bring segment `i`. The memory for it is taken here, so that what is held at a point of a walk does not
    /// depend on how fast things travel.
    fn begin(&self, i: usize) -> Result<Coming> {
        let stored = self.stored[i].clone();
        let mut turn = locked(&self.stored[i].turn);
        let (update, stale) = (turn.update.take(), std::mem::take(&mut turn.stale));
        let settle = move || update.map_or(Ok(()), |update| update.wait_for("update"));
        let ranks = self.ranks.clone();
        Ok(match (&stored.at, stale) {
            (At::Slot, false) => Coming::Resident(settle()),
            (At::Slot, true) => {
                let tiers = self.tiers.clone();
                let published = move || settle().and_then(|()| publish(&ranks, &tiers, &stored));
                Coming::Resident(self.tiers.traffic.submit(published).wait())
            }
            (At::Rest(_) | At::Files(_), _) => {
                let space = Space::take(&stored, &self.tiers.device.parameters, self.dtype)
                    .with_context(|| format!("fetching {}", stored.slot.name()))?;
                let brought = move || settle().and_then(|()| space.bring(&ranks, &stored));
                Coming::Bucket(Box::new(self.tiers.traffic.submit(brought)))
            }
        })
    }

    fn arrive(&self, i: usize, coming: Coming) -> Result<Fetched<'_>> {
        let slot = &self.stored[i].slot;
        let what = || format!("fetching {}", slot.name());
        match coming {
            Coming::Resident(ready) => {
                ready.with_context(what)?;
                Ok(Fetched { slot: None })
            }
            Coming::Bucket(bucket) => {
                slot.fill(Arc::new(bucket.wait_for(what).with_context(what)?.bucket));
                Ok(Fetched { slot: Some(slot) })
            }
        }
    }
}

/// A segment's parameters on their way.
enum Coming {
    Resident(Result<()>),
    Bucket(Box<Pending<Landed>>),
}

/// Segments brought one after another; the next one travels while the present one is used.
pub struct Walk<'a> {
    store: &'a ParamStore,
    order: Vec<usize>,
    /// How many there are before the way back.
    turn: Option<usize>,
    at: usize,
    coming: Option<Coming>,
}

impl<'a> Walk<'a> {
    /// Puts the next segment's parameters where its ops find them, until the result is dropped. Drop it before the
    /// following call: so no more than two segments are ever resident.
    pub fn fetch(&mut self) -> Result<Fetched<'a>> {
        let i = self.order[self.at];
        let coming = self.coming.take().map_or_else(|| self.store.begin(i), Ok)?;
        let fetched = self.store.arrive(i, coming)?;
        self.at += 1;
        if self.turn == Some(self.at) {
            // All updates have been waited for.
            let ahead = &self.store.tiers.ahead;
            self.order[self.at..].iter().for_each(|&i| Early::begin(&self.store.stored[i], ahead));
        }
        if let Some(&following) = self.order.get(self.at)
            && self.store.tiers.prefetch
            && !matches!(self.store.stored[following].at, At::Slot)
        {
            self.coming = Some(self.store.begin(following)?);
        }
        Ok(fetched)
    }
}

/// A segment's parameters in use; dropping it releases them.
pub struct Fetched<'a> {
    slot: Option<&'a ParamSlot>,
}

impl Drop for Fetched<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            slot.empty();
        }
    }
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Reads elements `start..start + into.len()` of a bucket, tensor by tensor.
pub(super) fn read_range(
    layout: &BucketLayout,
    start: usize,
    into: &mut [f32],
    source: &dyn WeightSource,
) -> Result<()> {
    let end = start + into.len();
    for entry in &layout.entries {
        let (from, to) = (entry.offset.max(start), (entry.offset + entry.len).min(end));
        if from < to {
            source.read(&entry.name, from - entry.offset..to - entry.offset, &mut into[from - start..to - start])?;
        }
    }
    Ok(())
}

//! Parameters between uses and while in use. `fetch` puts a segment's parameters where its ops find them; dropping
//! what it returns is the release.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result};
use candle_core::DType;
use half::{bf16, f16};

use super::{Partition, Stage};
use crate::comm::{Communicator, Slice, SliceMut};
use crate::device::{Arena, BucketLayout, Buffer, Element, GradSlot, ParamSlot};

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
}

/// Where parameters come from at the start: a model's files, a checkpoint, a generator.
pub trait WeightSource {
    /// Elements `range` of tensor `name` into `into`, as fp32.
    fn read(&self, name: &str, range: Range<usize>, into: &mut [f32]) -> Result<()>;
}

/// A segment's parameters at rest.
struct Stored {
    slot: Arc<ParamSlot>,
    trainable: bool,
    padded_len: usize,
    /// The owned shard in the compute dtype, where parameters are partitioned; otherwise the slot is always filled.
    shard: Option<Mutex<Buffer>>,
    /// fp32 weights of what the optimizer sees, unless the compute dtype is fp32 itself.
    master: Option<Mutex<Buffer>>,
}

/// All parameters of a graph on this rank.
pub struct ParamStore {
    ranks: Ranks,
    dtype: DType,
    arena: Arena,
    stored: Vec<Stored>,
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

/// What the optimizer changes: fp32 weights and, if the compute dtype is another one, their rounded copy.
pub enum Owned<'a> {
    F32(&'a mut [f32]),
    Half { master: &'a mut [f32], rounded: &'a mut [bf16] },
    Fp16 { master: &'a mut [f32], rounded: &'a mut [f16] },
}

impl Owned<'_> {
    /// The fp32 weights.
    pub fn master(&mut self) -> &mut [f32] {
        match self {
            Owned::F32(weights) => weights,
            Owned::Half { master, .. } | Owned::Fp16 { master, .. } => master,
        }
    }

    /// Makes the rounded copy follow the fp32 weights.
    pub fn round(&mut self) {
        match self {
            Owned::F32(_) => {}
            Owned::Half { master, rounded } => {
                rounded.iter_mut().zip(master.iter()).for_each(|(to, from)| *to = bf16::from_f32(*from));
            }
            Owned::Fp16 { master, rounded } => {
                rounded.iter_mut().zip(master.iter()).for_each(|(to, from)| *to = f16::from_f32(*from));
            }
        }
    }
}

impl ParamStore {
    /// Allocates the parameters of `segments` (slot, gradient slot if it trains) and reads what this rank keeps.
    pub fn load<'s>(
        ranks: &Ranks,
        dtype: DType,
        arena: &Arena,
        segments: impl Iterator<Item = (&'s Arc<ParamSlot>, Option<&'s Arc<GradSlot>>)>,
        source: &dyn WeightSource,
    ) -> Result<Self> {
        let mut store = ParamStore { ranks: ranks.clone(), dtype, arena: arena.clone(), stored: Vec::new() };
        for (slot, grads) in segments {
            let stored = store.allocate(slot, grads.is_some())?;
            store.stored.push(stored);
            store.read(store.stored.len() - 1, source).with_context(|| format!("loading {}", slot.name()))?;
        }
        Ok(store)
    }

    fn allocate(&self, slot: &Arc<ParamSlot>, trainable: bool) -> Result<Stored> {
        let partition = self.ranks.partition();
        let padded_len = slot.layout().padded_len(partition.world_size);
        let shard = partition.shard(padded_len);
        let shard_buffer = if self.ranks.stage.partitions_parameters() {
            Some(Mutex::new(self.arena.alloc(self.dtype, shard.len(), slot.name())?))
        } else {
            slot.fill(Arc::new(self.arena.alloc(self.dtype, padded_len, slot.name())?));
            None
        };
        let owned = if self.ranks.stage.partitions_optimizer() { shard.len() } else { padded_len };
        let master = match trainable && self.dtype != DType::F32 {
            true => Some(Mutex::new(self.arena.alloc(DType::F32, owned, slot.name())?)),
            false => None,
        };
        Ok(Stored { slot: slot.clone(), trainable, padded_len, shard: shard_buffer, master })
    }

    fn read(&self, i: usize, source: &dyn WeightSource) -> Result<()> {
        let stored = &self.stored[i];
        let layout = stored.slot.layout();
        // What is kept of the bucket in the compute dtype: the shard, or all of it.
        match &stored.shard {
            Some(shard) => {
                let start = self.shard(i).start;
                read_rounded(layout, start, &mut locked(shard), source)?;
            }
            None => stored.slot.update(|buffer| read_rounded(layout, 0, buffer, source))??,
        }
        if let Some(master) = &stored.master {
            let start = self.optimizer_range(i).start;
            read_range(layout, start, locked(master).as_mut_slice(), source)?;
        }
        Ok(())
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

    /// The elements of bucket `i` that this rank alone answers for (norms, checkpoints), in every stage.
    pub fn shard(&self, i: usize) -> Range<usize> {
        self.ranks.partition().shard(self.stored[i].padded_len)
    }

    /// The elements of bucket `i` that this rank's optimizer updates.
    pub fn optimizer_range(&self, i: usize) -> Range<usize> {
        match self.ranks.stage.partitions_optimizer() {
            true => self.shard(i),
            false => 0..self.stored[i].padded_len,
        }
    }

    /// Puts segment `i`'s parameters where its ops find them, until the result is dropped. A collective in stage 3.
    pub fn fetch(&self, i: usize) -> Result<Fetched<'_>> {
        let stored = &self.stored[i];
        let Some(shard) = &stored.shard else { return Ok(Fetched { slot: None }) };
        let mut full = self.arena.alloc_dirty(self.dtype, stored.padded_len, stored.slot.name())?;
        self.gather(&locked(shard), &mut full).with_context(|| format!("gathering {}", stored.slot.name()))?;
        stored.slot.fill(Arc::new(full));
        Ok(Fetched { slot: Some(&stored.slot) })
    }

    fn gather(&self, shard: &Buffer, full: &mut Buffer) -> Result<()> {
        match self.dtype {
            DType::BF16 => {
                self.ranks.comm.all_gather(Slice::BF16(shard.as_slice()), SliceMut::BF16(full.as_mut_slice()))
            }
            DType::F16 => self.ranks.comm.all_gather(Slice::F16(shard.as_slice()), SliceMut::F16(full.as_mut_slice())),
            _ => self.ranks.comm.all_gather(Slice::F32(shard.as_slice()), SliceMut::F32(full.as_mut_slice())),
        }
    }

    /// Hands `change` the weights of segment `i` that this rank's optimizer updates ([`Self::optimizer_range`]).
    pub fn update<R>(&self, i: usize, change: impl FnOnce(Owned) -> R) -> Result<R> {
        let stored = &self.stored[i];
        let mut master = stored.master.as_ref().map(locked);
        let master = master.as_mut().map(|m| m.as_mut_slice::<f32>());
        match &stored.shard {
            Some(shard) => Ok(change(owned(&mut locked(shard), 0..self.shard(i).len(), master))),
            None => {
                let range = self.optimizer_range(i);
                Ok(stored.slot.update(|buffer| change(owned(buffer, range, master)))?)
            }
        }
    }

    /// Makes what the owners of segment `i` changed visible to every rank's next fetch.
    pub fn publish(&self, i: usize) -> Result<()> {
        let stage = self.ranks.stage;
        if stage.partitions_parameters() || !stage.partitions_optimizer() {
            return Ok(());
        }
        let stored = &self.stored[i];
        let range = self.shard(i);
        let mut shard = self.arena.alloc_dirty(self.dtype, range.len(), stored.slot.name())?;
        let size = self.dtype.size_in_bytes();
        let bytes = range.start * size..range.end * size;
        let gathered = stored.slot.update(|full| {
            shard.bytes_mut().copy_from_slice(&full.bytes()[bytes]);
            self.gather(&shard, full)
        })?;
        gathered.with_context(|| format!("publishing {}", stored.slot.name()))
    }

    /// The fp32 weights of segment `i`, whole, on every rank: what is exported. A collective where they are partitioned.
    pub fn whole_master(&self, i: usize) -> Result<Vec<f32>> {
        let stored = &self.stored[i];
        let mut whole = vec![0f32; stored.padded_len];
        let range = self.shard(i);
        let offset = range.start - self.optimizer_range(i).start;
        let mine = self.update(i, |mut owned| owned.master()[offset..offset + range.len()].to_vec())?;
        self.ranks.comm.all_gather(Slice::F32(&mine), SliceMut::F32(&mut whole))?;
        Ok(whole)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn owned<'a>(buffer: &'a mut Buffer, range: Range<usize>, master: Option<&'a mut [f32]>) -> Owned<'a> {
    match master {
        Some(master) if buffer.dtype() == DType::F16 => {
            Owned::Fp16 { master, rounded: &mut buffer.as_mut_slice()[range] }
        }
        Some(master) => Owned::Half { master, rounded: &mut buffer.as_mut_slice()[range] },
        None => Owned::F32(&mut buffer.as_mut_slice()[range]),
    }
}

/// Reads the part of a bucket that begins at `start` and rounds it to the buffer's dtype; padding stays zero.
fn read_rounded(layout: &BucketLayout, start: usize, buffer: &mut Buffer, source: &dyn WeightSource) -> Result<()> {
    match buffer.dtype() {
        DType::F32 => read_range(layout, start, buffer.as_mut_slice(), source),
        DType::BF16 => read_as::<bf16>(layout, start, buffer, source),
        _ => read_as::<half::f16>(layout, start, buffer, source),
    }
}

fn read_as<T: Element>(
    layout: &BucketLayout,
    start: usize,
    buffer: &mut Buffer,
    source: &dyn WeightSource,
) -> Result<()> {
    // Tensor by tensor in pieces, so that no fp32 copy of the whole bucket is ever needed.
    const PIECE: usize = 1 << 18;
    let mut piece = vec![0f32; PIECE.min(buffer.len())];
    for (at, part) in buffer.as_mut_slice::<T>().chunks_mut(PIECE).enumerate() {
        let values = &mut piece[..part.len()];
        values.fill(0.0);
        read_range(layout, start + at * PIECE, values, source)?;
        part.iter_mut().zip(values).for_each(|(to, from)| *to = T::from_f32(*from));
    }
    Ok(())
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

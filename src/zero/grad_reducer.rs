//! Gradients on their way from a segment's backward to the optimizer. Padding is zero throughout.

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::DType;
use half::{bf16, f16};

use super::{ParamStore, Partition, Ranks};
use crate::comm::{Slice, SliceMut};
use crate::device::{Arena, Buffer, Element, GradSlot};

/// Sums of gradients over the micro-batches of a step: whole buckets, or owned shards where gradients are partitioned.
pub struct GradReducer {
    ranks: Ranks,
    arena: Arena,
    segments: Vec<Option<Reduced>>,
}

struct Reduced {
    slot: Arc<GradSlot>,
    name: String,
    padded_len: usize,
    /// Whole bucket, added to by every micro-batch, where gradients are replicated until the end of the step. After
    /// `finish` it holds sums over all ranks: in the owned shard, or everywhere where the optimizer is replicated, too.
    local: Option<Buffer>,
    /// Sums over all ranks of the owned shard, where gradients are partitioned.
    reduced: Option<Buffer>,
}

impl GradReducer {
    /// Allocates what is kept between micro-batches for every segment that trains.
    pub fn new<'s>(
        ranks: &Ranks,
        arena: &Arena,
        store: &ParamStore,
        slots: impl Iterator<Item = Option<&'s Arc<GradSlot>>>,
    ) -> Result<Self> {
        let mut segments = Vec::new();
        for (i, slot) in slots.enumerate() {
            let Some(slot) = slot else {
                segments.push(None);
                continue;
            };
            let (name, padded_len) = (store.name(i).to_string(), store.padded_len(i));
            let shard = ranks.partition().shard(padded_len).len();
            let alloc = |len: usize| arena.alloc(DType::F32, len, &name);
            let local = if ranks.stage.partitions_gradients() { None } else { Some(alloc(padded_len)?) };
            let reduced = if ranks.stage.partitions_gradients() { Some(alloc(shard)?) } else { None };
            segments.push(Some(Reduced { slot: slot.clone(), name, padded_len, local, reduced }));
        }
        Ok(GradReducer { ranks: ranks.clone(), arena: arena.clone(), segments })
    }

    /// Opens segment `i`'s gradient bucket for its backward.
    pub fn open(&mut self, i: usize) -> Result<()> {
        let Some(segment) = &mut self.segments[i] else { return Ok(()) };
        let bucket = match segment.local.take() {
            Some(bucket) => bucket,
            None => self.arena.alloc(DType::F32, segment.padded_len, &segment.name)?,
        };
        segment.slot.fill(bucket);
        Ok(())
    }

    /// Closes it after the backward. Where gradients are partitioned this is a collective, one per micro-batch.
    pub fn close(&mut self, i: usize) -> Result<()> {
        let Some(segment) = &mut self.segments[i] else { return Ok(()) };
        let bucket =
            segment.slot.empty().with_context(|| format!("{}: its gradient bucket is not open", segment.name))?;
        let Some(sum) = &mut segment.reduced else {
            segment.local = Some(bucket);
            return Ok(());
        };
        let mine = reduce_scatter(&self.ranks, &self.arena, &bucket, &segment.name)?;
        crate::device::threads::add(sum.as_mut_slice(), mine.as_slice());
        Ok(())
    }

    /// Ends the step's last micro-batch: whatever is still local becomes the sum over all ranks.
    pub fn finish(&mut self) -> Result<()> {
        if self.ranks.stage.partitions_gradients() {
            return Ok(());
        }
        for segment in self.segments.iter_mut().flatten() {
            let Some(local) = &mut segment.local else { continue };
            if !self.ranks.stage.partitions_optimizer() {
                all_reduce(&self.ranks, local, &segment.name)?;
                continue;
            }
            let mine = reduce_scatter(&self.ranks, &self.arena, local, &segment.name)?;
            let shard = self.ranks.partition().shard(segment.padded_len);
            local.as_mut_slice::<f32>()[shard].copy_from_slice(mine.as_slice());
        }
        Ok(())
    }

    /// The reduced gradients that this rank's optimizer uses ([`ParamStore::optimizer_range`]).
    pub fn reduced(&self, i: usize) -> Option<&[f32]> {
        match self.ranks.stage.partitions_optimizer() {
            true => self.shard(i),
            false => self.segments[i].as_ref()?.local.as_ref().map(Buffer::as_slice),
        }
    }

    /// The part of [`Self::reduced`] that this rank alone answers for: its shard, in every stage.
    pub fn shard(&self, i: usize) -> Option<&[f32]> {
        let segment = self.segments[i].as_ref()?;
        let local = || Some(&segment.local.as_ref()?.as_slice()[self.partition().shard(segment.padded_len)]);
        segment.reduced.as_ref().map(Buffer::as_slice).or_else(local)
    }

    /// The whole bucket's reduced gradients on every rank; a collective.
    pub fn whole(&self, i: usize) -> Result<Option<Vec<f32>>> {
        let (Some(segment), Some(shard)) = (&self.segments[i], self.shard(i)) else { return Ok(None) };
        let mut whole = vec![0f32; segment.padded_len];
        self.ranks.comm.all_gather(Slice::F32(shard), SliceMut::F32(&mut whole))?;
        Ok(Some(whole))
    }

    /// Forgets the step's sums.
    pub fn clear(&mut self) {
        for segment in self.segments.iter_mut().flatten() {
            for buffer in [&mut segment.local, &mut segment.reduced].into_iter().flatten() {
                crate::device::threads::fill_zero(buffer.as_mut_slice());
            }
        }
    }

    /// The sum of squares of every bucket's reduced gradients, from every rank's shard, in fp64. The same on all ranks;
    /// a collective.
    pub fn squares(&self) -> Result<Vec<f64>> {
        let mut squares: Vec<f64> =
            (0..self.segments.len()).map(|i| self.shard(i).map_or(0.0, sum_of_squares)).collect();
        self.ranks.comm.all_reduce(SliceMut::F64(&mut squares))?;
        Ok(squares)
    }

    fn partition(&self) -> Partition {
        self.ranks.partition()
    }
}

/// In fp64, in pieces of fixed size, so that the number of threads does not show.
fn sum_of_squares(values: &[f32]) -> f64 {
    const PIECE: usize = 1 << 14;
    let pieces = values.len().div_ceil(PIECE);
    let sums: Vec<std::sync::Mutex<f64>> = (0..pieces).map(|_| std::sync::Mutex::new(0.0)).collect();
    crate::device::threads::parallel_for(pieces, values.len(), |p| {
        let piece = &values[p * PIECE..((p + 1) * PIECE).min(values.len())];
        // Eight running sums that the compiler keeps in one register.
        let mut lanes = [0f64; 8];
        let mut chunks = piece.chunks_exact(8);
        for chunk in &mut chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(x) * f64::from(x);
            }
        }
        let tail: f64 = chunks.remainder().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        *sums[p].lock().unwrap_or_else(|e| e.into_inner()) = lanes.iter().sum::<f64>() + tail;
    });
    sums.into_iter().map(|s| s.into_inner().unwrap_or_else(|e| e.into_inner())).sum()
}

fn all_reduce(ranks: &Ranks, bucket: &mut Buffer, name: &str) -> Result<()> {
    let values = bucket.as_mut_slice::<f32>();
    match ranks.reduce_dtype {
        DType::BF16 => {
            let mut rounded = rounded::<bf16>(values);
            ranks.comm.all_reduce(SliceMut::BF16(&mut rounded))?;
            widen(&rounded, values);
            Ok(())
        }
        DType::F16 => {
            let mut rounded = rounded::<f16>(values);
            ranks.comm.all_reduce(SliceMut::F16(&mut rounded))?;
            widen(&rounded, values);
            Ok(())
        }
        _ => ranks.comm.all_reduce(SliceMut::F32(values)),
    }
    .with_context(|| format!("reducing the gradients of {name}"))
}

/// The sum of `bucket` over the ranks: this rank's shard of it.
fn reduce_scatter(ranks: &Ranks, arena: &Arena, bucket: &Buffer, name: &str) -> Result<Buffer> {
    let values = bucket.as_slice::<f32>();
    let len = ranks.partition().shard(values.len()).len();
    let mut shard = arena.alloc_dirty(DType::F32, len, name)?;
    let mine = shard.as_mut_slice::<f32>();
    match ranks.reduce_dtype {
        DType::BF16 => {
            let mut part = vec![bf16::ZERO; len];
            ranks.comm.reduce_scatter(Slice::BF16(&rounded::<bf16>(values)), SliceMut::BF16(&mut part))?;
            widen(&part, mine);
            Ok(())
        }
        DType::F16 => {
            let mut part = vec![f16::ZERO; len];
            ranks.comm.reduce_scatter(Slice::F16(&rounded::<f16>(values)), SliceMut::F16(&mut part))?;
            widen(&part, mine);
            Ok(())
        }
        _ => ranks.comm.reduce_scatter(Slice::F32(values), SliceMut::F32(mine)),
    }
    .with_context(|| format!("reducing the gradients of {name}"))?;
    Ok(shard)
}

fn rounded<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&x| T::from_f32(x)).collect()
}

fn widen<T: Element>(from: &[T], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32());
}

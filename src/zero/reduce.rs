//! Sums of gradients over ranks, in the dtype in which they travel, and over elements.

use std::ops::Range;

use anyhow::{Context, Result};
use candle_core::DType;
use half::bf16;

use super::Ranks;
use super::rest::cast;
use crate::comm::{Slice, SliceMut};
use crate::device::threads::parallel_for;
use crate::device::{Arena, Buffer, Element};

/// Memory that a reduction takes, taken before it begins, so that what is held at a point of a backward pass does not
/// depend on when the ranks meet.
#[derive(Default)]
pub struct Room {
    /// The bucket in the dtype in which it travels, unless that is fp32.
    rounded: Option<Buffer>,
    /// This rank's shard of the sum, as it comes.
    part: Option<Buffer>,
    /// The same in fp32.
    shard: Option<Buffer>,
}

impl Room {
    /// For a bucket of `len` elements; `scattered`: each rank gets its shard of the sum.
    pub fn take(ranks: &Ranks, arena: &Arena, len: usize, scattered: bool, name: &str) -> Result<Self> {
        let half = ranks.reduce_dtype != DType::F32;
        let shard = ranks.partition().shard(len).len();
        let room = |wanted: bool, dtype: DType, len: usize| match wanted {
            true => arena.alloc_dirty(dtype, len, name).map(Some),
            false => Ok(None),
        };
        Ok(Room {
            rounded: room(half, ranks.reduce_dtype, len)?,
            part: room(half && scattered, ranks.reduce_dtype, shard)?,
            shard: room(scattered, DType::F32, shard)?,
        })
    }

    /// The sum of `bucket` over the ranks, in its place.
    pub fn all_reduce(&mut self, ranks: &Ranks, bucket: &mut Buffer) -> Result<()> {
        let Some(rounded) = &mut self.rounded else {
            return ranks.comm.all_reduce(SliceMut::F32(bucket.as_mut_slice()));
        };
        cast(bucket, rounded);
        match rounded.dtype() {
            DType::BF16 => ranks.comm.all_reduce(SliceMut::BF16(rounded.as_mut_slice()))?,
            _ => ranks.comm.all_reduce(SliceMut::F16(rounded.as_mut_slice()))?,
        }
        cast(rounded, bucket);
        Ok(())
    }

    /// The sum of `bucket` over the ranks: this rank's shard of it.
    pub fn reduce_scatter(&mut self, ranks: &Ranks, bucket: &Buffer) -> Result<&[f32]> {
        let shard = self.shard.as_mut().context("no room for a shard")?;
        let (Some(rounded), Some(part)) = (&mut self.rounded, &mut self.part) else {
            ranks.comm.reduce_scatter(Slice::F32(bucket.as_slice()), SliceMut::F32(shard.as_mut_slice()))?;
            return Ok(shard.as_slice());
        };
        cast(bucket, rounded);
        match rounded.dtype() {
            DType::BF16 => {
                ranks.comm.reduce_scatter(Slice::BF16(rounded.as_slice()), SliceMut::BF16(part.as_mut_slice()))?
            }
            _ => ranks.comm.reduce_scatter(Slice::F16(rounded.as_slice()), SliceMut::F16(part.as_mut_slice()))?,
        }
        cast(part, shard);
        Ok(shard.as_slice())
    }
}

/// The sum of squares of elements `range`, in fp64.
pub fn sum_of_squares(values: &Buffer, range: Range<usize>) -> f64 {
    match values.dtype() {
        DType::BF16 => squares(&values.as_slice::<bf16>()[range]),
        _ => squares(&values.as_slice::<f32>()[range]),
    }
}

/// In pieces of fixed size, so that the number of threads does not show.
fn squares<T: Element>(values: &[T]) -> f64 {
    const PIECE: usize = 1 << 14;
    let pieces = values.len().div_ceil(PIECE);
    let sums: Vec<std::sync::Mutex<f64>> = (0..pieces).map(|_| std::sync::Mutex::new(0.0)).collect();
    parallel_for(pieces, values.len(), |p| {
        let piece = &values[p * PIECE..((p + 1) * PIECE).min(values.len())];
        // Eight running sums that the compiler keeps in one register.
        let mut lanes = [0f64; 8];
        let mut chunks = piece.chunks_exact(8);
        for chunk in &mut chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                let x = f64::from(x.to_f32());
                *lane += x * x;
            }
        }
        let tail: f64 = chunks.remainder().iter().map(|x| f64::from(x.to_f32()) * f64::from(x.to_f32())).sum();
        *sums[p].lock().unwrap_or_else(|e| e.into_inner()) = lanes.iter().sum::<f64>() + tail;
    });
    sums.into_iter().map(|s| s.into_inner().unwrap_or_else(|e| e.into_inner())).sum()
}

//! Sums of gradients over ranks, in the dtype in which they travel, and over elements.

use std::ops::Range;

use anyhow::Result;
use candle_core::DType;
use half::{bf16, f16};

use super::Ranks;
use crate::comm::{Slice, SliceMut};
use crate::device::threads::parallel_for;
use crate::device::{Arena, Buffer, Element};

/// The sum of `bucket` over the ranks, in its place.
pub fn all_reduce(ranks: &Ranks, bucket: &mut Buffer) -> Result<()> {
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
}

/// The sum of `bucket` over the ranks: this rank's shard of it.
pub fn reduce_scatter(ranks: &Ranks, arena: &Arena, bucket: &Buffer, name: &str) -> Result<Buffer> {
    let values = bucket.as_slice::<f32>();
    let len = ranks.partition().shard(values.len()).len();
    let mut shard = arena.alloc_dirty(DType::F32, len, name)?;
    let mine = shard.as_mut_slice::<f32>();
    match ranks.reduce_dtype {
        DType::BF16 => {
            let mut part = vec![bf16::ZERO; len];
            ranks.comm.reduce_scatter(Slice::BF16(&rounded::<bf16>(values)), SliceMut::BF16(&mut part))?;
            widen(&part, mine);
        }
        DType::F16 => {
            let mut part = vec![f16::ZERO; len];
            ranks.comm.reduce_scatter(Slice::F16(&rounded::<f16>(values)), SliceMut::F16(&mut part))?;
            widen(&part, mine);
        }
        _ => ranks.comm.reduce_scatter(Slice::F32(values), SliceMut::F32(mine))?,
    }
    Ok(shard)
}

fn rounded<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&x| T::from_f32(x)).collect()
}

fn widen<T: Element>(from: &[T], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32());
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

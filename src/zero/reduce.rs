//! Sums of gradients over ranks, in the dtype in which they travel.

use anyhow::{Context, Result};
use candle_core::DType;

use super::{Ranks, collect};
use crate::device::bulk::cast;
use crate::device::{Arena, Buffer};

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
        let Some(rounded) = &mut self.rounded else { return collect::all_reduce(ranks, bucket) };
        cast(bucket, rounded)?;
        collect::all_reduce(ranks, rounded)?;
        cast(rounded, bucket)
    }

    /// The sum of `bucket` over the ranks: this rank's shard of it.
    pub fn reduce_scatter(&mut self, ranks: &Ranks, bucket: &Buffer) -> Result<&Buffer> {
        let shard = self.shard.as_mut().context("no room for a shard")?;
        let (Some(rounded), Some(part)) = (&mut self.rounded, &mut self.part) else {
            collect::reduce_scatter(ranks, bucket, shard)?;
            return Ok(shard);
        };
        cast(bucket, rounded)?;
        collect::reduce_scatter(ranks, rounded, part)?;
        cast(part, shard)?;
        Ok(shard)
    }
}

//! A segment's bucket on its way to the device: read, gathered, converted, in this order of need.

use anyhow::{Context, Result};
use candle_core::DType;

use super::Ranks;
use super::collect::gather;
use super::param_store::{At, Stored, read_range};
use super::rest::Rest;
use super::{Tiers, WeightSource};
use crate::device::bulk::{cast, cast_range, round, zero};
use crate::device::trace::{Row, span};
use crate::device::{Arena, BucketLayout, Buffer};

/// Memory for one bucket and what its way takes.
pub(super) struct Space {
    /// As ops will find it.
    bucket: Buffer,
    /// As it rests, where ops want another dtype.
    resting: Option<Buffer>,
    /// This rank's shard, where it is read from a drive before it is gathered.
    shard: Option<Buffer>,
}

/// A bucket that has come, and what its way took: held until somebody waits for it.
pub(super) struct Landed {
    pub bucket: Buffer,
    _way: [Option<Buffer>; 2],
}

impl Space {
    /// For `stored`, whose ops compute in `dtype`.
    pub fn take(stored: &Stored, arena: &Arena, dtype: DType) -> Result<Self> {
        let (name, len) = (stored.slot.name(), stored.padded_len);
        let bucket = arena.alloc_dirty(dtype, len, name)?;
        let At::Rest(rest) = &stored.at else { return Ok(Space { bucket, resting: None, shard: None }) };
        let (whole, in_memory) = (rest.len() == len, rest.memory().is_some());
        let resting = match rest.dtype() == dtype || (whole && in_memory) {
            true => None,
            false => Some(arena.alloc_dirty(rest.dtype(), len, name)?),
        };
        let shard = match whole || in_memory {
            true => None,
            false => Some(arena.alloc_dirty(rest.dtype(), rest.len(), name)?),
        };
        Ok(Space { bucket, resting, shard })
    }

    /// The whole bucket in the compute dtype, from where it rests: from all ranks where each has a shard.
    pub fn bring(self, ranks: &Ranks, stored: &Stored) -> Result<Landed> {
        let Space { mut bucket, resting, shard } = self;
        let name = stored.slot.name();
        let _span = span(Row::Copy, || format!("bring {name}")).bytes(bucket.byte_len());
        let rest = match &stored.at {
            At::Rest(rest) => rest,
            At::Files(source) => {
                zero(&mut bucket)?;
                read_rounded(stored.slot.layout(), &mut bucket, &**source)?;
                return Ok(Landed { bucket, _way: [None, None] });
            }
            At::Slot => anyhow::bail!("resident parameters are not brought"),
        };
        let whole = rest.len() == stored.padded_len;
        if whole && let Some(memory) = rest.memory() {
            cast(&memory, &mut bucket)?;
            return Ok(Landed { bucket, _way: [None, None] });
        }
        let Some(resting) = resting else {
            let (bucket, shard) = collect(ranks, stored, rest, bucket, shard)?;
            return Ok(Landed { bucket, _way: [None, shard] });
        };
        let (resting, shard) = collect(ranks, stored, rest, resting, shard)?;
        cast(&resting, &mut bucket)?;
        Ok(Landed { bucket, _way: [Some(resting), shard] })
    }
}

/// All of it into `whole`, which has the dtype in which it rests; through `shard` if it is read from a drive and gathered.
fn collect(
    ranks: &Ranks,
    stored: &Stored,
    rest: &Rest,
    whole: Buffer,
    shard: Option<Buffer>,
) -> Result<(Buffer, Option<Buffer>)> {
    if rest.len() == whole.len() {
        return Ok((read_all(stored, rest, whole)?, None));
    }
    let mut whole = whole;
    let Some(shard) = shard else {
        let memory = rest.memory().context("a shard that rests in memory")?;
        gather(ranks, &memory, &mut whole)?;
        return Ok((whole, None));
    };
    let shard = read_all(stored, rest, shard)?;
    gather(ranks, &shard, &mut whole)?;
    Ok((whole, Some(shard)))
}

/// All that rests here, from where it was read early if it was.
fn read_all(stored: &Stored, rest: &Rest, mut into: Buffer) -> Result<Buffer> {
    match stored.early.get() {
        Some(early) if early.take(&mut into)? => Ok(into),
        _ => rest.read_all(into),
    }
}

/// Makes what the owners changed visible in every rank's resident copy.
pub(super) fn publish(ranks: &Ranks, tiers: &Tiers, stored: &Stored) -> Result<()> {
    let _span = span(Row::Copy, || format!("publish {}", stored.slot.name()));
    let range = ranks.partition().shard(stored.padded_len);
    let gathered = stored.slot.update(|whole| {
        let mut shard = tiers.device.parameters.alloc_dirty(whole.dtype(), range.len(), stored.slot.name())?;
        cast_range(whole, range.clone(), &mut shard, 0..range.len())?;
        gather(ranks, &shard, whole)
    })?;
    gathered.context("publishing what the optimizer changed")
}

/// Reads a whole bucket and rounds it to the buffer's dtype; padding stays zero.
pub(super) fn read_rounded(layout: &BucketLayout, buffer: &mut Buffer, source: &dyn WeightSource) -> Result<()> {
    if buffer.dtype() == DType::F32 && buffer.accelerator().is_none() {
        return read_range(layout, 0, buffer.as_mut_slice(), source);
    }
    // In pieces, so that no fp32 copy of the whole bucket is ever needed.
    const PIECE: usize = 1 << 18;
    let mut piece = vec![0f32; PIECE.min(buffer.len())];
    for start in (0..buffer.len()).step_by(PIECE) {
        let end = (start + PIECE).min(buffer.len());
        let values = &mut piece[..end - start];
        values.fill(0.0);
        read_range(layout, start, values, source)?;
        round(values, buffer, start..end)?;
    }
    Ok(())
}

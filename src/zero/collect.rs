//! Collectives over buffers, wherever they lie. Where the accelerators of a group do them themselves, that is their way.
//! Else their memory goes through the host's, piece by piece: the same sums, taken in the same order, as if it were the
//! host's own.

use std::ops::Range;

use anyhow::Result;
use candle_core::DType;

use super::Ranks;
use crate::comm::{Operation, Scalar, Slice, SliceMut};
use crate::device::Buffer;
use crate::device::bulk::{cast_range, read_bytes, write_bytes};

/// Elements of a rank that pass through the host at a time.
const PIECE: usize = 1 << 18;

/// Everyone's `shard`, one after the other.
pub(super) fn gather(ranks: &Ranks, shard: &Buffer, whole: &mut Buffer) -> Result<()> {
    if whole.accelerator().is_none() && shard.accelerator().is_none() {
        return ranks.comm.all_gather(slice(shard), slice_mut(whole));
    }
    let (len, size, dtype) = (shard.len(), shard.dtype().size_in_bytes(), shard.dtype());
    if let Some(far) = ranks.comm.far()
        && let Some((to, free)) = whole.beside()?
    {
        let (from, ready) = match shard.beside()? {
            Some(there) => there,
            // Into its place first.
            None => {
                let at = ranks.comm.rank() * len;
                cast_range(shard, 0..len, whole, at..at + len)?;
                (to.at(at * size), free.clone())
            }
        };
        return far.collect(Operation::all_gather(scalar(dtype), len, from, to), &[&ready, &free], "parameters");
    }
    for piece in pieces(len) {
        let mut mine = Buffer::unbudgeted(dtype, piece.len())?;
        let mut all = Buffer::unbudgeted(dtype, piece.len() * ranks.comm.world_size())?;
        read_bytes(shard, piece.start * size, mine.bytes_mut())?;
        ranks.comm.all_gather(slice(&mine), slice_mut(&mut all))?;
        for (rank, part) in all.bytes().chunks(mine.byte_len()).enumerate() {
            write_bytes(part, whole, (rank * len + piece.start) * size)?;
        }
    }
    Ok(())
}

/// The sum over the ranks of each one's part of `whole`: this rank's part.
pub(super) fn reduce_scatter(ranks: &Ranks, whole: &Buffer, part: &mut Buffer) -> Result<()> {
    if whole.accelerator().is_none() && part.accelerator().is_none() {
        return ranks.comm.reduce_scatter(slice(whole), slice_mut(part));
    }
    let (len, size, dtype) = (part.len(), part.dtype().size_in_bytes(), part.dtype());
    if let Some(far) = ranks.comm.far()
        && let (Some((from, ready)), Some((to, free))) = (whole.beside()?, part.beside()?)
    {
        return far.collect(Operation::reduce_scatter(scalar(dtype), len, from, to), &[&ready, &free], "gradients");
    }
    for piece in pieces(len) {
        let mut all = Buffer::unbudgeted(dtype, piece.len() * ranks.comm.world_size())?;
        let mut mine = Buffer::unbudgeted(dtype, piece.len())?;
        for (rank, part) in all.bytes_mut().chunks_mut(piece.len() * size).enumerate() {
            read_bytes(whole, (rank * len + piece.start) * size, part)?;
        }
        ranks.comm.reduce_scatter(slice(&all), slice_mut(&mut mine))?;
        write_bytes(mine.bytes(), part, piece.start * size)?;
    }
    Ok(())
}

/// The sum of everyone's `data`, to everyone, in its place.
pub(super) fn all_reduce(ranks: &Ranks, data: &mut Buffer) -> Result<()> {
    if data.accelerator().is_none() {
        return ranks.comm.all_reduce(slice_mut(data));
    }
    if let Some(far) = ranks.comm.far()
        && let Some((at, ready)) = data.beside()?
    {
        let operation = Operation::all_reduce(scalar(data.dtype()), data.len(), at);
        return far.collect(operation, &[&ready], "gradients");
    }
    let size = data.dtype().size_in_bytes();
    for piece in pieces(data.len()) {
        let mut here = Buffer::unbudgeted(data.dtype(), piece.len())?;
        read_bytes(data, piece.start * size, here.bytes_mut())?;
        ranks.comm.all_reduce(slice_mut(&mut here))?;
        write_bytes(here.bytes(), data, piece.start * size)?;
    }
    Ok(())
}

fn pieces(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len.div_ceil(PIECE)).map(move |k| k * PIECE..((k + 1) * PIECE).min(len))
}

fn scalar(dtype: DType) -> Scalar {
    match dtype {
        DType::BF16 => Scalar::BF16,
        DType::F16 => Scalar::F16,
        _ => Scalar::F32,
    }
}

fn slice(buffer: &Buffer) -> Slice<'_> {
    match buffer.dtype() {
        DType::BF16 => Slice::BF16(buffer.as_slice()),
        DType::F16 => Slice::F16(buffer.as_slice()),
        _ => Slice::F32(buffer.as_slice()),
    }
}

fn slice_mut(buffer: &mut Buffer) -> SliceMut<'_> {
    match buffer.dtype() {
        DType::BF16 => SliceMut::BF16(buffer.as_mut_slice()),
        DType::F16 => SliceMut::F16(buffer.as_mut_slice()),
        _ => SliceMut::F32(buffer.as_mut_slice()),
    }
}

//! Whole buffers and ranges of them, wherever they lie: filled, copied, converted, added. The processor does it where all
//! memory is its own, kernels where all is an accelerator's, and between the two there are copies, in pieces where values
//! are also converted. What kernels do is put into the accelerator's row of work; copies between it and the host have
//! ended when these functions return. The bits are the same wherever something lies.

mod staging;

use std::ops::Range;

use anyhow::{Result, ensure};
use candle_core::DType;
use half::{bf16, f16};

use super::threads::{add, fill_zero_bytes, for_parts};
use super::{Buffer, Element};
use crate::kernels::{glue, reduce};

/// Elements that are converted at a time between two memories.
const PIECE: usize = 1 << 20;

/// Zeroes all of it.
pub fn zero(buffer: &mut Buffer) -> Result<()> {
    let bytes = buffer.byte_len();
    match buffer.far() {
        Some(far) => far.on.clone().zero(far.address(), bytes),
        None => {
            fill_zero_bytes(buffer.bytes_mut());
            Ok(())
        }
    }
}

/// A whole buffer into another one of the same length and any dtype, rounded to nearest.
pub fn cast(from: &Buffer, into: &mut Buffer) -> Result<()> {
    let len = into.len();
    cast_range(from, 0..from.len(), into, 0..len)
}

/// Elements `range` of one into elements `at` of the other.
pub fn cast_range(from: &Buffer, range: Range<usize>, into: &mut Buffer, at: Range<usize>) -> Result<()> {
    check(from, &range)?;
    check(into, &at)?;
    ensure!(range.len() == at.len(), "a conversion of {} elements to {}", range.len(), at.len());
    let (source, target) = (from.dtype(), into.dtype());
    let (first, to) = (range.start * source.size_in_bytes(), at.start * target.size_in_bytes());
    match (from.far(), into.far()) {
        (None, None) => {
            convert_range(from, range, into, at);
            Ok(())
        }
        (Some(a), Some(b)) => {
            let (x, y) = (a.address().at(first), b.address().at(to));
            if source == target {
                // SAFETY: both ranges were checked, and two buffers do not overlap.
                return unsafe { a.on.copy(x, y, range.len() * source.size_in_bytes()) };
            }
            glue::cast(&*a.on, (source, x), (target, y), range.len(), 1.0)
        }
        (None, Some(_)) if source == target => upload(&from.bytes()[first..][..at.len() * size(source)], into, to),
        (Some(far), None) if source == target => {
            let bytes = range.len() * size(source);
            far.download(first, &mut into.bytes_mut()[to..][..bytes])
        }
        _ => in_pieces(range.len(), |piece| {
            let mut values = vec![0f32; piece.len()];
            widen(from, range.start + piece.start..range.start + piece.end, &mut values)?;
            round(&values, into, at.start + piece.start..at.start + piece.end)
        }),
    }
}

/// Elements `range` as fp32, on the host.
pub fn widen(from: &Buffer, range: Range<usize>, into: &mut [f32]) -> Result<()> {
    check(from, &range)?;
    if let Some(far) = from.far() {
        if from.dtype() == DType::F32 {
            return far.download(4 * range.start, bytemuck::cast_slice_mut(into));
        }
        return in_pieces(range.len(), |piece| {
            let mut here = Buffer::unbudgeted(from.dtype(), piece.len())?;
            far.download(size(from.dtype()) * (range.start + piece.start), here.bytes_mut())?;
            widen(&here, 0..piece.len(), &mut into[piece])
        });
    }
    match from.dtype() {
        DType::F32 => convert(&from.as_slice::<f32>()[range], into),
        DType::BF16 => convert(&from.as_slice::<bf16>()[range], into),
        _ => convert(&from.as_slice::<f16>()[range], into),
    }
    Ok(())
}

/// The host's `values`, rounded to nearest, as elements `range`.
pub fn round(values: &[f32], into: &mut Buffer, range: Range<usize>) -> Result<()> {
    check(into, &range)?;
    if into.far().is_some() {
        let dtype = into.dtype();
        if dtype == DType::F32 {
            return upload(bytemuck::cast_slice(values), into, 4 * range.start);
        }
        return in_pieces(values.len(), |piece| {
            let mut here = Buffer::unbudgeted(dtype, piece.len())?;
            round(&values[piece.clone()], &mut here, 0..piece.len())?;
            upload(here.bytes(), into, size(dtype) * (range.start + piece.start))
        });
    }
    match into.dtype() {
        DType::F32 => convert(values, &mut into.as_mut_slice::<f32>()[range]),
        DType::BF16 => convert(values, &mut into.as_mut_slice::<bf16>()[range]),
        _ => convert(values, &mut into.as_mut_slice::<f16>()[range]),
    }
    Ok(())
}

/// Adds fp32 `values` to all of `sum`; each sum is taken in fp32 and rounded once. `fresh`: the sum was nothing.
pub fn accumulate(sum: &mut Buffer, values: &Buffer, fresh: bool) -> Result<()> {
    let len = sum.len();
    ensure!(values.len() == len && values.dtype() == DType::F32, "a sum of buffers that are not alike");
    if fresh && sum.dtype() == DType::F32 && (sum.far().is_none() != values.far().is_none()) {
        // Zero plus a number is that number, but for the sign of zero, which the next sum forgets.
        cast(values, sum)?;
        return plus_zero(sum);
    }
    match (sum.far(), values.far()) {
        (Some(to), Some(from)) => {
            let (on, dtype) = (to.on.clone(), sum.dtype());
            let (x, y) = (from.address(), to.address());
            if fresh {
                on.zero(y, len * size(dtype))?;
            }
            glue::accumulate(&*on, (DType::F32, x), (dtype, y), len, 1.0)
        }
        (None, None) => {
            add_here(sum, 0..len, values.as_slice(), fresh);
            Ok(())
        }
        (None, Some(far)) => staging::with(&far.on, PIECE.min(len), |here| {
            in_pieces(len, |piece| {
                let here = &mut here[..piece.len()];
                widen(values, piece.clone(), here)?;
                add_here(sum, piece, here, fresh);
                Ok(())
            })
        }),
        (Some(_), None) => in_pieces(len, |piece| {
            let mut here = vec![0f32; piece.len()];
            if !fresh {
                widen(sum, piece.clone(), &mut here)?;
            }
            here.iter_mut().zip(&values.as_slice::<f32>()[piece.clone()]).for_each(|(sum, value)| *sum += value);
            round(&here, sum, piece)
        }),
    }
}

/// The sum of squares of elements `range`, in fp64, into the eight bytes of `total`.
pub fn sum_of_squares(values: &Buffer, range: Range<usize>, total: &mut Buffer) -> Result<()> {
    check(values, &range)?;
    ensure!(total.byte_len() == 8, "a sum of squares takes eight bytes");
    let (Some(far), Some(to)) = (values.far(), total.far()) else {
        ensure!(values.far().is_none() && total.far().is_none(), "a sum of squares beside its values");
        let sum = match values.dtype() {
            DType::BF16 => squares(&values.as_slice::<bf16>()[range]),
            _ => squares(&values.as_slice::<f32>()[range]),
        };
        total.bytes_mut().copy_from_slice(&sum.to_le_bytes());
        return Ok(());
    };
    let at = far.address().at(range.start * size(values.dtype()));
    reduce::sum_of_squares(&*far.on, values.dtype(), at, range.len(), to.address())
}

/// The bytes of a small buffer, on the host.
pub fn bytes(from: &Buffer) -> Result<Vec<u8>> {
    let mut here = vec![0u8; from.byte_len()];
    read_bytes(from, 0, &mut here)?;
    Ok(here)
}

/// Bytes from byte `at` on, to the host.
pub fn read_bytes(from: &Buffer, at: usize, into: &mut [u8]) -> Result<()> {
    ensure!(at + into.len() <= from.byte_len(), "a copy beyond the end of a buffer");
    match from.far() {
        Some(far) => far.download(at, into),
        None => {
            into.copy_from_slice(&from.bytes()[at..at + into.len()]);
            Ok(())
        }
    }
}

/// The host's bytes, from byte `at` on.
pub fn write_bytes(bytes: &[u8], into: &mut Buffer, at: usize) -> Result<()> {
    ensure!(at + bytes.len() <= into.byte_len(), "a copy beyond the end of a buffer");
    match into.far().is_some() {
        true => upload(bytes, into, at),
        false => {
            into.bytes_mut()[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        }
    }
}

fn upload(bytes: &[u8], into: &mut Buffer, at: usize) -> Result<()> {
    into.far_mut().map_or(Ok(()), |far| far.upload(bytes, at))
}

fn check(buffer: &Buffer, range: &Range<usize>) -> Result<()> {
    ensure!(range.start <= range.end && range.end <= buffer.len(), "{range:?} of a buffer of {}", buffer.len());
    Ok(())
}

fn size(dtype: DType) -> usize {
    dtype.size_in_bytes()
}

fn in_pieces(len: usize, mut work: impl FnMut(Range<usize>) -> Result<()>) -> Result<()> {
    (0..len.div_ceil(PIECE)).try_for_each(|k| work(k * PIECE..((k + 1) * PIECE).min(len)))
}

/// Makes a negative zero a positive one, as adding to zero does.
fn plus_zero(sum: &mut Buffer) -> Result<()> {
    let len = sum.len();
    match sum.far() {
        Some(far) => {
            let at = far.address();
            glue::affine(&*far.on, DType::F32, at, at, len, 1.0, 0.0)
        }
        None => {
            const PART: usize = 1 << 18;
            let parts = sum.as_mut_slice::<f32>().chunks_mut(PART).collect();
            for_parts(parts, len, |_, part: &mut [f32]| part.iter_mut().for_each(|x| *x += 0.0));
            Ok(())
        }
    }
}

/// `sum[range] += values`, on the host.
fn add_here(sum: &mut Buffer, range: Range<usize>, values: &[f32], fresh: bool) {
    if sum.dtype() == DType::F32 {
        let sum = &mut sum.as_mut_slice::<f32>()[range];
        if fresh {
            super::threads::fill_zero(sum);
        }
        return add(sum, values);
    }
    const PART: usize = 1 << 16;
    let cost = values.len();
    let parts = sum.as_mut_slice::<bf16>()[range].chunks_mut(PART).zip(values.chunks(PART)).collect();
    for_parts(parts, cost, |_, (sum, values): (&mut [bf16], &[f32])| {
        for (sum, value) in sum.iter_mut().zip(values) {
            let before = if fresh { 0.0 } else { sum.to_f32() };
            *sum = bf16::from_f32(before + value);
        }
    });
}

fn convert_range(from: &Buffer, range: Range<usize>, into: &mut Buffer, at: Range<usize>) {
    match from.dtype() {
        DType::F32 => convert_half::<f32>(&from.as_slice()[range], into, at),
        DType::BF16 => convert_half::<bf16>(&from.as_slice()[range], into, at),
        DType::F16 => convert_half::<f16>(&from.as_slice()[range], into, at),
        _ => into.bytes_mut()[at].copy_from_slice(&from.bytes()[range]),
    }
}

fn convert_half<A: Element>(from: &[A], into: &mut Buffer, at: Range<usize>) {
    match into.dtype() {
        DType::F32 => convert(from, &mut into.as_mut_slice::<f32>()[at]),
        DType::BF16 => convert(from, &mut into.as_mut_slice::<bf16>()[at]),
        _ => convert(from, &mut into.as_mut_slice::<f16>()[at]),
    }
}

fn convert<A: Element, B: Element>(from: &[A], into: &mut [B]) {
    const PART: usize = 1 << 18;
    assert_eq!(from.len(), into.len(), "conversion between different lengths");
    let cost = from.len();
    let parts = into.chunks_mut(PART).zip(from.chunks(PART)).collect();
    for_parts(parts, cost, |_, (into, from): (&mut [B], &[A])| {
        into.iter_mut().zip(from).for_each(|(to, from)| *to = B::from_f32(from.to_f32()));
    });
}

/// In pieces of fixed size, so that the number of threads does not show.
fn squares<T: Element>(values: &[T]) -> f64 {
    const PIECE: usize = 1 << 14;
    let pieces = values.len().div_ceil(PIECE);
    let sums: Vec<std::sync::Mutex<f64>> = (0..pieces).map(|_| std::sync::Mutex::new(0.0)).collect();
    super::threads::parallel_for(pieces, values.len(), |p| {
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

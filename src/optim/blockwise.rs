//! Blockwise 8-bit quantisation as bitsandbytes defines it: 256 numbers share a scale, their largest magnitude, and each
//! is the nearest of 256 numbers of a code book (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022).
//!
//! Codes and scales are those of its `quantize_blockwise` in PyTorch (the "default" backend) to the bit: scaled by the
//! rounded reciprocal of the scale, ties to the smaller number. Its CUDA kernels find the same codes but for ties. Its
//! compiled CPU library looks up one of 65,536 steps instead, so that there small numbers get wrong codes, and zero gets
//! a code that is not zero's; that is not followed: padding must stay zero.

use super::code_book::{Book, CodeBook, ONE, SHARED, ZERO_OF_M};
use super::lanes::{Lanes, MAGNITUDE, Portable};
use super::level::{Kernel, Level};
use crate::device::BLOCK;
use crate::device::threads::for_parts;

/// What a block is multiplied with before its codes are looked up. Blocks of less than 1e-38 are not scaled up to 1.
#[inline(always)]
pub fn reciprocal(absmax: f32) -> f32 {
    1.0 / absmax.max(1e-38)
}

/// `codes` and `absmax` (one a block of 256, the last may be shorter) for `values`, all of which are finite.
pub fn quantize(book: Book, values: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    assert!(codes.len() == values.len() && absmax.len() == values.len().div_ceil(BLOCK));
    const PIECE: usize = 64;
    let parts = values.chunks(PIECE * BLOCK).zip(codes.chunks_mut(PIECE * BLOCK)).zip(absmax.chunks_mut(PIECE));
    for_parts(parts.collect(), 4 * values.len(), |_, ((values, codes), absmax)| {
        Level::best().run(Quantize { book: book.codes(), signed: book == Book::Signed, values, codes, absmax });
    });
}

/// The numbers that `codes` and `absmax` stand for.
pub fn dequantize(book: Book, codes: &[u8], absmax: &[f32], values: &mut [f32]) {
    assert!(codes.len() == values.len() && absmax.len() == values.len().div_ceil(BLOCK));
    let book = book.codes();
    for ((codes, absmax), values) in codes.chunks(BLOCK).zip(absmax).zip(values.chunks_mut(BLOCK)) {
        for (x, &code) in values.iter_mut().zip(codes) {
            *x = book.values[usize::from(code)] * absmax;
        }
    }
}

struct Quantize<'a> {
    book: &'a CodeBook,
    signed: bool,
    values: &'a [f32],
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl Kernel for Quantize<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let blocks = self.values.chunks(BLOCK).zip(self.codes.chunks_mut(BLOCK)).zip(self.absmax);
        for ((values, codes), absmax) in blocks {
            let whole = values.len() / L::N * L::N;
            // SAFETY: inside `vectorize`.
            unsafe {
                let most = most::<L>(&values[..whole]).max(most::<Portable>(&values[whole..]));
                *absmax = f32::from_bits(most);
                let (now, rest) = codes.split_at_mut(whole);
                round::<L>(self.book, self.signed, reciprocal(*absmax), &values[..whole], now);
                round::<Portable>(self.book, self.signed, reciprocal(*absmax), &values[whole..], rest);
            }
        }
    }
}

/// The bits of the largest magnitude. A multiple of the lanes.
#[inline(always)]
unsafe fn most<L: Lanes>(values: &[f32]) -> u32 {
    // SAFETY: called inside `vectorize`, and a chunk is a vector.
    unsafe {
        let mut most = L::splat_int(0);
        for x in values.chunks_exact(L::N) {
            most = L::max_int(most, L::and(L::bits(L::load(x.as_ptr())), L::splat_int(MAGNITUDE)));
        }
        L::most(most)
    }
}

/// The codes of a block's numbers, a multiple of the lanes.
#[inline(always)]
unsafe fn round<L: Lanes>(book: &CodeBook, signed: bool, scale: f32, values: &[f32], codes: &mut [u8]) {
    for (x, code) in values.chunks_exact(L::N).zip(codes.chunks_exact_mut(L::N)) {
        // SAFETY: called inside `vectorize`, and a chunk is a vector.
        unsafe {
            let x = L::mul(L::load(x.as_ptr()), L::splat(scale));
            let found = if signed { signed_code::<L>(book, x) } else { unsigned_code::<L>(book, x) };
            L::store_bytes(code.as_mut_ptr(), found);
        }
    }
}

/// The numbers of as many codes as there are lanes.
///
/// # Safety
/// As [`Lanes::load_bytes`].
#[inline(always)]
pub unsafe fn value<L: Lanes>(book: &CodeBook, codes: *const u8) -> L::F {
    // SAFETY: the caller's promise; every code has its number.
    unsafe { L::float(L::gather(book.values.as_ptr().cast(), L::load_bytes(codes))) }
}

/// How many borders lie below a magnitude, given by its bits, which are at most those of 1.0 and one more.
#[inline(always)]
unsafe fn borders_below<L: Lanes>(book: &CodeBook, magnitude: L::I) -> L::I {
    // SAFETY: called inside `vectorize`; the index is of a run of the table, which goes from the lowest one to 1.0.
    unsafe {
        let magnitude = L::max_int(magnitude, L::splat_int(book.lowest));
        let run = L::shift::<SHARED>(L::sub_int(magnitude, L::splat_int(book.lowest)));
        let entry = L::gather(book.steps_below().as_ptr(), run);
        let border = L::shift::<8>(entry);
        let below = L::and(entry, L::splat_int(0xff));
        let lower = L::and(magnitude, L::splat_int((1 << SHARED) - 1));
        L::where_above(lower, border, L::add_int(below, L::splat_int(1)), below)
    }
}

/// The codes of second moments over their block's largest; what is above 1 counts as 1.
///
/// # Safety
/// Inside [`Lanes::vectorize`].
#[inline(always)]
pub unsafe fn unsigned_code<L: Lanes>(book: &CodeBook, x: L::F) -> L::I {
    // SAFETY: the caller's promise.
    unsafe {
        let magnitude = L::and(L::bits(x), L::splat_int(MAGNITUDE));
        borders_below::<L>(book, L::min_int(magnitude, L::splat_int(ONE)))
    }
}

/// The codes of first moments over their block's largest magnitude; what is beyond 1 counts as 1.
///
/// # Safety
/// Inside [`Lanes::vectorize`].
#[inline(always)]
pub unsafe fn signed_code<L: Lanes>(book: &CodeBook, x: L::F) -> L::I {
    // SAFETY: the caller's promise.
    unsafe {
        let zero = L::splat_int(0);
        let magnitude = L::and(L::bits(x), L::splat_int(MAGNITUDE));
        let negative = L::shift::<31>(L::bits(x));
        // A tie goes to the smaller number, for a negative one to the larger magnitude: as if it were a little larger.
        let magnitude = L::add_int(L::min_int(magnitude, L::splat_int(ONE)), negative);
        let steps = borders_below::<L>(book, magnitude);
        let mask = L::sub_int(zero, negative);
        let steps = L::sub_int(L::xor(steps, mask), mask);
        // There is no number below the smallest one, but one more above zero.
        L::max_int(L::add_int(L::splat_int(u32::from(ZERO_OF_M)), steps), zero)
    }
}

//! Blockwise 8-bit quantisation as bitsandbytes defines it: 256 numbers share a scale, their largest magnitude, and each
//! is the nearest of 256 numbers of a code book (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022).
//!
//! Codes and scales are those of its `quantize_blockwise` in PyTorch (the "default" backend) to the bit: scaled by the
//! rounded reciprocal of the scale, ties to the smaller number. Its CUDA kernels find the same codes but for ties. Its
//! compiled CPU library looks up one of 65,536 steps instead, so that there small numbers get wrong codes, and zero gets
//! a code that is not zero's; that is not followed: padding must stay zero.

use super::code_book::{Book, CodeBook, ONE, SHARED, ZERO_OF_M};
use super::lanes::{Kernel, Lanes, MAGNITUDE, Portable};
use super::level::Level;
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

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    /// A tensor of `tests/data/optim/blockwise.safetensors`, see `make.py` beside it.
    fn recorded<T: bytemuck::Pod>(name: &str) -> Vec<T> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/optim/blockwise.safetensors");
        let bytes = std::fs::read(path).unwrap();
        bytemuck::pod_collect_to_vec(SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap().data())
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| x.to_bits()).collect()
    }

    const BOOKS: [(Book, &str); 2] = [(Book::Signed, "signed"), (Book::Unsigned, "unsigned")];

    #[test]
    fn books_codes_scales_and_numbers_are_the_peers() {
        for (book, name) in BOOKS {
            let of = |what: &str| recorded::<f32>(&format!("{name}.{what}"));
            let codes: Vec<u8> = recorded(&format!("{name}.codes"));
            assert_eq!(bits(&book.codes().values), bits(&of("book")), "{name}");
            let values = of("values");
            for level in Level::available() {
                let (mut found, mut absmax) = (vec![0; values.len()], vec![0.0; codes.len() / BLOCK]);
                let signed = book == Book::Signed;
                let (codes_out, scales) = (&mut found[..], &mut absmax[..]);
                level.run(Quantize { book: book.codes(), signed, values: &values, codes: codes_out, absmax: scales });
                assert_eq!(bits(&absmax), bits(&of("absmax")), "{name} {level:?}");
                let wrong = found.iter().zip(&codes).position(|(a, b)| a != b);
                assert_eq!(wrong.map(|i| (i, values[i], found[i], codes[i])), None, "{name} {level:?}");
            }
            let mut back = vec![0.0; values.len()];
            dequantize(book, &codes, &of("absmax"), &mut back);
            assert_eq!(bits(&back), bits(&of("back")), "{name}");
        }
    }

    /// Against a search through the borders: numbers of every exponent, and around every border.
    #[test]
    fn the_table_finds_what_a_search_finds() {
        for (book, _) in BOOKS {
            let values = &book.codes().values;
            let borders: Vec<f32> = values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
            let mut x: Vec<f32> = (0..=0x3f80_0000 >> 9).map(|i: u32| f32::from_bits((i << 9) | (i % 509))).collect();
            x.extend(borders.iter().flat_map(|b| [b.next_down(), *b, b.next_up()]));
            if book == Book::Signed {
                x.extend(x.clone().iter().map(|x| -x));
            } else {
                x.retain(|x| x.is_sign_positive());
            }
            x.resize(x.len().next_multiple_of(16), 0.0);
            for level in Level::available() {
                let mut codes = vec![0; x.len()];
                level.run(Round { book: book.codes(), signed: book == Book::Signed, values: &x, codes: &mut codes });
                for (x, &code) in x.iter().zip(&codes) {
                    assert_eq!(usize::from(code), borders.partition_point(|b| b < x), "{x:e} {book:?} {level:?}");
                }
            }
        }
    }

    struct Round<'a> {
        book: &'a CodeBook,
        signed: bool,
        values: &'a [f32],
        codes: &'a mut [u8],
    }

    impl Kernel for Round<'_> {
        type Output = ();
        #[inline(always)]
        unsafe fn run<L: Lanes>(self) {
            // SAFETY: inside `vectorize`.
            unsafe { round::<L>(self.book, self.signed, 1.0, self.values, self.codes) }
        }
    }

    #[test]
    fn a_short_block_and_zeros_are_blocks_too() {
        let mut values: Vec<f32> = (0..BLOCK + 3).map(|i| i as f32 - 100.0).collect();
        values[BLOCK..].fill(0.0);
        let (mut codes, mut absmax) = (vec![7; values.len()], [9.0; 2]);
        quantize(Book::Signed, &values, &mut codes, &mut absmax);
        assert_eq!(absmax, [155.0, 0.0]);
        assert_eq!((codes[100], codes[255], &codes[BLOCK..]), (ZERO_OF_M, 255, &[ZERO_OF_M; 3][..]));
        let mut back = vec![1.0; values.len()];
        dequantize(Book::Signed, &codes, &absmax, &mut back);
        assert!(back[BLOCK..].iter().all(|x| x.to_bits() == 0) && back[255] == 155.0);
    }
}

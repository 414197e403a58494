//! AVX-512 and AVX2 (with FMA and F16C) behind [`Simd`].

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::simd::{MOST_LANES, Simd, get_some, put_some};
use crate::device::Element;

#[derive(Clone, Copy)]
pub struct Avx512;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
#[inline(never)]
unsafe fn with_avx512<R>(f: impl FnOnce() -> R) -> R {
    f()
}

// SAFETY: each method is the intrinsic that reads or writes what the trait says.
unsafe impl Simd for Avx512 {
    const LANES: usize = 16;
    const ROWS: usize = 14;
    type V = __m512;

    #[inline(always)]
    unsafe fn vectorize<R>(f: impl FnOnce() -> R) -> R {
        // SAFETY: the CPU has the instructions, the trait's condition.
        unsafe { with_avx512(f) }
    }
    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the trait's condition, here and below.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_where(from: *const f32, lanes: u16) -> __m512 {
        // SAFETY: masked lanes are not read.
        unsafe { _mm512_maskz_loadu_ps(lanes, from) }
    }
    #[inline(always)]
    unsafe fn load_bf16_where(from: *const bf16, lanes: u16) -> __m512 {
        // SAFETY: masked lanes are not read; bf16 is the upper half of an f32.
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
        }
    }
    #[inline(always)]
    unsafe fn load_f16_where(from: *const f16, lanes: u16) -> __m512 {
        // SAFETY: masked lanes are not read.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from.cast())) }
    }
    #[inline(always)]
    unsafe fn gather_where(from: *const f32, index: &[i32; MOST_LANES], lanes: u16) -> __m512 {
        // SAFETY: masked lanes are not read.
        unsafe {
            let index = _mm512_loadu_si512(index.as_ptr().cast());
            _mm512_mask_i32gather_ps::<4>(_mm512_setzero_ps(), lanes, index, from.cast())
        }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m512) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn store_where(to: *mut f32, lanes: u16, v: __m512) {
        // SAFETY: masked lanes are not written.
        unsafe { _mm512_mask_storeu_ps(to, lanes, v) }
    }
    #[inline(always)]
    unsafe fn store_apart(to: *mut f32, lanes: u16, v: __m512) {
        // SAFETY: only every other number is written, and of those only the lanes whose bit is set.
        unsafe {
            let half = |lanes: u16| (0..8).fold(0, |mask, i| mask | (lanes >> i & 1) << (2 * i));
            let low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            let (few, many) = if lanes == u16::MAX { (0x5555, 0x5555) } else { (half(lanes), half(lanes >> 8)) };
            _mm512_mask_storeu_ps(to, few, _mm512_permutexvar_ps(low, v));
            _mm512_mask_storeu_ps(to.wrapping_add(16), many, _mm512_permutexvar_ps(high, v));
        }
    }
    #[inline(always)]
    unsafe fn store_bf16_where(to: *mut bf16, lanes: u16, v: __m512) {
        // SAFETY: masked lanes are not written. Half of the last place is added, less one bit where that place is even;
        // what is not a number keeps its upper half and becomes quiet.
        unsafe {
            let bits = _mm512_castps_si512(v);
            let high = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
            let rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32::<16>(up), nan, quiet);
            _mm256_mask_storeu_epi16(to.cast(), lanes, _mm512_cvtepi32_epi16(rounded));
        }
    }
    #[inline(always)]
    unsafe fn store_f16_where(to: *mut f16, lanes: u16, v: __m512) {
        // SAFETY: masked lanes are not written.
        unsafe { _mm256_mask_storeu_epi16(to.cast(), lanes, _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> __m512 {
        // SAFETY: as above; bf16 is the upper half of an f32.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const f32) {
        // SAFETY: a hint; it cannot fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_far(at: *const f32) {
        // SAFETY: a hint; it cannot fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn transpose(row: impl Fn(usize) -> __m512, mut column: impl FnMut(usize, __m512)) {
        // SAFETY: as above.
        unsafe {
            let mut r = [_mm512_setzero_ps(); 16];
            for (i, r) in r.iter_mut().enumerate() {
                *r = row(i);
            }
            // Pairs of rows, then pairs of pairs, inside each 128-bit lane; then the lanes themselves.
            let mut t = [_mm512_setzero_ps(); 16];
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..4 {
                r[4 * i] = unpack_low(t[4 * i], t[4 * i + 2]);
                r[4 * i + 1] = unpack_high(t[4 * i], t[4 * i + 2]);
                r[4 * i + 2] = unpack_low(t[4 * i + 1], t[4 * i + 3]);
                r[4 * i + 3] = unpack_high(t[4 * i + 1], t[4 * i + 3]);
            }
            // r[4g + c] holds, in lane l, columns 4l + c of rows 4g..4g+4.
            for c in 0..4 {
                let low = _mm512_shuffle_f32x4::<0x88>(r[c], r[4 + c]);
                let high = _mm512_shuffle_f32x4::<0xdd>(r[c], r[4 + c]);
                let low2 = _mm512_shuffle_f32x4::<0x88>(r[8 + c], r[12 + c]);
                let high2 = _mm512_shuffle_f32x4::<0xdd>(r[8 + c], r[12 + c]);
                t[c] = _mm512_shuffle_f32x4::<0x88>(low, low2);
                t[8 + c] = _mm512_shuffle_f32x4::<0xdd>(low, low2);
                t[4 + c] = _mm512_shuffle_f32x4::<0x88>(high, high2);
                t[12 + c] = _mm512_shuffle_f32x4::<0xdd>(high, high2);
            }
            for (j, &t) in t.iter().enumerate() {
                column(j, t);
            }
        }
    }
}

#[inline(always)]
unsafe fn unpack_low(a: __m512, b: __m512) -> __m512 {
    // SAFETY: called with AVX-512 only.
    unsafe { _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))) }
}

#[inline(always)]
unsafe fn unpack_high(a: __m512, b: __m512) -> __m512 {
    // SAFETY: called with AVX-512 only.
    unsafe { _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))) }
}

#[derive(Clone, Copy)]
pub struct Avx2;

#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
unsafe fn with_avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}

// SAFETY: each method is the intrinsic that reads or writes what the trait says.
unsafe impl Simd for Avx2 {
    const LANES: usize = 8;
    const ROWS: usize = 6;
    type V = __m256;

    #[inline(always)]
    unsafe fn vectorize<R>(f: impl FnOnce() -> R) -> R {
        // SAFETY: the CPU has the instructions, the trait's condition.
        unsafe { with_avx2(f) }
    }
    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: the trait's condition, here and below.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_where(from: *const f32, lanes: u16) -> __m256 {
        // SAFETY: masked lanes are not read.
        unsafe { _mm256_maskload_ps(from, eight(lanes)) }
    }
    #[inline(always)]
    unsafe fn load_bf16_where(from: *const bf16, lanes: u16) -> __m256 {
        // SAFETY: reads the lanes whose bit is set.
        unsafe { Self::load(some_of_eight(from, lanes).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_f16_where(from: *const f16, lanes: u16) -> __m256 {
        // SAFETY: reads the lanes whose bit is set.
        unsafe { Self::load(some_of_eight(from, lanes).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn gather_where(from: *const f32, index: &[i32; MOST_LANES], lanes: u16) -> __m256 {
        // SAFETY: masked lanes are not read.
        unsafe {
            let index = _mm256_loadu_si256(index.as_ptr().cast());
            _mm256_mask_i32gather_ps::<4>(_mm256_setzero_ps(), from, index, _mm256_castsi256_ps(eight(lanes)))
        }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m256) {
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn store_where(to: *mut f32, lanes: u16, v: __m256) {
        // SAFETY: masked lanes are not written.
        unsafe { _mm256_maskstore_ps(to, eight(lanes), v) }
    }
    #[inline(always)]
    unsafe fn store_bf16_where(to: *mut bf16, lanes: u16, v: __m256) {
        let mut all = [0f32; 8];
        // SAFETY: writes the lanes whose bit is set.
        unsafe {
            Self::store(all.as_mut_ptr(), v);
            put_some(to, lanes, &all);
        }
    }
    #[inline(always)]
    unsafe fn store_f16_where(to: *mut f16, lanes: u16, v: __m256) {
        // SAFETY: writes the lanes whose bit is set.
        unsafe {
            let mut all = [f16::ZERO; 8];
            let rounded = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v);
            _mm_storeu_si128(all.as_mut_ptr().cast(), rounded);
            for (i, &x) in all.iter().enumerate().filter(|(i, _)| lanes >> i & 1 == 1) {
                *to.add(i) = x;
            }
        }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> __m256 {
        // SAFETY: as above; bf16 is the upper half of an f32.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const f32) {
        // SAFETY: a hint; it cannot fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_far(at: *const f32) {
        // SAFETY: a hint; it cannot fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn transpose(row: impl Fn(usize) -> __m256, mut column: impl FnMut(usize, __m256)) {
        // SAFETY: as above.
        unsafe {
            let mut r = [_mm256_setzero_ps(); 8];
            for (i, r) in r.iter_mut().enumerate() {
                *r = row(i);
            }
            let mut t = [_mm256_setzero_ps(); 8];
            for i in 0..4 {
                t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..2 {
                r[4 * i] = _mm256_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
                r[4 * i + 1] = _mm256_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
                r[4 * i + 2] = _mm256_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
                r[4 * i + 3] = _mm256_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
            }
            for c in 0..4 {
                column(c, _mm256_permute2f128_ps::<0x20>(r[c], r[4 + c]));
            }
            for c in 0..4 {
                column(4 + c, _mm256_permute2f128_ps::<0x31>(r[c], r[4 + c]));
            }
        }
    }
}

/// All ones in the lanes whose bit is set.
#[inline(always)]
unsafe fn eight(lanes: u16) -> __m256i {
    // SAFETY: called with AVX2 only.
    unsafe {
        let bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(lanes as i32), bits), bits)
    }
}

#[inline(always)]
unsafe fn some_of_eight<T: Element>(from: *const T, lanes: u16) -> [f32; 8] {
    let mut some = [0f32; 8];
    // SAFETY: the promise of `load_where`.
    unsafe { get_some(from, lanes, &mut some) };
    some
}

//! AVX-512 and AVX2 (with FMA and F16C) behind [`Lanes`].

use std::arch::x86_64::*;

use half::bf16;

use super::lanes::{Divisor, Kernel, Lanes};

#[derive(Clone, Copy)]
pub struct Avx512;

#[derive(Clone, Copy)]
pub struct Avx2;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
#[inline(never)]
unsafe fn with_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller has seen that the CPU has the instructions.
    unsafe { kernel.run::<Avx512>() }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
unsafe fn with_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller has seen that the CPU has the instructions.
    unsafe { kernel.run::<Avx2>() }
}

/// Methods that are an intrinsic or a few.
macro_rules! methods {
    ($($name:ident($($argument:ident: $of:ty),*) $(-> $result:ty)? = $body:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name($($argument: $of),*) $(-> $result)? {
            // SAFETY: the CPU has the instructions and pointers are valid for a vector, the trait's conditions.
            unsafe { $body }
        }
    )*};
}

// SAFETY: each method is the intrinsic that reads or writes what the trait says.
unsafe impl Lanes for Avx512 {
    const N: usize = 16;
    type F = __m512;
    type I = __m512i;

    #[inline(always)]
    unsafe fn vectorize<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the CPU has the instructions, the trait's condition.
        unsafe { with_avx512(kernel) }
    }

    #[inline(always)]
    unsafe fn shift<const BITS: i32>(a: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(BITS)) }
    }

    methods! {
        load(from: *const f32) -> __m512 = _mm512_loadu_ps(from);
        load_bf16(from: *const bf16) -> __m512 = {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
        };
        load_bytes(from: *const u8) -> __m512i = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
        store(to: *mut f32, x: __m512) = _mm512_storeu_ps(to, x);
        store_f16(to: *mut u16, x: __m512, past: bool) =
            put_words(to, _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x), past);
        store_words(to: *mut u16, x: __m512i, past: bool) = put_words(to, _mm512_cvtepi32_epi16(x), past);
        fence() = _mm_sfence();
        prefetch(at: *const u8) = _mm_prefetch::<_MM_HINT_T0>(at.cast());
        store_bytes(to: *mut u8, x: __m512i) = _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(x));
        gather(table: *const u32, index: __m512i) -> __m512i = _mm512_i32gather_epi32::<4>(index, table.cast());
        splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        sqrt(a: __m512) -> __m512 = _mm512_sqrt_ps(a);
        divide(a: __m512, by: &Divisor) -> __m512 = {
            if by.exact {
                let (high, value) = (_mm512_set1_ps(by.high), _mm512_set1_ps(by.value));
                let quotient = _mm512_fmadd_ps(a, high, _mm512_mul_ps(a, _mm512_set1_ps(by.low)));
                let left = _mm512_fnmadd_ps(quotient, value, a);
                // What is not finite stays what it is; infinity less infinity would be no number.
                let finite = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, _mm512_set1_ps(f32::INFINITY));
                _mm512_mask_blend_ps(finite, a, _mm512_fmadd_ps(left, high, quotient))
            } else {
                _mm512_div_ps(a, _mm512_set1_ps(by.value))
            }
        };
        bits(x: __m512) -> __m512i = _mm512_castps_si512(x);
        float(x: __m512i) -> __m512 = _mm512_castsi512_ps(x);
        numbers() -> __m512i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        splat_int(x: u32) -> __m512i = _mm512_set1_epi32(x as i32);
        add_int(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
        sub_int(a: __m512i, b: __m512i) -> __m512i = _mm512_sub_epi32(a, b);
        mul_int(a: __m512i, b: __m512i) -> __m512i = _mm512_mullo_epi32(a, b);
        and(a: __m512i, b: __m512i) -> __m512i = _mm512_and_si512(a, b);
        or(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512(a, b);
        xor(a: __m512i, b: __m512i) -> __m512i = _mm512_xor_si512(a, b);
        max_int(a: __m512i, b: __m512i) -> __m512i = _mm512_max_epi32(a, b);
        min_int(a: __m512i, b: __m512i) -> __m512i = _mm512_min_epi32(a, b);
        where_above(a: __m512i, b: __m512i, yes: __m512i, no: __m512i) -> __m512i =
            _mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(a, b), no, yes);
        where_nan(x: __m512, yes: __m512i, no: __m512i) -> __m512i =
            _mm512_mask_blend_epi32(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x), no, yes);
        most(a: __m512i) -> u32 = _mm512_reduce_max_epi32(a) as u32;
    }
}

// SAFETY: each method is the intrinsic that reads or writes what the trait says.
unsafe impl Lanes for Avx2 {
    const N: usize = 8;
    type F = __m256;
    type I = __m256i;

    #[inline(always)]
    unsafe fn vectorize<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the CPU has the instructions, the trait's condition.
        unsafe { with_avx2(kernel) }
    }

    #[inline(always)]
    unsafe fn shift<const BITS: i32>(a: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_srli_epi32::<BITS>(a) }
    }

    methods! {
        load(from: *const f32) -> __m256 = _mm256_loadu_ps(from);
        load_bf16(from: *const bf16) -> __m256 = {
            let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
        };
        load_bytes(from: *const u8) -> __m256i = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
        store(to: *mut f32, x: __m256) = _mm256_storeu_ps(to, x);
        store_f16(to: *mut u16, x: __m256, past: bool) =
            put_half_words(to, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x), past);
        store_words(to: *mut u16, x: __m256i, past: bool) = put_half_words(to, words(x), past);
        fence() = _mm_sfence();
        prefetch(at: *const u8) = _mm_prefetch::<_MM_HINT_T0>(at.cast());
        store_bytes(to: *mut u8, x: __m256i) = _mm_storel_epi64(to.cast(), _mm_packus_epi16(words(x), words(x)));
        gather(table: *const u32, index: __m256i) -> __m256i = _mm256_i32gather_epi32::<4>(table.cast(), index);
        splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        sqrt(a: __m256) -> __m256 = _mm256_sqrt_ps(a);
        bits(x: __m256) -> __m256i = _mm256_castps_si256(x);
        float(x: __m256i) -> __m256 = _mm256_castsi256_ps(x);
        numbers() -> __m256i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        splat_int(x: u32) -> __m256i = _mm256_set1_epi32(x as i32);
        add_int(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi32(a, b);
        sub_int(a: __m256i, b: __m256i) -> __m256i = _mm256_sub_epi32(a, b);
        mul_int(a: __m256i, b: __m256i) -> __m256i = _mm256_mullo_epi32(a, b);
        and(a: __m256i, b: __m256i) -> __m256i = _mm256_and_si256(a, b);
        or(a: __m256i, b: __m256i) -> __m256i = _mm256_or_si256(a, b);
        xor(a: __m256i, b: __m256i) -> __m256i = _mm256_xor_si256(a, b);
        max_int(a: __m256i, b: __m256i) -> __m256i = _mm256_max_epi32(a, b);
        min_int(a: __m256i, b: __m256i) -> __m256i = _mm256_min_epi32(a, b);
        where_above(a: __m256i, b: __m256i, yes: __m256i, no: __m256i) -> __m256i =
            _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(a, b));
        where_nan(x: __m256, yes: __m256i, no: __m256i) -> __m256i = {
            let (yes, no) = (_mm256_castsi256_ps(yes), _mm256_castsi256_ps(no));
            _mm256_castps_si256(_mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x)))
        };
        most(a: __m256i) -> u32 = {
            let mut lanes = [0u32; 8];
            _mm256_storeu_si256(lanes.as_mut_ptr().cast(), a);
            lanes.into_iter().fold(i32::MIN, |most, lane| most.max(lane as i32)) as u32
        };
    }
}

/// The low halves of the lanes, in order; the upper ones are zero.
#[inline(always)]
unsafe fn words(x: __m256i) -> __m128i {
    // SAFETY: called where the CPU has AVX2.
    unsafe { _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x)) }
}

/// Sixteen numbers of 16 bits; past the caches if so told, which needs their alignment.
#[inline(always)]
unsafe fn put_words(to: *mut u16, x: __m256i, past: bool) {
    // SAFETY: the caller's promise.
    unsafe { if past { _mm256_stream_si256(to.cast(), x) } else { _mm256_storeu_si256(to.cast(), x) } }
}

/// As [`put_words`], of eight.
#[inline(always)]
unsafe fn put_half_words(to: *mut u16, x: __m128i, past: bool) {
    // SAFETY: the caller's promise.
    unsafe { if past { _mm_stream_si128(to.cast(), x) } else { _mm_storeu_si128(to.cast(), x) } }
}

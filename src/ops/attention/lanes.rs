//! Vectors of sixteen f32 in whatever the processor has, for attention's kernels. The same operations in the same
//! order on every processor, so the same bits.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Numbers in a vector.
pub const LANES: usize = 16;

/// A computation over vectors, compiled once for each kind of them.
pub trait Kernel {
    /// # Safety
    /// The processor has what `V` needs, and the kernel's pointers are as its constructor promises. Implementations are
    /// `inline(always)`, so that they are compiled with the features of the caller.
    unsafe fn run<V: Vector>(self);
}

/// Runs a kernel on the widest vectors of this processor.
///
/// # Safety
/// The kernel's pointers are as its constructor promises.
pub unsafe fn on_vectors(kernel: impl Kernel) {
    // SAFETY: the features are asked for first; the pointers are the caller's promise.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return wide(kernel);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return narrow(kernel);
            }
        }
        kernel.run::<[f32; LANES]>()
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn wide(kernel: impl Kernel) {
    // SAFETY: this function has the features.
    unsafe { kernel.run::<__m512>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn narrow(kernel: impl Kernel) {
    // SAFETY: this function has the features.
    unsafe { kernel.run::<[__m256; 2]>() }
}

/// Sixteen f32.
///
/// # Safety
/// Every method needs the processor features that the type stands for; pointers are valid for sixteen f32.
pub trait Vector: Copy {
    /// Vectors that the registers hold as sums, with room for operands.
    const SUMS: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// self * b + c, rounded once.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    /// self if it is greater, else b.
    unsafe fn max(self, b: Self) -> Self;
    /// The nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// self * 2^n where x >= -126, zero where x < -126; self and self * 2^n are normal numbers.
    unsafe fn scale(self, n: Self, x: Self) -> Self;

    /// 2^x for x <= 0 (or NaN), to 1.1 ulp; zero below 2^-126.
    ///
    /// x = n + r with |r| <= 1/2; 2^r by a polynomial of degree 6 (minimax, relative error 2e-8).
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        const P: [f32; 7] =
            [1.535_334_2e-4, 1.339_890_1e-3, 9.618_438e-3, 5.550_332_4e-2, 0.240_226_48, std::f32::consts::LN_2, 1.0];
        // SAFETY: the caller has the features.
        unsafe {
            let n = self.round();
            let r = self.sub(n);
            let mut p = Self::splat(P[0]);
            for &c in &P[1..] {
                p = p.mul_add(r, Self::splat(c));
            }
            p.scale(n, self)
        }
    }
}

// SAFETY of the blocks below: the callers are compiled for, and run on, a processor with the feature, and give pointers
// to sixteen f32.
#[cfg(target_arch = "x86_64")]
impl Vector for __m512 {
    const SUMS: usize = 24;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        unsafe { _mm512_fmadd_ps(self, b, c) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        unsafe { _mm512_add_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        unsafe { _mm512_sub_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        unsafe { _mm512_mul_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        unsafe { _mm512_max_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self) }
    }
    #[inline(always)]
    unsafe fn scale(self, n: Self, x: Self) -> Self {
        unsafe {
            let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
            _mm512_maskz_scalef_ps(normal, self, n)
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Vector for [__m256; 2] {
    const SUMS: usize = 6;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, self[0]);
            _mm256_storeu_ps(to.add(8), self[1]);
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        unsafe { [_mm256_fmadd_ps(self[0], b[0], c[0]), _mm256_fmadd_ps(self[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        unsafe { [_mm256_add_ps(self[0], b[0]), _mm256_add_ps(self[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        unsafe { [_mm256_sub_ps(self[0], b[0]), _mm256_sub_ps(self[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        unsafe { [_mm256_mul_ps(self[0], b[0]), _mm256_mul_ps(self[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        unsafe { [_mm256_max_ps(self[0], b[0]), _mm256_max_ps(self[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        unsafe { [_mm256_round_ps::<NEAREST>(self[0]), _mm256_round_ps::<NEAREST>(self[1])] }
    }
    #[inline(always)]
    unsafe fn scale(self, n: Self, x: Self) -> Self {
        std::array::from_fn(
            #[inline(always)]
            |i| unsafe {
                let shift = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n[i]));
                let scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(self[i]), shift));
                _mm256_and_ps(scaled, _mm256_cmp_ps::<_CMP_NLT_UQ>(x[i], _mm256_set1_ps(-126.0)))
            },
        )
    }
}

impl Vector for [f32; LANES] {
    const SUMS: usize = 2;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { from.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        std::array::from_fn(|i| self[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] * b[i])
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        std::array::from_fn(|i| if self[i] > b[i] { self[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        self.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn scale(self, n: Self, x: Self) -> Self {
        std::array::from_fn(|i| {
            let scaled = f32::from_bits(self[i].to_bits().wrapping_add((n[i] as i32 as u32) << 23));
            if x[i] < -126.0 { 0.0 } else { scaled }
        })
    }
}

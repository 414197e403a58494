//! What a kernel asks of an instruction set, the choice of one at run time, and the portable one. Every instruction
//! set computes the same bits: lanes never mix in arithmetic, and a product is always fused with its sum.

use std::sync::OnceLock;

use half::{bf16, f16};

use crate::device::Element;

/// An instruction set with vectors of f32.
///
/// # Safety
/// Every method may only be called where the CPU has the instructions, that is below [`dispatch`], and inlined into
/// [`Simd::vectorize`]. Pointers must be valid for what a method says it reads or writes; no alignment is needed.
pub unsafe trait Simd: Copy + Send + Sync + 'static {
    /// f32 per vector.
    const LANES: usize;
    /// Rows of the largest register tile; it is two vectors wide.
    const ROWS: usize;
    type V: Copy;

    /// Runs `f` compiled for this instruction set.
    unsafe fn vectorize<R>(f: impl FnOnce() -> R) -> R;
    unsafe fn zero() -> Self::V;
    unsafe fn splat(value: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    /// The lanes whose bit is set, zero in the others, which are not read and may lie anywhere.
    unsafe fn load_where(from: *const f32, lanes: u16) -> Self::V;
    unsafe fn load_bf16_where(from: *const bf16, lanes: u16) -> Self::V;
    unsafe fn load_f16_where(from: *const f16, lanes: u16) -> Self::V;
    /// Lane i is `from[index[i]]`, for the lanes whose bit is set; zero in the others, which are not read.
    unsafe fn gather_where(from: *const f32, index: &[i32; MOST_LANES], lanes: u16) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    /// Writes only the lanes whose bit is set.
    unsafe fn store_where(to: *mut f32, lanes: u16, v: Self::V);
    /// Rounded to nearest, ties to even; only the lanes whose bit is set.
    unsafe fn store_bf16_where(to: *mut bf16, lanes: u16, v: Self::V);
    /// Rounded to nearest, ties to even; only the lanes whose bit is set.
    unsafe fn store_f16_where(to: *mut f16, lanes: u16, v: Self::V);
    /// Lane i goes to `to[2 * i]`, for the lanes whose bit is set.
    #[inline(always)]
    unsafe fn store_apart(to: *mut f32, lanes: u16, v: Self::V) {
        let mut all = [0f32; MOST_LANES];
        // SAFETY: the caller's promise; `all` takes the longest vector.
        unsafe {
            Self::store(all.as_mut_ptr(), v);
            for (i, &x) in all.iter().enumerate().filter(|(i, _)| lanes >> i & 1 == 1) {
                *to.add(2 * i) = x;
            }
        }
    }
    /// a * b + c with one rounding.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn load_bf16(from: *const bf16) -> Self::V;
    unsafe fn load_f16(from: *const f16) -> Self::V;
    /// Brings the cache line into the first level.
    unsafe fn prefetch(at: *const f32);
    /// Brings the cache line into the second level.
    unsafe fn prefetch_far(at: *const f32);
    /// Gives `column(j, v)` for every lane j, in order, the vector whose lane i is lane j of `row(i)`.
    unsafe fn transpose(row: impl Fn(usize) -> Self::V, column: impl FnMut(usize, Self::V));
}

/// The most lanes of any instruction set.
pub const MOST_LANES: usize = 16;

/// The first `count` lanes, as the methods that take some of them want it.
#[inline(always)]
pub fn first(count: usize) -> u16 {
    debug_assert!(count <= MOST_LANES);
    ((1u32 << count) - 1) as u16
}

/// Number types that kernels read; arithmetic is in f32 throughout.
pub trait Scalar: Element {
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
    /// # Safety
    /// As [`Simd::load_where`].
    unsafe fn load_where<S: Simd>(from: *const Self, lanes: u16) -> S::V;
    /// # Safety
    /// As [`Simd::store_where`].
    unsafe fn store_where<S: Simd>(to: *mut Self, lanes: u16, v: S::V);
    /// # Safety
    /// As [`Simd::gather_where`].
    #[inline(always)]
    unsafe fn gather_where<S: Simd>(from: *const Self, index: &[i32; MOST_LANES], lanes: u16) -> S::V {
        let mut some = [0f32; MOST_LANES];
        for (i, (x, &at)) in some.iter_mut().zip(index).enumerate() {
            if lanes >> i & 1 == 1 {
                // SAFETY: the caller's promise for lanes whose bit is set.
                *x = unsafe { *from.wrapping_offset(at as isize) }.to_f32();
            }
        }
        // SAFETY: as many numbers as the longest vector has.
        unsafe { S::load(some.as_ptr()) }
    }
}

impl Scalar for f32 {
    #[inline(always)]
    unsafe fn store_where<S: Simd>(to: *mut Self, lanes: u16, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { S::store_where(to, lanes, v) }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load(from) }
    }
    #[inline(always)]
    unsafe fn load_where<S: Simd>(from: *const Self, lanes: u16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_where(from, lanes) }
    }
    #[inline(always)]
    unsafe fn gather_where<S: Simd>(from: *const Self, index: &[i32; MOST_LANES], lanes: u16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::gather_where(from, index, lanes) }
    }
}

impl Scalar for bf16 {
    #[inline(always)]
    unsafe fn store_where<S: Simd>(to: *mut Self, lanes: u16, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { S::store_bf16_where(to, lanes, v) }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16(from) }
    }
    #[inline(always)]
    unsafe fn load_where<S: Simd>(from: *const Self, lanes: u16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16_where(from, lanes) }
    }
}

impl Scalar for f16 {
    #[inline(always)]
    unsafe fn store_where<S: Simd>(to: *mut Self, lanes: u16, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { S::store_f16_where(to, lanes, v) }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_f16(from) }
    }
    #[inline(always)]
    unsafe fn load_where<S: Simd>(from: *const Self, lanes: u16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_f16_where(from, lanes) }
    }
}

/// Instruction sets known here, in descending order of speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// Work that is generic over the instruction set.
pub trait Kernel {
    type Output;
    /// # Safety
    /// The CPU has `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

impl Isa {
    /// The best one this CPU has.
    fn best() -> Isa {
        #[cfg(test)]
        if let Some(isa) = CHOSEN.get() {
            return isa;
        }
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Isa::available()[0])
    }

    /// All that this CPU has, the best first.
    pub fn available() -> Vec<Isa> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
            {
                found.push(Isa::Avx512);
            }
            if avx2 {
                found.push(Isa::Avx2);
            }
        }
        found.push(Isa::Portable);
        found
    }

    /// Runs `kernel` on this instruction set, which must be one of [`Isa::available`].
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            // SAFETY: `self` is available, so the CPU has the instructions.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { kernel.run::<super::x86::Avx512>() },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { kernel.run::<super::x86::Avx2>() },
            // SAFETY: needs no special instructions.
            Isa::Portable => unsafe { kernel.run::<Portable>() },
        }
    }
}

/// Runs `kernel` on the best instruction set.
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    Isa::best().run(kernel)
}

#[cfg(test)]
thread_local! {
    static CHOSEN: std::cell::Cell<Option<Isa>> = const { std::cell::Cell::new(None) };
}

/// Runs `work` with what this thread computes on another instruction set than the best.
#[cfg(test)]
pub fn with_isa<R>(isa: Isa, work: impl FnOnce() -> R) -> R {
    CHOSEN.set(Some(isa));
    let result = work();
    CHOSEN.set(None);
    result
}

/// Plain Rust; the compiler uses what its target has.
#[derive(Clone, Copy)]
pub struct Portable;

const LANES: usize = 4;

// SAFETY: plain code, which reads and writes exactly what the trait says.
unsafe impl Simd for Portable {
    const LANES: usize = LANES;
    const ROWS: usize = 4;
    type V = [f32; LANES];

    #[inline(always)]
    unsafe fn vectorize<R>(f: impl FnOnce() -> R) -> R {
        f()
    }
    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::V {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the caller's promise; an array of f32 read without alignment.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_where(from: *const f32, lanes: u16) -> Self::V {
        some(from, lanes)
    }
    #[inline(always)]
    unsafe fn load_bf16_where(from: *const bf16, lanes: u16) -> Self::V {
        some(from, lanes)
    }
    #[inline(always)]
    unsafe fn load_f16_where(from: *const f16, lanes: u16) -> Self::V {
        some(from, lanes)
    }
    #[inline(always)]
    unsafe fn gather_where(from: *const f32, index: &[i32; MOST_LANES], lanes: u16) -> Self::V {
        std::array::from_fn(|i| {
            // SAFETY: the caller's promise for lanes whose bit is set.
            if lanes >> i & 1 == 1 { unsafe { *from.wrapping_offset(index[i] as isize) } } else { 0.0 }
        })
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_where(to: *mut f32, lanes: u16, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { put_some(to, lanes, &v) }
    }
    #[inline(always)]
    unsafe fn store_bf16_where(to: *mut bf16, lanes: u16, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { put_some(to, lanes, &v) }
    }
    #[inline(always)]
    unsafe fn store_f16_where(to: *mut f16, lanes: u16, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { put_some(to, lanes, &v) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::V {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| Element::to_f32(unsafe { *from.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::V {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| Element::to_f32(unsafe { *from.add(i) }))
    }
    #[inline(always)]
    unsafe fn prefetch(_at: *const f32) {}
    #[inline(always)]
    unsafe fn prefetch_far(_at: *const f32) {}
    #[inline(always)]
    unsafe fn transpose(row: impl Fn(usize) -> Self::V, mut column: impl FnMut(usize, Self::V)) {
        let rows: [Self::V; LANES] = std::array::from_fn(row);
        (0..LANES).for_each(|j| column(j, rows.map(|row| row[j])));
    }
}

#[inline(always)]
fn some<T: Element>(from: *const T, lanes: u16) -> [f32; LANES] {
    let mut some = [0.0; LANES];
    // SAFETY: called with the promise of `load_where`.
    unsafe { get_some(from, lanes, &mut some) };
    some
}

/// The lanes whose bit is set, one by one; leaves the others.
///
/// # Safety
/// Those lanes are readable.
#[inline(always)]
pub unsafe fn get_some<T: Element>(from: *const T, lanes: u16, to: &mut [f32]) {
    for (i, to) in to.iter_mut().enumerate() {
        if lanes >> i & 1 == 1 {
            // SAFETY: the caller's promise.
            *to = unsafe { *from.wrapping_add(i) }.to_f32();
        }
    }
}

/// Writes the lanes whose bit is set, one by one.
///
/// # Safety
/// Those lanes are writable.
#[inline(always)]
pub unsafe fn put_some<T: Element>(to: *mut T, lanes: u16, from: &[f32]) {
    for (i, &x) in from.iter().enumerate() {
        if lanes >> i & 1 == 1 {
            // SAFETY: the caller's promise.
            unsafe { *to.wrapping_add(i) = T::from_f32(x) };
        }
    }
}

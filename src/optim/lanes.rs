//! What the optimizer's kernels ask of an instruction set, and the portable one. Every instruction set computes the same
//! bits: each lane is one element, every operation is rounded once as IEEE 754 says, and no product is fused with a sum
//! unless the formula itself does not (see [`Lanes::divide`]).

use half::{bf16, f16};

/// What runs on any instruction set.
pub trait Kernel {
    type Output;
    /// To be marked `#[inline(always)]`, so that it is compiled for the instruction set it is called for. For the same
    /// reason kernels pass no closures on.
    ///
    /// # Safety
    /// Called by [`Lanes::vectorize`] alone, where the CPU has the instructions of `L`.
    unsafe fn run<L: Lanes>(self) -> Self::Output;
}

/// An instruction set with vectors of f32 and of 32-bit integers.
///
/// # Safety
/// Every method may only be called where the CPU has the instructions, and inlined into [`Lanes::vectorize`]. Pointers
/// must be valid for the `N` numbers that a method says it reads or writes; no alignment is needed.
pub unsafe trait Lanes: Copy + Send + Sync + 'static {
    /// f32 per vector.
    const N: usize;
    type F: Copy;
    type I: Copy;

    /// Runs a kernel compiled for this instruction set.
    unsafe fn vectorize<K: Kernel>(kernel: K) -> K::Output;

    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn load_bf16(from: *const bf16) -> Self::F;
    /// Unsigned bytes, widened.
    unsafe fn load_bytes(from: *const u8) -> Self::I;
    unsafe fn store(to: *mut f32, x: Self::F);
    /// Rounded to nearest, ties to even, as bits. `past`: see [`Lanes::store_words`].
    unsafe fn store_f16(to: *mut u16, x: Self::F, past: bool);
    /// The low 16 bits of each lane, whose upper ones are zero. `past` writes past the caches, which then need not read
    /// first what is written over; it asks for a vector's alignment and for [`Lanes::fence`] before others may look.
    unsafe fn store_words(to: *mut u16, x: Self::I, past: bool);
    /// Asks for a cache line; `at` may be anywhere.
    unsafe fn prefetch(_at: *const u8) {}
    /// Waits for what was written past the caches.
    unsafe fn fence() {}
    /// The low 8 bits of each lane, whose upper ones are zero.
    unsafe fn store_bytes(to: *mut u8, x: Self::I);
    /// Lane i is `table[index[i]]`.
    unsafe fn gather(table: *const u32, index: Self::I) -> Self::I;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sqrt(a: Self::F) -> Self::F;
    /// `a / by`, rounded once. May be computed in any way that gives those bits.
    #[inline(always)]
    unsafe fn divide(a: Self::F, by: &Divisor) -> Self::F {
        // SAFETY: the caller's promise.
        unsafe { Self::div(a, Self::splat(by.value)) }
    }

    unsafe fn bits(x: Self::F) -> Self::I;
    unsafe fn float(x: Self::I) -> Self::F;
    /// 0, 1, 2, ...
    unsafe fn numbers() -> Self::I;
    unsafe fn splat_int(x: u32) -> Self::I;
    unsafe fn add_int(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn sub_int(a: Self::I, b: Self::I) -> Self::I;
    /// The low 32 bits of the product.
    unsafe fn mul_int(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn xor(a: Self::I, b: Self::I) -> Self::I;
    /// Shifted right by `BITS`, zeros coming in.
    unsafe fn shift<const BITS: i32>(a: Self::I) -> Self::I;
    /// The larger one, as signed integers.
    unsafe fn max_int(a: Self::I, b: Self::I) -> Self::I;
    /// The smaller one, as signed integers.
    unsafe fn min_int(a: Self::I, b: Self::I) -> Self::I;
    /// `a > b ? yes : no`, as signed integers.
    unsafe fn where_above(a: Self::I, b: Self::I, yes: Self::I, no: Self::I) -> Self::I;
    /// `yes` where x is no number, else `no`.
    unsafe fn where_nan(x: Self::F, yes: Self::I, no: Self::I) -> Self::I;
    /// The largest lane, as signed integers.
    unsafe fn most(a: Self::I) -> u32;
}

/// A divisor with its reciprocal in two words, for dividing by multiplications.
#[derive(Clone, Copy, Debug)]
pub struct Divisor {
    pub value: f32,
    pub high: f32,
    pub low: f32,
    /// Whether the multiplications give the bits of the division; else divide.
    pub exact: bool,
}

impl Divisor {
    pub fn new(value: f32) -> Self {
        let high = 1.0 / value;
        // What is left of 1 / value, exact enough in f64 for a second word of f32.
        let low = ((1.0 - f64::from(high) * f64::from(value)) / f64::from(value)) as f32;
        // Markstein (1990): a quotient within one unit in the last place, corrected once with the rounded reciprocal, is
        // the rounded quotient, unless the divisor's fraction is all ones. The limits keep what he leaves out, underflow,
        // away from square roots of f32.
        let all_ones = value.to_bits() & 0x007f_ffff == 0x007f_ffff;
        Divisor { value, high, low, exact: (1e-6..=1.0).contains(&value) && !all_ones }
    }
}

/// The bits of infinity: finite numbers have smaller ones without their sign.
pub const INFINITY_BITS: u32 = 0x7f80_0000;
/// All but the sign.
pub const MAGNITUDE: u32 = 0x7fff_ffff;

/// One element at a time: for whatever CPU, and for what is left over at the end of a range.
#[derive(Clone, Copy)]
pub struct Portable;

// SAFETY: each method reads or writes what the trait says.
unsafe impl Lanes for Portable {
    const N: usize = 1;
    type F = f32;
    type I = u32;

    #[inline(always)]
    unsafe fn vectorize<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: there is no CPU without these instructions.
        unsafe { kernel.run::<Self>() }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> f32 {
        // SAFETY: the caller's promise, here and below.
        unsafe { from.read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> f32 {
        // SAFETY: as above.
        f32::from_bits(u32::from(unsafe { from.read_unaligned() }.to_bits()) << 16)
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> u32 {
        // SAFETY: as above.
        u32::from(unsafe { from.read() })
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: f32) {
        // SAFETY: as above.
        unsafe { to.write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, x: f32, _: bool) {
        // SAFETY: as above.
        unsafe { to.write_unaligned(f16::from_f32(x).to_bits()) }
    }
    #[inline(always)]
    unsafe fn store_words(to: *mut u16, x: u32, _: bool) {
        // SAFETY: as above.
        unsafe { to.write_unaligned(x as u16) }
    }
    #[inline(always)]
    unsafe fn store_bytes(to: *mut u8, x: u32) {
        // SAFETY: as above.
        unsafe { to.write(x as u8) }
    }
    #[inline(always)]
    unsafe fn gather(table: *const u32, index: u32) -> u32 {
        // SAFETY: as above.
        unsafe { table.add(index as usize).read() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    unsafe fn add(a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    unsafe fn sub(a: f32, b: f32) -> f32 {
        a - b
    }
    #[inline(always)]
    unsafe fn mul(a: f32, b: f32) -> f32 {
        a * b
    }
    #[inline(always)]
    unsafe fn div(a: f32, b: f32) -> f32 {
        a / b
    }
    #[inline(always)]
    unsafe fn sqrt(a: f32) -> f32 {
        a.sqrt()
    }
    #[inline(always)]
    unsafe fn bits(x: f32) -> u32 {
        x.to_bits()
    }
    #[inline(always)]
    unsafe fn float(x: u32) -> f32 {
        f32::from_bits(x)
    }
    #[inline(always)]
    unsafe fn numbers() -> u32 {
        0
    }
    #[inline(always)]
    unsafe fn splat_int(x: u32) -> u32 {
        x
    }
    #[inline(always)]
    unsafe fn add_int(a: u32, b: u32) -> u32 {
        a.wrapping_add(b)
    }
    #[inline(always)]
    unsafe fn sub_int(a: u32, b: u32) -> u32 {
        a.wrapping_sub(b)
    }
    #[inline(always)]
    unsafe fn mul_int(a: u32, b: u32) -> u32 {
        a.wrapping_mul(b)
    }
    #[inline(always)]
    unsafe fn and(a: u32, b: u32) -> u32 {
        a & b
    }
    #[inline(always)]
    unsafe fn or(a: u32, b: u32) -> u32 {
        a | b
    }
    #[inline(always)]
    unsafe fn xor(a: u32, b: u32) -> u32 {
        a ^ b
    }
    #[inline(always)]
    unsafe fn shift<const BITS: i32>(a: u32) -> u32 {
        a >> BITS
    }
    #[inline(always)]
    unsafe fn max_int(a: u32, b: u32) -> u32 {
        (a as i32).max(b as i32) as u32
    }
    #[inline(always)]
    unsafe fn min_int(a: u32, b: u32) -> u32 {
        (a as i32).min(b as i32) as u32
    }
    #[inline(always)]
    unsafe fn where_above(a: u32, b: u32, yes: u32, no: u32) -> u32 {
        if (a as i32) > b as i32 { yes } else { no }
    }
    #[inline(always)]
    unsafe fn where_nan(x: f32, yes: u32, no: u32) -> u32 {
        if x.is_nan() { yes } else { no }
    }
    #[inline(always)]
    unsafe fn most(a: u32) -> u32 {
        a
    }
}

#[cfg(test)]
mod tests {
    use super::super::level::Level;
    use super::super::testing::bits;
    use super::*;

    struct Divide<'a>(&'a [f32], Divisor, &'a mut [f32]);

    impl Kernel for Divide<'_> {
        type Output = ();
        #[inline(always)]
        unsafe fn run<L: Lanes>(self) {
            for (a, to) in self.0.chunks_exact(L::N).zip(self.2.chunks_exact_mut(L::N)) {
                // SAFETY: inside `vectorize`, and a chunk is a vector.
                unsafe { L::store(to.as_mut_ptr(), L::divide(L::load(a.as_ptr()), &self.1)) };
            }
        }
    }

    /// For the corrections of many steps and orders, on every 13th fraction: 630,000 quotients each.
    #[test]
    fn dividing_by_multiplying_gives_the_quotients_bits() {
        let mut dividends: Vec<f32> = (0x3f80_0000..0x3f80_0000 + (1 << 23)).step_by(13).map(f32::from_bits).collect();
        dividends.extend([0.0, f32::INFINITY, f32::NAN, f32::from_bits(1).sqrt(), f32::MAX.sqrt()]);
        dividends.resize(dividends.len().next_multiple_of(16), 3.0);
        let corrections = [(0.999f64, 1), (0.999, 2), (0.999, 17), (0.999, 16_700), (0.95, 3), (0.99999, 1), (0.5, 40)];
        for (beta2, step) in corrections {
            let divisor = Divisor::new((1.0 - beta2.powi(step)).sqrt() as f32);
            for level in Level::available() {
                let mut quotients = vec![0.0; dividends.len()];
                level.run(Divide(&dividends, divisor, &mut quotients));
                let expected: Vec<f32> = dividends.iter().map(|a| a / divisor.value).collect();
                assert!(bits(&quotients) == bits(&expected), "{level:?} {divisor:?}");
            }
        }
    }
}

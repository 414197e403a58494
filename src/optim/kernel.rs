//! AdamW over one piece of a range in one pass: reads master, moments and gradient once, writes master, moments and the
//! half-precision copy once. The only place where its arithmetic is written down, for every instruction set.

use half::{bf16, f16};

use super::adamw::Coefficients;
use super::lanes::{INFINITY_BITS, Kernel, Lanes, MAGNITUDE, Portable};
use super::rounding::{DrawKeys, FACTORS};

/// Numbers that gradients rest in.
pub trait Grad: Copy + Send + Sync + 'static {
    /// # Safety
    /// As [`Lanes::load`].
    unsafe fn load<L: Lanes>(from: *const Self) -> L::F;
}

impl Grad for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f32) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { L::load(from) }
    }
}

impl Grad for bf16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const bf16) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { L::load_bf16(from) }
    }
}

/// How the master weights rest.
pub trait Master: Copy + Send + Sync {
    type Value: Copy + Send;
    /// # Safety
    /// As [`Lanes::load`].
    unsafe fn load<L: Lanes>(from: *const Self::Value) -> L::F;
    /// Rounds the master to what it rests in and gives that back. `element`: of the bucket, of the first lane.
    ///
    /// # Safety
    /// As [`Lanes::store`].
    unsafe fn store<L: Lanes>(self, to: *mut Self::Value, element: u32, x: L::F) -> L::F;
}

#[derive(Clone, Copy)]
pub struct F32Master;

impl Master for F32Master {
    type Value = f32;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f32) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { L::load(from) }
    }
    #[inline(always)]
    unsafe fn store<L: Lanes>(self, to: *mut f32, _: u32, x: L::F) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { L::store(to, x) };
        x
    }
}

#[derive(Clone, Copy)]
pub struct Bf16Master(pub DrawKeys);

impl Master for Bf16Master {
    type Value = bf16;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const bf16) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { L::load_bf16(from) }
    }
    #[inline(always)]
    unsafe fn store<L: Lanes>(self, to: *mut bf16, element: u32, x: L::F) -> L::F {
        // SAFETY: the caller's promise.
        unsafe {
            let draw = L::and(draws::<L>(self.0, element), L::splat_int(0xffff));
            let rounded = upper_half::<L>(x, draw);
            L::store_words(to.cast(), L::shift::<16>(rounded), false);
            L::float(rounded)
        }
    }
}

/// The half-precision copy.
pub trait Copied: Copy + Send {
    /// # Safety
    /// As [`Lanes::store`]; `past` as [`Lanes::store_words`].
    unsafe fn store<L: Lanes>(to: *mut Self, x: L::F, past: bool);
}

/// Whether a copy is written past the caches: it is not read again soon if it is part of something large.
pub fn past_the_caches<C: Copied>(copy: &[C], of: usize) -> bool {
    const LARGE: usize = 1 << 18;
    of >= LARGE && copy.as_ptr().addr().is_multiple_of(64)
}

/// No copy.
impl Copied for () {
    #[inline(always)]
    unsafe fn store<L: Lanes>(_: *mut (), _: L::F, _: bool) {}
}

impl Copied for bf16 {
    #[inline(always)]
    unsafe fn store<L: Lanes>(to: *mut bf16, x: L::F, past: bool) {
        // SAFETY: the caller's promise.
        unsafe {
            // To nearest, ties to even: just under half of what is cut off, and a little more if the last bit is odd.
            let odd = L::and(L::shift::<16>(L::bits(x)), L::splat_int(1));
            let rounded = upper_half::<L>(x, L::add_int(odd, L::splat_int(0x7fff)));
            L::store_words(to.cast(), L::shift::<16>(rounded), past);
        }
    }
}

impl Copied for f16 {
    #[inline(always)]
    unsafe fn store<L: Lanes>(to: *mut f16, x: L::F, past: bool) {
        // SAFETY: the caller's promise.
        unsafe { L::store_f16(to.cast(), x, past) }
    }
}

/// The bits of a bf16 as the upper half of an f32's: `bias` (below 2^16) is added before the lower half is cut off. What
/// is no number stays none.
#[inline(always)]
unsafe fn upper_half<L: Lanes>(x: L::F, bias: L::I) -> L::I {
    // SAFETY: called inside `vectorize`.
    unsafe {
        let bits = L::bits(x);
        let magnitude = L::and(bits, L::splat_int(MAGNITUDE));
        let quiet = L::or(bits, L::splat_int(0x0040_0000));
        let biased = L::add_int(bits, bias);
        let kept = L::where_above(magnitude, L::splat_int(INFINITY_BITS), quiet, biased);
        L::and(kept, L::splat_int(0xffff_0000))
    }
}

/// A draw of 16 bits for each lane's element, see [`super::rounding`].
#[inline(always)]
unsafe fn draws<L: Lanes>(keys: DrawKeys, element: u32) -> L::I {
    // SAFETY: called inside `vectorize`.
    unsafe {
        let element = L::add_int(L::splat_int(element), L::numbers());
        let mut x = L::xor(element, L::splat_int(keys.first));
        x = L::mul_int(L::xor(x, L::shift::<16>(x)), L::splat_int(FACTORS[0]));
        x = L::xor(L::xor(x, L::shift::<15>(x)), L::splat_int(keys.second));
        x = L::mul_int(x, L::splat_int(FACTORS[1]));
        L::shift::<16>(x)
    }
}

/// How many elements ahead memory is asked for: with four streams at once the CPU alone asks for too little (8 to 14 % more
/// bytes a second).
pub const AHEAD: usize = 512;

/// One piece of a range; all of one length.
pub struct Piece<'a, M: Master, C: Copied, G: Grad> {
    pub c: &'a Coefficients,
    pub master: M,
    pub weights: &'a mut [M::Value],
    pub copy: &'a mut [C],
    /// Whether the copy is written past the caches; then it is aligned to 64 bytes.
    pub past: bool,
    pub m: &'a mut [f32],
    pub v: &'a mut [f32],
    pub grads: &'a [G],
    /// The element in the bucket of the first one.
    pub element: u32,
}

/// Gives the largest magnitude of the scaled gradients as bits of an f32: those of infinity or more if one was not finite.
impl<M: Master, C: Copied, G: Grad> Kernel for Piece<'_, M, C, G> {
    type Output = u32;
    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) -> u32 {
        let whole = self.weights.len() / L::N * L::N;
        // SAFETY: the caller's promise.
        unsafe {
            let most = self.update_range::<L>(0, whole);
            if self.past {
                L::fence();
            }
            most.max(self.update_range::<Portable>(whole, self.weights.len()))
        }
    }
}

impl<M: Master, C: Copied, G: Grad> Piece<'_, M, C, G> {
    /// Elements `from..to`, a multiple of the lanes.
    #[inline(always)]
    unsafe fn update_range<L: Lanes>(&mut self, from: usize, to: usize) -> u32 {
        let (c, n) = (self.c, self.weights.len());
        assert!(to <= n && self.copy.len() == n && self.m.len() == n && self.v.len() == n && self.grads.len() == n);
        let (weights, copy) = (self.weights.as_mut_ptr(), self.copy.as_mut_ptr());
        let (m, v, grads) = (self.m.as_mut_ptr(), self.v.as_mut_ptr(), self.grads.as_ptr());
        // SAFETY: `L::N` elements from `i` are inside all five, whose lengths are equal; called inside `vectorize`.
        unsafe {
            let mut most = L::splat_int(0);
            let mut i = from;
            while i < to {
                L::prefetch(m.wrapping_add(i + AHEAD).cast());
                L::prefetch(v.wrapping_add(i + AHEAD).cast());
                L::prefetch(weights.wrapping_add(i + AHEAD).cast());
                L::prefetch(grads.wrapping_add(i + AHEAD).cast());
                let g = L::mul(G::load::<L>(grads.add(i)), L::splat(c.grad_scale));
                most = L::max_int(most, L::and(L::bits(g), L::splat_int(MAGNITUDE)));
                let (m_old, v_old) = (L::load(m.add(i)), L::load(v.add(i)));
                let m_new = L::add(m_old, L::mul(L::sub(g, m_old), L::splat(c.one_minus_beta1)));
                let gg = L::mul(L::mul(L::splat(c.one_minus_beta2), g), g);
                let v_new = L::add(L::mul(v_old, L::splat(c.beta2)), gg);
                L::store(m.add(i), m_new);
                L::store(v.add(i), v_new);
                let w = step::<L>(c, M::load::<L>(weights.add(i)), m_new, v_new);
                let w = self.master.store::<L>(weights.add(i), self.element.wrapping_add(i as u32), w);
                C::store::<L>(copy.add(i), w, self.past);
                i += L::N;
            }
            L::most(most)
        }
    }
}

/// The weights after a step with these moments, PyTorch's order of operations.
///
/// # Safety
/// Inside [`Lanes::vectorize`].
#[inline(always)]
pub unsafe fn step<L: Lanes>(c: &Coefficients, w: L::F, m: L::F, v: L::F) -> L::F {
    // SAFETY: the caller's promise.
    unsafe {
        let denominator = L::add(L::divide(L::sqrt(v), &c.correction2_root), L::splat(c.epsilon));
        let change = L::mul(L::splat(c.step_size), L::div(m, denominator));
        L::sub(L::mul(w, L::splat(c.decay)), change)
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::Divisor;
    use super::super::level::Level;
    use super::super::rounding::StochasticRounding;
    use super::super::testing::{bits, coefficients, hard_numbers, numbers};
    use super::*;

    const N: usize = 1003;

    /// Everything an update writes, as bits.
    type Written = (Vec<u32>, Vec<u32>, Vec<u32>, Vec<u32>, bool);

    trait Widened {
        fn widened(self) -> f32;
    }
    impl Widened for f32 {
        fn widened(self) -> f32 {
            self
        }
    }
    impl Widened for bf16 {
        fn widened(self) -> f32 {
            self.to_f32()
        }
    }
    impl Widened for f16 {
        fn widened(self) -> f32 {
            self.to_f32()
        }
    }
    impl Widened for () {
        fn widened(self) -> f32 {
            0.0
        }
    }

    fn update<M: Master, C: Copied + Widened, G: Grad>(
        level: Level,
        n: usize,
        master: M,
        weight: impl Fn(f32) -> M::Value,
        nothing: C,
        grad: impl Fn(f32) -> G,
    ) -> Written
    where
        M::Value: Widened,
    {
        let mut w: Vec<M::Value> = hard_numbers(n, 1, 0.1, true).into_iter().map(weight).collect();
        let mut m = hard_numbers(n, 2, 1e-3, true);
        let mut v: Vec<f32> = hard_numbers(n, 3, 1e-6, true).iter().map(|x| x.abs()).collect();
        let g: Vec<G> = hard_numbers(n, 4, 1e-2, true).into_iter().map(grad).collect();
        let mut copy = vec![nothing; n];
        let c = &coefficients(3);
        let (weights, copied) = (&mut w[..], &mut copy[..]);
        let piece =
            Piece { c, master, weights, copy: copied, past: false, m: &mut m, v: &mut v, grads: &g, element: 77 };
        let finite = level.run(piece) < INFINITY_BITS;
        let wide = |values: Vec<f32>| bits(&values);
        let w = wide(w.into_iter().map(Widened::widened).collect());
        (w, wide(copy.into_iter().map(Widened::widened).collect()), bits(&m), bits(&v), finite)
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let keys = StochasticRounding { seed: 1, step: 2, bucket: 3, start: 0 }.keys();
        let half = bf16::from_f32;
        for n in [0, 1, 7, 8, 15, 16, 17, 31, N] {
            let all = |level| {
                [
                    update(level, n, F32Master, |x| x, (), |g| g),
                    update(level, n, F32Master, |x| x, bf16::ZERO, |g| g),
                    update(level, n, F32Master, |x| x, f16::ZERO, half),
                    update(level, n, Bf16Master(keys), half, (), half),
                    update(level, n, Bf16Master(keys), half, f16::ZERO, |g| g),
                ]
            };
            let expected = all(Level::Portable);
            for level in Level::available() {
                assert!(all(level) == expected, "{level:?}, {n} elements");
            }
        }
    }

    /// The formula as it stands in PyTorch, and halves rounded on their own afterwards.
    #[test]
    fn one_pass_is_the_formula_and_then_rounding() {
        let c = coefficients(3);
        let mut expected = hard_numbers(N, 1, 0.1, true);
        let (mut m, mut v) = (hard_numbers(N, 2, 1e-3, true), hard_numbers(N, 3, 1e-6, true));
        let grads = hard_numbers(N, 4, 1e-2, true);
        for (((w, m), v), g) in expected.iter_mut().zip(&mut m).zip(&mut v).zip(&grads) {
            let g = g * c.grad_scale;
            *v = v.abs();
            *m += (g - *m) * c.one_minus_beta1;
            *v = *v * c.beta2 + c.one_minus_beta2 * g * g;
            let denominator = v.sqrt() / c.correction2_root.value + c.epsilon;
            *w = *w * c.decay - c.step_size * (*m / denominator);
        }
        for level in Level::available() {
            let (w, copy, m_found, v_found, _) = update(level, N, F32Master, |x| x, bf16::ZERO, |g| g);
            assert!((w, m_found, v_found) == (bits(&expected), bits(&m), bits(&v)), "{level:?}");
            assert_eq!(copy, bits(&expected.iter().map(|&x| bf16::from_f32(x).to_f32()).collect::<Vec<_>>()));
            let (_, copy, ..) = update(level, N, F32Master, |x| x, f16::ZERO, |g| g);
            assert_eq!(copy, bits(&expected.iter().map(|&x| f16::from_f32(x).to_f32()).collect::<Vec<_>>()));
        }
    }

    #[test]
    fn one_gradient_that_is_not_finite_is_found_wherever_it_is() {
        for level in Level::available() {
            for (at, what) in [(0, f32::NAN), (17, f32::INFINITY), (63, f32::NEG_INFINITY), (66, f32::NAN), (67, 1.0)] {
                let mut grads = numbers(67, 5, f32::MAX);
                if let Some(g) = grads.get_mut(at) {
                    *g = what;
                }
                let (mut w, mut m, mut v) = (vec![0f32; 67], vec![0f32; 67], vec![0f32; 67]);
                let (weights, m, v) = (&mut w[..], &mut m[..], &mut v[..]);
                let (c, copy) = (&coefficients(1), &mut [(); 67][..]);
                let piece = Piece { c, master: F32Master, weights, copy, past: false, m, v, grads: &grads, element: 0 };
                assert_eq!(level.run(piece) < INFINITY_BITS, at == 67, "{level:?} {at}");
            }
        }
    }

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

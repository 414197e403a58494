//! AdamW over one piece of a range in one pass: reads master, moments and gradient once, writes master, moments and the
//! half-precision copy once. The only place where its arithmetic is written down, for every instruction set.

use half::{bf16, f16};

use super::adamw::Coefficients;
use super::lanes::{Kernel, Lanes, MAGNITUDE, Portable};
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
        let quiet = L::or(bits, L::splat_int(0x0040_0000));
        let kept = L::where_nan(x, quiet, L::add_int(bits, bias));
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

/// How many vectors ahead memory is asked for: with four streams at once the CPU alone asks for too little (8 to 14 % more
/// bytes a second).
pub const AHEAD: usize = 32;

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
        let n = self.weights.len();
        assert!(self.copy.len() == n && self.m.len() == n && self.v.len() == n && self.grads.len() == n);
        let whole = n / L::N * L::N;
        // SAFETY: the caller's promise; the lengths are equal, and `whole` is one of whole vectors.
        unsafe {
            let most = match self.past {
                true => self.update_range::<L, true>(0, whole),
                false => self.update_range::<L, false>(0, whole),
            };
            if self.past {
                L::fence();
            }
            most.max(self.update_range::<Portable, false>(whole, n))
        }
    }
}

/// The stages that an element goes through, an iteration each, and how far it has come between them.
///
/// A root and two quotients, one after the other, take longer than the CPU looks ahead over instructions that wait for
/// them: so an iteration takes four vectors one stage on each instead of one vector through all.
mod stage {
    /// New moments are written; of them stay the first and the root of the second.
    pub struct Moments<F>(pub F, pub F);
    /// What the change of the weights is the quotient of.
    pub struct Fraction<F>(pub F, pub F);
    /// The quotient.
    pub struct Quotient<F>(pub F);
}

use stage::{Fraction, Moments, Quotient};

impl<M: Master, C: Copied, G: Grad> Piece<'_, M, C, G> {
    /// Elements `from..to`, a multiple of the lanes.
    ///
    /// # Safety
    /// Inside [`Lanes::vectorize`]; the elements are inside all five slices.
    #[inline(always)]
    unsafe fn update_range<L: Lanes, const PAST: bool>(&mut self, from: usize, to: usize) -> u32 {
        // Of its own: from behind the reference they would be read anew after every store.
        let c = *self.c;
        let n = L::N;
        // SAFETY: the caller's promise.
        unsafe {
            let mut most = L::splat_int(0);
            let mut i = from;
            if to - from >= 3 * n {
                let mut quotient = Fraction::of::<L>(&c, self.moments::<L>(&c, i, &mut most)).quotient::<L>();
                let mut fraction = Fraction::of::<L>(&c, self.moments::<L>(&c, i + n, &mut most));
                let mut moments = self.moments::<L>(&c, i + 2 * n, &mut most);
                while i + 3 * n < to {
                    self.weights::<L, PAST>(&c, i, quotient);
                    quotient = fraction.quotient::<L>();
                    fraction = Fraction::of::<L>(&c, moments);
                    moments = self.moments::<L>(&c, i + 3 * n, &mut most);
                    i += n;
                }
                self.weights::<L, PAST>(&c, i, quotient);
                self.weights::<L, PAST>(&c, i + n, fraction.quotient::<L>());
                self.weights::<L, PAST>(&c, i + 2 * n, Fraction::of::<L>(&c, moments).quotient::<L>());
                i += 3 * n;
            }
            while i < to {
                let moments = self.moments::<L>(&c, i, &mut most);
                self.weights::<L, PAST>(&c, i, Fraction::of::<L>(&c, moments).quotient::<L>());
                i += n;
            }
            L::most(most)
        }
    }

    /// The moments from element `i` on, written.
    ///
    /// # Safety
    /// As [`Piece::update_range`].
    #[inline(always)]
    unsafe fn moments<L: Lanes>(&mut self, c: &Coefficients, i: usize, most: &mut L::I) -> Moments<L::F> {
        let (m, v, grads) = (self.m.as_mut_ptr(), self.v.as_mut_ptr(), self.grads.as_ptr());
        let ahead = i + AHEAD * L::N;
        // SAFETY: the caller's promise.
        unsafe {
            L::prefetch(m.wrapping_add(ahead).cast());
            L::prefetch(v.wrapping_add(ahead).cast());
            L::prefetch(self.weights.as_ptr().wrapping_add(ahead).cast());
            L::prefetch(grads.wrapping_add(ahead).cast());
            let g = L::mul(G::load::<L>(grads.add(i)), L::splat(c.grad_scale));
            *most = L::max_int(*most, L::and(L::bits(g), L::splat_int(MAGNITUDE)));
            let (m_old, v_old) = (L::load(m.add(i)), L::load(v.add(i)));
            let m_new = L::add(m_old, L::mul(L::sub(g, m_old), L::splat(c.one_minus_beta1)));
            let gg = L::mul(L::mul(L::splat(c.one_minus_beta2), g), g);
            let v_new = L::add(L::mul(v_old, L::splat(c.beta2)), gg);
            L::store(m.add(i), m_new);
            L::store(v.add(i), v_new);
            Moments(m_new, L::sqrt(v_new))
        }
    }

    /// The weights from element `i` on and their copy, written.
    ///
    /// # Safety
    /// As [`Piece::update_range`].
    #[inline(always)]
    unsafe fn weights<L: Lanes, const PAST: bool>(&mut self, c: &Coefficients, i: usize, quotient: Quotient<L::F>) {
        let weights = self.weights.as_mut_ptr();
        // SAFETY: the caller's promise.
        unsafe {
            let w = quotient.moved::<L>(c, M::load::<L>(weights.add(i)));
            let w = self.master.store::<L>(weights.add(i), self.element.wrapping_add(i as u32), w);
            C::store::<L>(self.copy.as_mut_ptr().add(i), w, PAST);
        }
    }
}

impl<F> Fraction<F> {
    #[inline(always)]
    unsafe fn of<L: Lanes<F = F>>(c: &Coefficients, Moments(m, root): Moments<F>) -> Self {
        // SAFETY: called inside `vectorize`.
        unsafe { Fraction(m, L::add(L::divide(root, &c.correction2_root), L::splat(c.epsilon))) }
    }

    #[inline(always)]
    unsafe fn quotient<L: Lanes<F = F>>(self) -> Quotient<F> {
        // SAFETY: called inside `vectorize`.
        unsafe { Quotient(L::div(self.0, self.1)) }
    }
}

impl<F> Quotient<F> {
    #[inline(always)]
    unsafe fn moved<L: Lanes<F = F>>(self, c: &Coefficients, w: F) -> F {
        // SAFETY: called inside `vectorize`.
        unsafe { L::sub(L::mul(w, L::splat(c.decay)), L::mul(L::splat(c.step_size), self.0)) }
    }
}

/// The weights after a step with these moments, PyTorch's order of operations.
///
/// # Safety
/// Inside [`Lanes::vectorize`].
#[inline(always)]
pub unsafe fn step<L: Lanes>(c: &Coefficients, w: L::F, m: L::F, v: L::F) -> L::F {
    // SAFETY: the caller's promise.
    unsafe { Fraction::of::<L>(c, Moments(m, L::sqrt(v))).quotient::<L>().moved::<L>(c, w) }
}

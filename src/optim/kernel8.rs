//! AdamW over blocks with 8-bit moments in one pass: each block's moments are widened, updated, used and rounded again
//! while they are in the first cache level.
//!
//! Moments as bitsandbytes' CUDA kernel computes them (`kOptimizerStatic8bit2StateBlockwise`): `m * beta1 + (1 - beta1) *
//! g`; an element whose gradient is not finite gets zero moments and keeps its weight; a negative first moment does not
//! become zero. The weights' step is PyTorch's, as in bitsandbytes' other backends. Unlike there, a negative zero counts as
//! zero, so that padding stays zero.

use super::adamw::Coefficients;
use super::blockwise::{reciprocal, signed_code, unsigned_code, value};
use super::code_book::{Book, ZERO_OF_M};
use super::kernel::{AHEAD, Copied, Grad, Master, step};
use super::lanes::{INFINITY_BITS, Kernel, Lanes, MAGNITUDE, Portable};
use crate::device::BLOCK;

/// Whole blocks of one range, the last of which may be shorter.
pub struct Piece8<'a, M: Master, C: Copied, G: Grad> {
    pub c: &'a Coefficients,
    pub master: M,
    pub weights: &'a mut [M::Value],
    pub copy: &'a mut [C],
    /// As [`super::kernel::Piece::past`].
    pub past: bool,
    pub m8: &'a mut [u8],
    pub v8: &'a mut [u8],
    /// One a block, as `v_absmax`.
    pub m_absmax: &'a mut [f32],
    pub v_absmax: &'a mut [f32],
    pub grads: &'a [G],
    /// The element in the bucket of the first one.
    pub element: u32,
}

/// One block's moments in 32 bits.
struct Wide {
    m: [f32; BLOCK],
    v: [f32; BLOCK],
}

/// Largest magnitudes, as bits of f32.
#[derive(Clone, Copy, Default)]
struct Most {
    m: u32,
    v: u32,
    grad: u32,
}

/// Gives the largest magnitude of the scaled gradients as bits of an f32: those of infinity or more if one was not finite.
impl<M: Master, C: Copied, G: Grad> Kernel for Piece8<'_, M, C, G> {
    type Output = u32;
    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) -> u32 {
        let n = self.weights.len();
        assert!(self.copy.len() == n && self.grads.len() == n && self.m8.len() == n && self.v8.len() == n);
        let blocks = n.div_ceil(BLOCK);
        assert!(self.m_absmax.len() == blocks && self.v_absmax.len() == blocks);
        let mut wide = Wide { m: [0.0; BLOCK], v: [0.0; BLOCK] };
        let mut most_grad = 0;
        for block in 0..blocks {
            let first = block * BLOCK;
            let len = BLOCK.min(n - first);
            let whole = len / L::N * L::N;
            // SAFETY: the caller's promise; the block's elements are inside all of the slices.
            unsafe {
                let most = self.update_block::<L>(&mut wide, block, 0, whole);
                let rest = self.update_block::<Portable>(&mut wide, block, whole, len);
                self.m_absmax[block] = f32::from_bits(most.m.max(rest.m));
                self.v_absmax[block] = f32::from_bits(most.v.max(rest.v));
                most_grad = most_grad.max(most.grad).max(rest.grad);
                self.round_block::<L>(&wide, block, 0, whole);
                self.round_block::<Portable>(&wide, block, whole, len);
            }
        }
        if self.past {
            // SAFETY: as above.
            unsafe { L::fence() };
        }
        most_grad
    }
}

impl<M: Master, C: Copied, G: Grad> Piece8<'_, M, C, G> {
    /// Updates elements `from..to` of a block, a multiple of the lanes; leaves their moments in `wide`.
    #[inline(always)]
    unsafe fn update_block<L: Lanes>(&mut self, wide: &mut Wide, block: usize, from: usize, to: usize) -> Most {
        let c = self.c;
        let first = block * BLOCK;
        let (m_codes, v_codes) = (Book::Signed.codes(), Book::Unsigned.codes());
        // SAFETY: the caller has seen that the elements are inside the slices; called inside `vectorize`.
        unsafe {
            let m_scale = L::splat(self.m_absmax[block]);
            let v_scale = L::splat(self.v_absmax[block]);
            let zero = L::splat_int(0);
            let (mut most_m, mut most_v, mut most_grad) = (zero, zero, zero);
            let mut i = from;
            while i < to {
                let at = first + i;
                L::prefetch(self.weights.as_ptr().wrapping_add(at + AHEAD * L::N).cast());
                L::prefetch(self.grads.as_ptr().wrapping_add(at + AHEAD * L::N).cast());
                let g = L::mul(G::load::<L>(self.grads.as_ptr().add(at)), L::splat(c.grad_scale));
                let g_magnitude = L::and(L::bits(g), L::splat_int(MAGNITUDE));
                most_grad = L::max_int(most_grad, g_magnitude);
                let m = L::mul(value::<L>(m_codes, self.m8.as_ptr().add(at)), m_scale);
                let v = L::mul(value::<L>(v_codes, self.v8.as_ptr().add(at)), v_scale);
                let m = L::add(L::mul(m, L::splat(c.beta1)), L::mul(L::splat(c.one_minus_beta1), g));
                let gg = L::mul(L::mul(L::splat(c.one_minus_beta2), g), g);
                let v = L::add(L::mul(v, L::splat(c.beta2)), gg);
                let infinity = L::splat_int(INFINITY_BITS);
                let m_bits = L::where_above(infinity, g_magnitude, L::bits(m), zero);
                let v_bits = L::where_above(infinity, g_magnitude, L::bits(v), zero);
                let (m, v) = (L::float(m_bits), L::float(v_bits));
                most_m = L::max_int(most_m, L::and(m_bits, L::splat_int(MAGNITUDE)));
                most_v = L::max_int(most_v, L::and(v_bits, L::splat_int(MAGNITUDE)));
                L::store(wide.m.as_mut_ptr().add(i), m);
                L::store(wide.v.as_mut_ptr().add(i), v);
                let weights = self.weights.as_mut_ptr().add(at);
                let old = M::load::<L>(weights);
                let new = step::<L>(c, old, m, v);
                let new = L::float(L::where_above(infinity, g_magnitude, L::bits(new), L::bits(old)));
                let w = self.master.store::<L>(weights, self.element.wrapping_add(at as u32), new);
                C::store::<L>(self.copy.as_mut_ptr().add(at), w, self.past);
                i += L::N;
            }
            Most { m: L::most(most_m), v: L::most(most_v), grad: L::most(most_grad) }
        }
    }

    /// Gives elements `from..to` of a block, a multiple of the lanes, the codes of their moments.
    #[inline(always)]
    unsafe fn round_block<L: Lanes>(&mut self, wide: &Wide, block: usize, from: usize, to: usize) {
        let first = block * BLOCK;
        let (m_codes, v_codes) = (Book::Signed.codes(), Book::Unsigned.codes());
        // SAFETY: the caller has seen that the elements are inside the slices; called inside `vectorize`.
        unsafe {
            let m_scale = L::splat(reciprocal(self.m_absmax[block]));
            let v_scale = L::splat(reciprocal(self.v_absmax[block]));
            let mut i = from;
            while i < to {
                let m = L::load(wide.m.as_ptr().add(i));
                let code = signed_code::<L>(m_codes, L::mul(m, m_scale));
                // Negative numbers but zero itself stay below zero's code.
                let below = L::min_int(code, L::splat_int(u32::from(ZERO_OF_M) - 1));
                let below = L::where_above(L::splat_int(0), L::bits(m), below, code);
                let code = L::where_above(L::bits(m), L::splat_int(1 << 31), below, code);
                L::store_bytes(self.m8.as_mut_ptr().add(first + i), code);
                let v = L::mul(L::load(wide.v.as_ptr().add(i)), v_scale);
                L::store_bytes(self.v8.as_mut_ptr().add(first + i), unsigned_code::<L>(v_codes, v));
                i += L::N;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::adamw::update_chunk;
    use super::super::level::Level;
    use super::super::testing::{coefficients, numbers};
    use super::super::{Grads, RecordLayout, Rounded, StateKind, StochasticRounding, Weights};

    #[test]
    fn padding_stays_zero() {
        let zero = vec![0.0f32; 512];
        let negative = vec![-0.0f32; 512];
        for kind in [StateKind::F32, StateKind::Bits8] {
            let layout = RecordLayout::new(kind, 0, 512, 256);
            let mut record = vec![0u64; layout.bytes() / 8];
            let record: &mut [u8] = bytemuck::cast_slice_mut(&mut record);
            layout.initialise(record);
            // In a block with others, and alone.
            let mut grads = numbers(512, 1, 1.0);
            grads[100..].fill(0.0);
            let mut weights = numbers(512, 2, 1.0);
            weights[100..].fill(0.0);
            let mut half: Vec<bf16> = weights.iter().map(|&x| bf16::from_f32(x)).collect();
            for step in 1..20 {
                let grads = if step % 3 == 1 { &grads } else { [&zero, &negative][step as usize % 2] };
                let rounding = StochasticRounding { seed: 1, step, bucket: 2, start: 0 };
                let master = Weights::Bf16 { values: &mut half, rounding };
                update_chunk(
                    Level::best(),
                    &coefficients(step),
                    &layout,
                    record,
                    master,
                    Rounded::None,
                    Grads::F32(grads),
                );
                let master = Weights::F32(&mut weights);
                update_chunk(
                    Level::best(),
                    &coefficients(step),
                    &layout,
                    record,
                    master,
                    Rounded::None,
                    Grads::F32(grads),
                );
                let (mut m, mut v) = (vec![1.0; 512], vec![1.0; 512]);
                layout.read_moments_f32(record, &mut m, &mut v);
                assert!(m[100..].iter().chain(&v[100..]).chain(&weights[100..]).all(|&x| x == 0.0), "{kind:?} {step}");
                assert!(half[100..].iter().all(|&x| x == bf16::ZERO), "{kind:?} {step}");
            }
        }
    }
}

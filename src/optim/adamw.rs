//! AdamW (Loshchilov and Hutter, 2019) with PyTorch's order of operations, so that its numbers are equal: what it is
//! told, and how a chunk is shared out among threads. The arithmetic is in [`super::kernel`] and, for 8-bit moments, in
//! [`super::kernel8`].

use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};

use super::kernel::{Bf16Master, Copied, F32Master, Grad, Master, Piece, past_the_caches};
use super::kernel8::Piece8;
use super::lanes::{Divisor, INFINITY_BITS};
use super::level::Level;
use super::record::{PartsMut, RecordLayout};
use super::rounding::StochasticRounding;
use crate::device::BLOCK;
use crate::device::threads::{for_parts, threads};

/// The master weights that are updated.
pub enum Weights<'a> {
    F32(&'a mut [f32]),
    Bf16 { values: &'a mut [bf16], rounding: StochasticRounding },
}

/// The half-precision copy of the updated master weights as they are stored, written in the same pass, rounded to nearest
/// even.
pub enum Rounded<'a> {
    None,
    Bf16(&'a mut [bf16]),
    F16(&'a mut [f16]),
}

/// Gradients, as they were accumulated.
#[derive(Clone, Copy)]
pub enum Grads<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// One group's settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

/// One update's numbers.
#[derive(Clone, Copy)]
pub struct Coefficients {
    pub decay: f32,
    pub beta1: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    pub correction2_root: Divisor,
    pub epsilon: f32,
    pub step_size: f32,
    pub grad_scale: f32,
}

/// Elements that a thread takes at a time, of `n`: some pieces for every thread, so that none waits long for another, and large
/// ones, because the CPU reads ahead better in few long runs than in many short ones (5 % on AMD's Zen 3). A multiple of what
/// 8-bit moments and caches count in.
fn piece(n: usize) -> usize {
    const LEAST: usize = 1 << 14;
    const MOST: usize = 1 << 17;
    (n / (4 * threads())).next_multiple_of(LEAST).clamp(LEAST, MOST)
}

impl AdamW {
    /// One update of one chunk, in one pass. `step` counts from 1; gradients are multiplied by `grad_scale` (the clipping
    /// factor over the loss scale). Gives whether every gradient was finite after that; if one was not, 32-bit moments
    /// and weights have taken it in, as in PyTorch, and 8-bit ones have left its element out, as in bitsandbytes.
    ///
    /// Zero gradients, moments and weights (padding) stay zero. Every instruction set and number of threads, and every cut
    /// into chunks gives the same bits.
    #[allow(clippy::too_many_arguments, reason = "what a step is made of; a struct would only repeat the names")]
    pub fn update_chunk(
        &self,
        step: u64,
        rate: f64,
        grad_scale: f32,
        layout: &RecordLayout,
        record: &mut [u8],
        weights: Weights,
        rounded: Rounded,
        grads: Grads,
    ) -> bool {
        let c = self.coefficients(step, rate, grad_scale);
        update_chunk(Level::best(), &c, layout, record, weights, rounded, grads)
    }

    pub(super) fn coefficients(&self, step: u64, rate: f64, grad_scale: f32) -> Coefficients {
        let correction1 = 1.0 - self.beta1.powf(step as f64);
        let correction2 = 1.0 - self.beta2.powf(step as f64);
        Coefficients {
            decay: (1.0 - rate * self.weight_decay) as f32,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            correction2_root: Divisor::new(correction2.sqrt() as f32),
            epsilon: self.epsilon as f32,
            step_size: (rate / correction1) as f32,
            grad_scale,
        }
    }
}

/// One update of one chunk on an instruction set that this CPU has.
pub(super) fn update_chunk(
    level: Level,
    c: &Coefficients,
    layout: &RecordLayout,
    record: &mut [u8],
    weights: Weights,
    rounded: Rounded,
    grads: Grads,
) -> bool {
    let record = layout.split_mut(record);
    let chunk = |element: usize| Chunk { level, c, coded: layout.coded(), element: element as u32, record };
    match (weights, grads) {
        (Weights::F32(w), Grads::F32(g)) => chunk(layout.start()).update(F32Master, w, rounded, g),
        (Weights::F32(w), Grads::Bf16(g)) => chunk(layout.start()).update(F32Master, w, rounded, g),
        (Weights::Bf16 { values, rounding }, Grads::F32(g)) => {
            chunk(rounding.start as usize).update(Bf16Master(rounding.keys()), values, rounded, g)
        }
        (Weights::Bf16 { values, rounding }, Grads::Bf16(g)) => {
            chunk(rounding.start as usize).update(Bf16Master(rounding.keys()), values, rounded, g)
        }
    }
}

/// One chunk's state and the numbers of its update.
struct Chunk<'a> {
    level: Level,
    c: &'a Coefficients,
    /// Elements with 8-bit moments; they come first.
    coded: usize,
    /// The element in the bucket of the first one.
    element: u32,
    record: PartsMut<'a>,
}

impl Chunk<'_> {
    fn update<M: Master, G: Grad>(self, master: M, w: &mut [M::Value], rounded: Rounded, grads: &[G]) -> bool {
        match rounded {
            Rounded::None => self.update_all(master, w, &mut vec![(); w.len()], grads),
            Rounded::Bf16(copy) => self.update_all(master, w, copy, grads),
            Rounded::F16(copy) => self.update_all(master, w, copy, grads),
        }
    }

    /// Gives whether all gradients were finite.
    fn update_all<M: Master, C: Copied, G: Grad>(
        self,
        master: M,
        weights: &mut [M::Value],
        copy: &mut [C],
        grads: &[G],
    ) -> bool {
        let Chunk { level, c, coded, element, record } = self;
        assert!(
            coded + record.m.len() == weights.len() && weights.len() == copy.len() && copy.len() == grads.len(),
            "AdamW over ranges of different lengths"
        );
        let past = past_the_caches(copy, copy.len());
        let (coded_weights, weights) = weights.split_at_mut(coded);
        let (coded_copy, copy) = copy.split_at_mut(coded);
        let (coded_grads, grads) = grads.split_at(coded);
        let PartsMut { m8, v8, m_absmax, v_absmax, m, v } = record;
        let finite_coded = update_coded(
            level,
            Piece8 {
                c,
                master,
                weights: coded_weights,
                copy: coded_copy,
                past,
                m8,
                v8,
                m_absmax,
                v_absmax,
                grads: coded_grads,
                element,
            },
        );
        let (element, past) = (element.wrapping_add(coded as u32), past && coded.is_multiple_of(BLOCK));
        update_plain(level, Piece { c, master, weights, copy, past, m, v, grads, element }) && finite_coded
    }
}

/// Updates a range with 32-bit moments on all threads; gives whether all gradients were finite.
fn update_plain<M: Master, C: Copied, G: Grad>(level: Level, all: Piece<'_, M, C, G>) -> bool {
    let Piece { c, master, weights, copy, past, m, v, grads, element } = all;
    let n = weights.len();
    assert!(
        copy.len() == n && m.len() == n && v.len() == n && grads.len() == n,
        "AdamW over ranges of different lengths"
    );
    let finite = AtomicBool::new(true);
    let piece = piece(n);
    let pieces =
        weights.chunks_mut(piece).zip(copy.chunks_mut(piece)).zip(m.chunks_mut(piece)).zip(v.chunks_mut(piece));
    let pieces = pieces.zip(grads.chunks(piece)).collect();
    for_parts(pieces, 4 * n, |i, ((((weights, copy), m), v), grads)| {
        let element = element.wrapping_add((i * piece) as u32);
        let most = level.run(Piece { c, master, weights, copy, past, m, v, grads, element });
        if most >= INFINITY_BITS {
            finite.store(false, Ordering::Relaxed);
        }
    });
    finite.into_inner()
}

/// As [`update_plain`], with 8-bit moments.
fn update_coded<M: Master, C: Copied, G: Grad>(level: Level, all: Piece8<'_, M, C, G>) -> bool {
    let Piece8 { c, master, weights, copy, past, m8, v8, m_absmax, v_absmax, grads, element } = all;
    let n = weights.len();
    let finite = AtomicBool::new(true);
    let piece = piece(n);
    let blocks = piece / BLOCK;
    let pieces = weights.chunks_mut(piece).zip(copy.chunks_mut(piece)).zip(grads.chunks(piece));
    let pieces = pieces.zip(m8.chunks_mut(piece)).zip(v8.chunks_mut(piece));
    let pieces = pieces.zip(m_absmax.chunks_mut(blocks)).zip(v_absmax.chunks_mut(blocks)).collect();
    for_parts(pieces, 8 * n, |i, ((((((weights, copy), grads), m8), v8), m_absmax), v_absmax)| {
        let element = element.wrapping_add((i * piece) as u32);
        let piece = Piece8 { c, master, weights, copy, past, m8, v8, m_absmax, v_absmax, grads, element };
        if level.run(piece) >= INFINITY_BITS {
            finite.store(false, Ordering::Relaxed);
        }
    });
    finite.into_inner()
}

#[cfg(test)]
mod tests {
    use super::super::StateKind;
    use super::*;

    /// torch.optim.AdamW([0.5, -0.25, 0], lr=0.1, weight_decay=0.01), gradients [1, -2, 0] then [0.5, 0, 0]:
    /// after one step [0.3995, -0.14975, 0].
    #[test]
    fn first_steps_follow_the_definition() {
        let adam = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
        let layout = RecordLayout::new(StateKind::F32, 0, 3, 0);
        let mut record = vec![0u64; layout.bytes() / 8];
        let mut weights = [0.5f32, -0.25, 0.0];
        let mut update = |step, grad_scale, weights: &mut [f32], grads: &[f32]| {
            let record = bytemuck::cast_slice_mut(&mut record);
            let (weights, grads) = (Weights::F32(weights), Grads::F32(grads));
            assert!(adam.update_chunk(step, 0.1, grad_scale, &layout, record, weights, Rounded::None, grads));
        };
        update(1, 1.0, &mut weights, &[1.0, -2.0, 0.0]);
        assert!((weights[0] - 0.3995).abs() < 1e-6 && (weights[1] + 0.14975).abs() < 1e-6, "{weights:?}");
        let before = weights;
        update(2, 0.5, &mut weights, &[1.0, 0.0, 0.0]);
        let (m, v) = (0.9 * 0.1 + 0.1 * 0.5, 0.999 * 0.001 + 0.001 * 0.25);
        let expected = f64::from(before[0]) * 0.999 - 0.1 * (m / 0.19) / ((v / 0.001999f64).sqrt() + 1e-8);
        assert!((f64::from(weights[0]) - expected).abs() < 1e-6, "{weights:?} {expected}");
        assert_eq!(weights[2], 0.0);
    }
}

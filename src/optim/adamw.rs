//! AdamW (Loshchilov and Hutter, 2019) in fp32, with PyTorch's order of operations so that its numbers are equal.

use anyhow::Result;
use candle_core::DType;

use crate::device::threads::for_parts;
use crate::device::{Arena, Buffer};

/// The moments of one segment's owned range.
pub struct Moments {
    pub m: Buffer,
    pub v: Buffer,
}

impl Moments {
    pub fn zeroed(arena: &Arena, len: usize, what: &str) -> Result<Self> {
        Ok(Moments { m: arena.alloc(DType::F32, len, what)?, v: arena.alloc(DType::F32, len, what)? })
    }
}

/// One group's settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

impl AdamW {
    /// One update of a range: `step` counts from 1, `grad_scale` is the clipping factor. Zero gradients, moments and
    /// weights (padding) stay zero.
    pub fn update(
        &self,
        step: u64,
        rate: f64,
        grad_scale: f32,
        weights: &mut [f32],
        moments: &mut Moments,
        grads: &[f32],
    ) {
        let n = weights.len();
        let (m, v) = (moments.m.as_mut_slice::<f32>(), moments.v.as_mut_slice::<f32>());
        assert!(m.len() == n && v.len() == n && grads.len() == n, "AdamW over ranges of different lengths");
        let coefficients = self.coefficients(step, rate, grad_scale);
        const PIECE: usize = 1 << 14;
        let pieces = weights.chunks_mut(PIECE).zip(m.chunks_mut(PIECE)).zip(v.chunks_mut(PIECE));
        let pieces = pieces.zip(grads.chunks(PIECE)).collect();
        for_parts(pieces, 4 * n, |_, (((w, m), v), g)| update_piece(coefficients, w, m, v, g));
    }

    fn coefficients(&self, step: u64, rate: f64, grad_scale: f32) -> Coefficients {
        let correction1 = 1.0 - self.beta1.powf(step as f64);
        let correction2 = 1.0 - self.beta2.powf(step as f64);
        Coefficients {
            decay: (1.0 - rate * self.weight_decay) as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            correction2_root: correction2.sqrt() as f32,
            epsilon: self.epsilon as f32,
            step_size: (rate / correction1) as f32,
            grad_scale,
        }
    }
}

#[derive(Clone, Copy)]
struct Coefficients {
    decay: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    correction2_root: f32,
    epsilon: f32,
    step_size: f32,
    grad_scale: f32,
}

fn update_piece(c: Coefficients, weights: &mut [f32], m: &mut [f32], v: &mut [f32], grads: &[f32]) {
    for (((w, m), v), g) in weights.iter_mut().zip(m).zip(v).zip(grads) {
        let g = g * c.grad_scale;
        *m += (g - *m) * c.one_minus_beta1;
        *v = *v * c.beta2 + c.one_minus_beta2 * g * g;
        let denominator = v.sqrt() / c.correction2_root + c.epsilon;
        *w = *w * c.decay - c.step_size * (*m / denominator);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::threads::with_threads;

    /// torch.optim.AdamW([0.5, -0.25, 0], lr=0.1, weight_decay=0.01), gradients [1, -2, 0] then [0.5, 0, 0]:
    /// after one step [0.3995, -0.14975, 0].
    #[test]
    fn first_steps_follow_the_definition() {
        let arena = Arena::new("test", None);
        let adam = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
        let mut moments = Moments::zeroed(&arena, 3, "m").unwrap();
        let mut weights = [0.5f32, -0.25, 0.0];
        adam.update(1, 0.1, 1.0, &mut weights, &mut moments, &[1.0, -2.0, 0.0]);
        assert!((weights[0] - 0.3995).abs() < 1e-6 && (weights[1] + 0.14975).abs() < 1e-6, "{weights:?}");
        let before = weights;
        adam.update(2, 0.1, 0.5, &mut weights, &mut moments, &[1.0, 0.0, 0.0]);
        let (m, v) = (0.9 * 0.1 + 0.1 * 0.5, 0.999 * 0.001 + 0.001 * 0.25);
        let expected = f64::from(before[0]) * 0.999 - 0.1 * (m / 0.19) / ((v / 0.001999f64).sqrt() + 1e-8);
        assert!((f64::from(weights[0]) - expected).abs() < 1e-6, "{weights:?} {expected}");
        assert_eq!(weights[2], 0.0);
    }

    #[test]
    fn the_number_of_threads_does_not_show() {
        let arena = Arena::new("test", None);
        let adam = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
        let n = 100_003;
        let grads: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0).collect();
        let run = |threads: usize| {
            with_threads(threads, || {
                let mut moments = Moments::zeroed(&arena, n, "m").unwrap();
                let mut weights: Vec<f32> = grads.iter().map(|g| g * 0.1).collect();
                (1..4).for_each(|s| adam.update(s, 1e-3, 0.7, &mut weights, &mut moments, &grads));
                weights
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(3));
    }
}

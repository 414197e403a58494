//! Numbers for the optimizer's tests, and how results are compared.

use super::adamw::{AdamW, Coefficients};

pub const SETTINGS: AdamW = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };

/// The coefficients of step `step` at rate 1e-3 with half of the gradient.
pub fn coefficients(step: u64) -> Coefficients {
    SETTINGS.coefficients(step, 1e-3, 0.5)
}

/// Deterministic numbers of both signs, roughly evenly spread up to `size`.
pub fn numbers(count: usize, seed: u32, size: f32) -> Vec<f32> {
    let number = |i: usize| {
        let mut x = (i as u32).wrapping_mul(0x9e37_79b9) ^ seed.wrapping_mul(0x85eb_ca6b);
        x = (x ^ (x >> 15)).wrapping_mul(0x2c1b_3c6d);
        x = (x ^ (x >> 12)).wrapping_mul(0x297a_2d39);
        ((x ^ (x >> 15)) as f32 / u32::MAX as f32 * 2.0 - 1.0) * size
    };
    (0..count).map(number).collect()
}

/// [`numbers`] with every seventh one a hard case: zeros, the smallest and the largest numbers, and, if wanted, what is not
/// finite.
pub fn hard_numbers(count: usize, seed: u32, size: f32, with_infinities: bool) -> Vec<f32> {
    let tiny = f32::from_bits(1);
    let hard = [0.0, -0.0, tiny, -tiny, 1e-40, -3e-39, f32::MIN_POSITIVE, 1e-20, 1e19, -2e19, f32::MAX, f32::MIN];
    let infinite = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
    let hard: Vec<f32> = hard.into_iter().chain(infinite.into_iter().filter(|_| with_infinities)).collect();
    let mut numbers = numbers(count, seed, size);
    for (k, x) in numbers.iter_mut().step_by(7).enumerate() {
        *x = hard[(k + seed as usize) % hard.len()];
    }
    numbers
}

/// The bits of numbers. What is not a number is one and the same.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }).collect()
}

//! The running softmax over blocks of transposed scores (keys by queries), in powers of two.

use crate::ops::vector::simd;

use super::tile::LANES;

/// 2^x for x <= 0 (or NaN), to 1 ulp; zero below 2^-126.
///
/// x = n + r with |r| <= 1/2; 2^r by a polynomial of degree 6 (minimax in relative error).
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let floored = if x < -126.0 { -126.0 } else { x };
    let shifted = floored + ROUND;
    let r = floored - (shifted - ROUND);
    let mut p = 1.535_334_2e-4f32;
    p = p.mul_add(r, 1.339_890_1e-3);
    p = p.mul_add(r, 9.618_438e-3);
    p = p.mul_add(r, 5.550_332_4e-2);
    p = p.mul_add(r, 2.402_264_8e-1);
    p = p.mul_add(r, std::f32::consts::LN_2);
    p = p.mul_add(r, 1.0);
    let scaled = f32::from_bits((p.to_bits() as i32).wrapping_add((shifted.to_bits() as i32) << 23) as u32);
    if x < -126.0 { 0.0 } else { scaled }
}

/// Maximum and sum so far, of each query.
pub struct Running {
    pub max: Vec<f32>,
    pub sum: Vec<f32>,
    /// What the last block multiplied earlier sums by.
    pub correction: Vec<f32>,
}

impl Running {
    pub fn new(width: usize) -> Self {
        Running { max: vec![f32::NEG_INFINITY; width], sum: vec![0.0; width], correction: vec![0.0; width] }
    }

    /// Scores (keys, width) become 2^(score - maximum); returns whether sums made earlier need the correction.
    pub fn block(&mut self, scores: &mut [f32]) -> bool {
        let width = self.max.len();
        let mut corrected = false;
        simd(
            #[inline(always)]
            || {
                for lane in (0..width).step_by(LANES) {
                    corrected |= self.lanes(scores, lane, width);
                }
            },
        );
        corrected
    }

    #[inline(always)]
    fn lanes(&mut self, scores: &mut [f32], lane: usize, width: usize) -> bool {
        let old: [f32; LANES] = std::array::from_fn(|i| self.max[lane + i]);
        let mut max = old;
        for row in scores.chunks_exact(width) {
            let row = &row[lane..][..LANES];
            for i in 0..LANES {
                max[i] = if row[i] > max[i] { row[i] } else { max[i] };
            }
        }
        let mut sum = [0f32; LANES];
        for row in scores.chunks_exact_mut(width) {
            let row = &mut row[lane..][..LANES];
            for i in 0..LANES {
                let p = exp2(row[i] - max[i]);
                row[i] = p;
                sum[i] += p;
            }
        }
        let mut corrected = false;
        for i in 0..LANES {
            let correction = exp2(old[i] - max[i]);
            self.correction[lane + i] = correction;
            self.sum[lane + i] = self.sum[lane + i].mul_add(correction, sum[i]);
            self.max[lane + i] = max[i];
            corrected |= correction != 1.0;
        }
        corrected
    }
}

/// Hides keys beyond each query: scores (keys from `first_key`, queries from `first_query`) become minus infinity.
pub fn hide_later(scores: &mut [f32], width: usize, first_key: usize, first_query: usize) {
    for (key, row) in scores.chunks_exact_mut(width).enumerate() {
        let hidden = (first_key + key).saturating_sub(first_query).min(width);
        row[..hidden].fill(f32::NEG_INFINITY);
    }
}

/// Scores (keys, width) become probabilities 2^(score - log_sum), and `slopes`, which hold dP, become dS.
pub fn exp2_block(scores: &mut [f32], log_sums: &[f32], slopes: &mut [f32], delta: &[f32]) {
    let width = log_sums.len();
    simd(
        #[inline(always)]
        || {
            for (p, ds) in scores.chunks_exact_mut(width).zip(slopes.chunks_exact_mut(width)) {
                for i in 0..width {
                    p[i] = exp2(p[i] - log_sums[i]);
                    ds[i] = p[i] * (ds[i] - delta[i]);
                }
            }
        },
    );
}

//! Stochastic rounding to bf16 with stateless draws: a number between two neighbours becomes the upper one as often as
//! it lies near to it, so that small updates of a bf16 master are right in the mean (Gupta et al., 2015).
//!
//! An element's draw is a function of (seed, step, bucket, element) alone: two rounds of a 32-bit mix with a key of
//! their own each, so that no step's draws are another's in another order.

/// Which draws an update uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StochasticRounding {
    pub seed: u64,
    pub step: u64,
    pub bucket: u64,
    /// The element in the bucket of the first value. A bucket holds fewer than 2^32 elements.
    pub start: u64,
}

/// The keys of one update's draws.
#[derive(Clone, Copy, Debug)]
pub(super) struct DrawKeys {
    pub first: u32,
    pub second: u32,
}

/// Odd factors with good avalanche together (Wellons, "Prospecting for Hash Functions", 2018).
pub(super) const FACTORS: [u32; 2] = [0x7feb_352d, 0x846c_a68b];

impl StochasticRounding {
    pub(super) fn keys(&self) -> DrawKeys {
        let mixed = [self.step, self.bucket].into_iter().fold(mix(self.seed), |state, word| mix(state ^ word));
        DrawKeys { first: mixed as u32, second: (mixed >> 32) as u32 }
    }
}

/// The output function of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(word: u64) -> u64 {
    let mut x = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::kernel::{Bf16Master, Piece};
    use super::super::level::Level;
    use super::super::testing::coefficients;
    use super::*;

    /// Elements from `start` on, all of value `x`, after a step that changes nothing but the rounding: bf16 has no half of
    /// a step, so the change comes from a moment that is just large enough.
    fn rounded(level: Level, start: u64, count: usize, x: bf16, steps: f32, key: (u64, u64, u64)) -> Vec<bf16> {
        let (seed, step, bucket) = key;
        let keys = StochasticRounding { seed, step, bucket, start }.keys();
        let mut c = coefficients(1);
        // w = w - step_size * (m / (sqrt(v) / root + epsilon)) with m = 1, v = 0.
        (c.decay, c.epsilon, c.step_size) = (1.0, 1.0, if steps == 0.0 { 0.0 } else { -steps * gap(x) });
        (c.one_minus_beta1, c.one_minus_beta2) = (0.0, 0.0);
        let mut weights = vec![x; count];
        let (mut m, mut v) = (vec![1.0; count], vec![0.0; count]);
        let (m, v) = (&mut m[..], &mut v[..]);
        let (grads, copy) = (&vec![0f32; count][..], &mut vec![(); count][..]);
        let (master, element) = (Bf16Master(keys), start as u32);
        level.run(Piece { c: &c, master, weights: &mut weights, copy, past: false, m, v, grads, element });
        weights
    }

    /// From a number to the next one of larger magnitude.
    fn gap(x: bf16) -> f32 {
        bf16::from_bits(x.to_bits() + 1).to_f32() - x.to_f32()
    }

    fn ups(rounded: &[bf16], x: bf16) -> usize {
        rounded.iter().filter(|&&r| r != x).count()
    }

    #[test]
    fn a_number_goes_up_as_often_as_it_is_near() {
        const N: usize = 1 << 18;
        for (i, steps) in [1.0 / 256.0, 0.125, 0.3, 0.5, 0.75, 255.0 / 256.0].into_iter().enumerate() {
            for x in [bf16::from_f32(0.0123), bf16::from_f32(-1.5), bf16::from_f32(1e-30)] {
                let found = rounded(Level::best(), 0, N, x, steps, (9, i as u64, 4));
                let up = bf16::from_bits(x.to_bits() + 1);
                assert!(found.iter().all(|&r| r == x || r == up));
                let (mean, deviation) = (N as f32 * steps, (N as f32 * steps * (1.0 - steps)).sqrt());
                let off = (ups(&found, x) as f32 - mean) / deviation;
                assert!(off.abs() < 4.0, "{x} {steps}: {off} standard deviations");
            }
        }
    }

    /// Draws of neighbours, of steps, of buckets and of seeds have nothing to do with each other: of pairs, a quarter goes
    /// up together.
    #[test]
    fn draws_are_independent() {
        const N: usize = 1 << 18;
        let x = bf16::from_f32(0.7);
        let up = |key| rounded(Level::best(), 0, N, x, 0.5, key).into_iter().map(|r| r != x).collect::<Vec<bool>>();
        let one = up((1, 1, 1));
        let mut others = vec![up((2, 1, 1)), up((1, 2, 1)), up((1, 1, 2)), up((1, 3, 1)), up((1, 1 << 32, 1))];
        for by in [1, 2, 3, 4, 16, 256, 4096, 65536] {
            others.push(one.iter().cycle().skip(by).take(N).copied().collect());
        }
        for (i, other) in others.iter().enumerate() {
            let both = one.iter().zip(other).filter(|(a, b)| **a && **b).count() as f64;
            let off = (both - N as f64 / 4.0) / (N as f64 * 3.0 / 16.0).sqrt();
            assert!(off.abs() < 4.0, "pair {i}: {off} standard deviations");
        }
        // Runs of eight: each of the 256 patterns about as often; chi-square of 255 degrees of freedom.
        let mut counts = [0usize; 256];
        one.chunks_exact(8).for_each(|bits| counts[bits.iter().fold(0, |n, &bit| 2 * n + usize::from(bit))] += 1);
        let mean = (N / 8 / 256) as f64;
        let chi: f64 = counts.iter().map(|&n| (n as f64 - mean).powi(2) / mean).sum();
        assert!((160.0..360.0).contains(&chi), "{chi}");
    }

    #[test]
    fn a_draw_belongs_to_its_element_and_what_is_exact_stays() {
        let x = bf16::from_f32(0.3);
        let all = rounded(Level::best(), 256, 1000, x, 0.4, (1, 2, 3));
        for level in Level::available() {
            let (first, rest) = all.split_at(301);
            assert!(rounded(level, 256, 301, x, 0.4, (1, 2, 3)) == first, "{level:?}");
            assert!(rounded(level, 256 + 301, 699, x, 0.4, (1, 2, 3)) == rest, "{level:?}");
            for exact in [x, bf16::ZERO, bf16::from_f32(-2.0), bf16::MAX, bf16::INFINITY] {
                assert!(rounded(level, 0, 500, exact, 0.0, (1, 2, 3)) == [exact; 500], "{level:?} {exact}");
            }
        }
    }
}

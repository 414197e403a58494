//! Stateless random draws. Every draw is a pure function of (seed, purpose, instance or class row, running number of
//! the item since the start of the run; where pictures are made, the picture's number), and the order of the images one
//! of (seed, epoch): so a run's numbers depend neither on ranks nor on batch size or accumulation, and a resumed run
//! needs no generator state. All arithmetic is
//! integer or correctly rounded, or comes from `libm`'s software functions: the same values on every machine.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Which of an item's two images a row of a batch holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Row {
    /// The subject's photograph.
    Instance,
    /// The class image paired with it under prior preservation.
    Class,
}

/// What a draw is for; draws of different purposes are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// ε of the forward process.
    Noise,
    /// The time step.
    Timestep,
    /// η of the VAE's posterior.
    VaeSample,
    /// ξ, one value a channel.
    OffsetNoise,
    /// Offsets of a random crop: top, then left.
    Crop,
    /// Horizontal flip.
    Flip,
    /// Whether a row is trained with the empty prompt.
    CaptionDropout,
    /// Dropout of an adapter; `layer` counts them in running order.
    Dropout { layer: u32 },
    /// The noise that a picture's sampling starts from; the item is the picture's number.
    SamplingStart,
    /// The noise of a sampler's `step`-th stochastic step.
    SamplingStep { step: u32 },
}

impl Purpose {
    /// (purpose number, layer or step) in the key. The numbers are part of what a seed means: never reuse or reorder them.
    fn key(self) -> (u32, u32) {
        match self {
            Purpose::Noise => (1, 0),
            Purpose::Timestep => (2, 0),
            Purpose::VaeSample => (3, 0),
            Purpose::OffsetNoise => (4, 0),
            Purpose::Crop => (5, 0),
            Purpose::Flip => (6, 0),
            Purpose::Dropout { layer } => (7, layer),
            Purpose::SamplingStart => (8, 0),
            Purpose::SamplingStep { step } => (9, step),
            Purpose::CaptionDropout => (10, 0),
        }
    }
}

/// The number of the order-of-images draw, beside those of [`Purpose`].
const ORDER: u32 = 0;

/// All draws of a run.
#[derive(Clone, Copy, Debug)]
pub struct Draws {
    seed: u64,
}

impl Draws {
    pub fn new(seed: u64) -> Self {
        Draws { seed }
    }

    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The stream of one purpose of one row; `item` is the item's running number since the start of the run.
    pub fn stream(&self, purpose: Purpose, row: Row, item: u64) -> Stream {
        let (number, layer) = purpose.key();
        let class = matches!(row, Row::Class);
        self.keyed(number | u32::from(class) << 31, layer, item)
    }

    /// Fills `out` with standard normal numbers; a shorter `out` gets a prefix of what a longer one gets.
    pub fn normal(&self, purpose: Purpose, row: Row, item: u64, out: &mut [f32]) {
        self.stream(purpose, row, item).fill_normal(out);
    }

    /// The row's time step, uniform in 0 … steps−1.
    pub fn timestep(&self, row: Row, item: u64, steps: usize) -> usize {
        self.stream(Purpose::Timestep, row, item).below(steps as u64) as usize
    }

    /// Uniform 64-bit numbers from which a random crop takes its offsets: (top, left).
    pub fn crop(&self, row: Row, item: u64) -> (u64, u64) {
        let mut stream = self.stream(Purpose::Crop, row, item);
        (stream.next_u64(), stream.next_u64())
    }

    /// Whether a row is mirrored, with probability ½.
    pub fn flip(&self, row: Row, item: u64) -> bool {
        self.stream(Purpose::Flip, row, item).next_u64() >> 63 == 1
    }

    /// Whether the prompt of a row is dropped, which happens at this rate.
    pub fn drops_prompt(&self, row: Row, item: u64, rate: f64) -> bool {
        // 53 bits, as many as the rate has.
        ((self.stream(Purpose::CaptionDropout, row, item).next_u64() >> 11) as f64) < rate * (1u64 << 53) as f64
    }

    /// The order of `n` items in an epoch: a uniform permutation of 0 … n−1 (Fisher–Yates).
    pub fn epoch_order(&self, epoch: u64, n: u64) -> Vec<u64> {
        let mut stream = self.keyed(ORDER, 0, epoch);
        let mut order: Vec<u64> = (0..n).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, stream.below(i as u64 + 1) as usize);
        }
        order
    }

    /// ChaCha8 whose 256-bit key is the tuple itself, so distinct tuples give independent streams.
    fn keyed(&self, purpose: u32, layer: u32, number: u64) -> Stream {
        let mut key = *b"dblaunch........................";
        key[8..16].copy_from_slice(&self.seed.to_le_bytes());
        key[16..20].copy_from_slice(&purpose.to_le_bytes());
        key[20..24].copy_from_slice(&layer.to_le_bytes());
        key[24..32].copy_from_slice(&number.to_le_bytes());
        Stream { generator: ChaCha8Rng::from_seed(key) }
    }
}

/// One stream of draws, from its beginning.
pub struct Stream {
    generator: ChaCha8Rng,
}

impl Stream {
    pub fn next_u64(&mut self) -> u64 {
        self.generator.next_u64()
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0 … n−1 without bias (Lemire 2019, <https://arxiv.org/abs/1805.10941>); `n` must not be 0.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "a draw from an empty range");
        let rejected = n.wrapping_neg() % n;
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(n);
            if wide as u64 >= rejected {
                return (wide >> 64) as u64;
            }
        }
    }

    /// Standard normal numbers by Box and Muller's transform in f64.
    pub fn fill_normal(&mut self, out: &mut [f32]) {
        for pair in out.chunks_mut(2) {
            // 1 − u lies in (0, 1], so the logarithm is finite.
            let radius = (-2.0 * libm::log(1.0 - self.unit())).sqrt();
            let (sin, cos) = libm::sincos(std::f64::consts::TAU * self.unit());
            pair[0] = (radius * cos) as f32;
            if let Some(second) = pair.get_mut(1) {
                *second = (radius * sin) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_values_of_a_seed_never_change() {
        let draws = Draws::new(42);
        let mut noise = [0f32; 4];
        draws.normal(Purpose::Noise, Row::Instance, 7, &mut noise);
        assert_eq!(noise.map(f32::to_bits), [1054918118, 3204523899, 1045046372, 3190705460]);
        let steps: Vec<usize> = (0..6).map(|i| draws.timestep(Row::Class, i, 1000)).collect();
        assert_eq!(steps, [525, 675, 826, 483, 621, 552]);
        assert_eq!(draws.crop(Row::Instance, 3), (11810069728244165733, 10394179684608489249));
        assert_eq!(draws.epoch_order(2, 8), [5, 6, 4, 1, 0, 2, 7, 3]);
        assert_eq!(
            (0..16).map(|i| u8::from(draws.flip(Row::Instance, i))).collect::<Vec<_>>(),
            [1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1]
        );
    }

    #[test]
    fn every_part_of_the_key_matters() {
        let mut seen = HashSet::new();
        for seed in [0, 1] {
            for purpose in [
                Purpose::Noise,
                Purpose::Timestep,
                Purpose::VaeSample,
                Purpose::OffsetNoise,
                Purpose::Crop,
                Purpose::Flip,
                Purpose::Dropout { layer: 0 },
                Purpose::Dropout { layer: 1 },
                Purpose::SamplingStart,
                Purpose::SamplingStep { step: 0 },
                Purpose::SamplingStep { step: 1 },
            ] {
                for row in [Row::Instance, Row::Class] {
                    for item in [0, 1, u64::MAX] {
                        assert!(seen.insert(Draws::new(seed).stream(purpose, row, item).next_u64()));
                    }
                }
            }
        }
    }

    #[test]
    fn a_shorter_draw_is_a_prefix_of_a_longer_one() {
        let draws = Draws::new(9);
        let (mut short, mut long) = ([0f32; 5], [0f32; 64]);
        draws.normal(Purpose::VaeSample, Row::Class, 1, &mut short);
        draws.normal(Purpose::VaeSample, Row::Class, 1, &mut long);
        assert_eq!(short, long[..5]);
    }

    #[test]
    fn normal_draws_have_the_normal_moments_and_no_correlation() {
        let n = 200_000;
        let mut x = vec![0f32; n];
        Draws::new(1).normal(Purpose::Noise, Row::Instance, 0, &mut x);
        let moment = |p: i32| x.iter().map(|&v| f64::from(v).powi(p)).sum::<f64>() / n as f64;
        // Five standard errors of each estimate: 1/√n, √2/√n, √15/√n, √96/√n.
        let bound = 5.0 / (n as f64).sqrt();
        assert!(moment(1).abs() < bound);
        assert!((moment(2) - 1.0).abs() < bound * 2f64.sqrt());
        assert!(moment(3).abs() < bound * 15f64.sqrt());
        assert!((moment(4) - 3.0).abs() < bound * 96f64.sqrt());
        for lag in [1, 2, 3] {
            let c = x.windows(lag + 1).map(|w| f64::from(w[0]) * f64::from(w[lag])).sum::<f64>() / n as f64;
            assert!(c.abs() < bound, "lag {lag}: {c}");
        }
        let beyond_two = x.iter().filter(|v| v.abs() > 1.959964).count() as f64 / n as f64;
        assert!((beyond_two - 0.05).abs() < bound * 0.22);
    }

    #[test]
    fn time_steps_are_uniform_across_items() {
        let (draws, cells, n) = (Draws::new(3), 50usize, 50_000u64);
        let mut counts = vec![0f64; cells];
        for item in 0..n {
            counts[draws.timestep(Row::Instance, item, 1000) * cells / 1000] += 1.0;
        }
        let expected = n as f64 / cells as f64;
        let chi2: f64 = counts.iter().map(|c| (c - expected).powi(2) / expected).sum();
        // 49 degrees of freedom: mean 49, standard deviation 9.9.
        assert!((20.0..95.0).contains(&chi2), "{chi2}");
    }

    #[test]
    fn orders_are_permutations_and_each_is_as_likely() {
        let draws = Draws::new(5);
        let mut sorted = draws.epoch_order(11, 1000);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        let mut counts = std::collections::HashMap::new();
        for epoch in 0..6000 {
            *counts.entry(draws.epoch_order(epoch, 3)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|c| (850..1150).contains(c)), "{counts:?}");
        assert!(draws.epoch_order(0, 0).is_empty());
    }

    #[test]
    fn small_ranges_are_without_bias() {
        let mut stream = Draws::new(8).stream(Purpose::Crop, Row::Class, 0);
        let mut counts = [0; 3];
        for _ in 0..30_000 {
            counts[stream.below(3) as usize] += 1;
        }
        assert!(counts.iter().all(|c| (9600..10400).contains(c)), "{counts:?}");
    }
}

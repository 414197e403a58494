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

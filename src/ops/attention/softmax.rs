//! The softmax over blocks of transposed scores (keys by queries), in powers of two.

use super::lanes::{Kernel, LANES, Vector, on_vectors};

/// Maximum and sum so far, of each query.
pub struct Running {
    pub max: Vec<f32>,
    pub sum: Vec<f32>,
    /// What the last block multiplied earlier sums by.
    pub correction: Vec<f32>,
}

impl Running {
    pub fn new() -> Self {
        Running { max: Vec::new(), sum: Vec::new(), correction: Vec::new() }
    }

    /// Begins anew with `width` queries, a multiple of 16.
    pub fn start(&mut self, width: usize) {
        for (values, start) in [(&mut self.max, f32::NEG_INFINITY), (&mut self.sum, 0.0), (&mut self.correction, 0.0)] {
            values.clear();
            values.resize(width, start);
        }
    }

    /// Scores (keys, width) become 2^(score - maximum); returns whether sums made earlier need the correction.
    pub fn block(&mut self, scores: &mut [f32]) -> bool {
        let width = self.max.len();
        assert!(width.is_multiple_of(LANES) && scores.len().is_multiple_of(width.max(1)), "rows of whole vectors");
        let block = Block {
            scores: scores.as_mut_ptr(),
            keys: scores.len() / width.max(1),
            width,
            max: self.max.as_mut_ptr(),
            sum: self.sum.as_mut_ptr(),
            correction: self.correction.as_mut_ptr(),
        };
        // SAFETY: `scores` has keys * width numbers, the three others `width`.
        unsafe { on_vectors(block) };
        self.correction.iter().any(|&c| c != 1.0)
    }
}

struct Block {
    scores: *mut f32,
    keys: usize,
    width: usize,
    max: *mut f32,
    sum: *mut f32,
    correction: *mut f32,
}

impl Kernel for Block {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: N vectors from `lane` on are within the width.
        unsafe {
            let mut lane = 0;
            while lane + 4 * LANES <= self.width {
                self.lanes::<V, 4>(lane);
                lane += 4 * LANES;
            }
            while lane < self.width {
                self.lanes::<V, 1>(lane);
                lane += LANES;
            }
        }
    }
}

impl Block {
    /// N vectors of queries: several at a time, as each maximum and sum waits for the one before.
    #[inline(always)]
    unsafe fn lanes<V: Vector, const N: usize>(&self, lane: usize) {
        // SAFETY: as promised by `Running::block`.
        unsafe {
            let at = |row: usize, j: usize| self.scores.add(row * self.width + lane + j * LANES);
            let mut old = [V::splat(0.0); N];
            for (j, old) in old.iter_mut().enumerate() {
                *old = V::load(self.max.add(lane + j * LANES));
            }
            let mut max = old;
            for row in 0..self.keys {
                for (j, max) in max.iter_mut().enumerate() {
                    *max = V::load(at(row, j)).max(*max);
                }
            }
            let mut sum = [V::splat(0.0); N];
            for row in 0..self.keys {
                for j in 0..N {
                    let p = V::load(at(row, j)).sub(max[j]).exp2();
                    p.store(at(row, j));
                    sum[j] = sum[j].add(p);
                }
            }
            for j in 0..N {
                let correction = old[j].sub(max[j]).exp2();
                let total = V::load(self.sum.add(lane + j * LANES)).mul_add(correction, sum[j]);
                correction.store(self.correction.add(lane + j * LANES));
                total.store(self.sum.add(lane + j * LANES));
                max[j].store(self.max.add(lane + j * LANES));
            }
        }
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
pub fn probabilities_and_slopes(scores: &mut [f32], log_sums: &[f32], slopes: &mut [f32], delta: &[f32]) {
    let width = log_sums.len();
    assert!(width.is_multiple_of(LANES) && delta.len() == width, "rows of whole vectors");
    assert!(scores.len() == slopes.len() && scores.len().is_multiple_of(width.max(1)), "scores and slopes alike");
    let slope = Slope {
        scores: scores.as_mut_ptr(),
        slopes: slopes.as_mut_ptr(),
        keys: scores.len() / width.max(1),
        width,
        log_sums: log_sums.as_ptr(),
        delta: delta.as_ptr(),
    };
    // SAFETY: `scores` and `slopes` have keys * width numbers, the two others `width`.
    unsafe { on_vectors(slope) }
}

struct Slope {
    scores: *mut f32,
    slopes: *mut f32,
    keys: usize,
    width: usize,
    log_sums: *const f32,
    delta: *const f32,
}

impl Kernel for Slope {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: as promised by `probabilities_and_slopes`.
        unsafe {
            for row in 0..self.keys {
                for lane in (0..self.width).step_by(LANES) {
                    let (s, ds) = (self.scores.add(row * self.width + lane), self.slopes.add(row * self.width + lane));
                    let p = V::load(s).sub(V::load(self.log_sums.add(lane))).exp2();
                    p.store(s);
                    p.mul(V::load(ds).sub(V::load(self.delta.add(lane)))).store(ds);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exp2(x: f32) -> f32 {
        struct One(*mut f32);
        impl Kernel for One {
            #[inline(always)]
            unsafe fn run<V: Vector>(self) {
                // SAFETY: the pointer is to sixteen f32 below.
                unsafe { V::load(self.0).exp2().store(self.0) }
            }
        }
        let (mut all, mut plain) = ([x; LANES], [x; LANES]);
        // SAFETY: both are sixteen f32; plain arrays need no features.
        unsafe {
            on_vectors(One(all.as_mut_ptr()));
            One(plain.as_mut_ptr()).run::<[f32; LANES]>();
        }
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            let mut half = [x; LANES];
            // SAFETY: sixteen f32; the features are there.
            unsafe { crate::ops::attention::lanes::narrow(One(half.as_mut_ptr())) };
            assert_eq!(half.map(f32::to_bits), plain.map(f32::to_bits), "half vectors differ at {x}");
        }
        assert_eq!(all[5].to_bits(), plain[5].to_bits(), "the processor's vectors differ at {x}");
        all[3]
    }

    #[test]
    fn powers_are_right_to_an_ulp_and_alike_on_all_vectors() {
        for i in 0..=300_000 {
            let x = -125.9 * (i as f32 / 3e5);
            let want = (x as f64).exp2();
            let unit = (want.log2().floor() - 23.0).exp2();
            assert!((exp2(x) as f64 - want).abs() <= 1.1 * unit, "2^{x} = {}, not {want}", exp2(x));
        }
        assert_eq!((exp2(0.0), exp2(-126.0), exp2(-126.01)), (1.0, f32::MIN_POSITIVE, 0.0));
        assert_eq!((exp2(-1e30), exp2(f32::NEG_INFINITY)), (0.0, 0.0));
        assert!(exp2(f32::NAN).is_nan());
    }
}

//! Learning-rate schedules as diffusers' `get_scheduler` defines them: a factor on every group's base rate.

use std::f64::consts::PI;

/// The shape of a schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LrKind {
    Constant,
    ConstantWithWarmup,
    Linear,
    Cosine,
    CosineWithRestarts { cycles: u64 },
    Polynomial { power: f64 },
}

/// A schedule over optimizer steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LrSchedule {
    pub kind: LrKind,
    pub warmup_steps: u64,
    pub total_steps: u64,
    /// The optimizer's default rate, from which `Polynomial` takes how far 1e-7 lies below it.
    pub base_rate: f64,
}

/// Where `Polynomial` ends.
const POLYNOMIAL_END: f64 = 1e-7;

impl LrSchedule {
    /// The factor for step `k`, counted from 0. With warm-up the first step's factor is 0, as in the peers.
    pub fn factor(&self, k: u64) -> f64 {
        let (k, warmup, total) = (k as f64, self.warmup_steps as f64, self.total_steps as f64);
        if self.kind == LrKind::Constant {
            return 1.0;
        }
        if k < warmup {
            return k / warmup.max(1.0);
        }
        let rest = (total - warmup).max(1.0);
        let progress = (k - warmup) / rest;
        match self.kind {
            LrKind::Constant | LrKind::ConstantWithWarmup => 1.0,
            LrKind::Linear => ((total - k) / rest).max(0.0),
            LrKind::Cosine => (0.5 * (1.0 + (PI * progress).cos())).max(0.0),
            LrKind::CosineWithRestarts { .. } if progress >= 1.0 => 0.0,
            LrKind::CosineWithRestarts { cycles } => {
                (0.5 * (1.0 + (PI * ((cycles as f64 * progress) % 1.0)).cos())).max(0.0)
            }
            LrKind::Polynomial { .. } if k > total => POLYNOMIAL_END / self.base_rate,
            LrKind::Polynomial { power } => {
                let remaining = 1.0 - (k - warmup) / (total - warmup);
                // total == warmup: the peer divides by zero here; the last step is the end of the decay.
                let remaining = if remaining.is_nan() { 0.0 } else { remaining };
                ((self.base_rate - POLYNOMIAL_END) * remaining.powf(power) + POLYNOMIAL_END) / self.base_rate
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(kind: LrKind, warmup_steps: u64, total_steps: u64, base_rate: f64) -> Vec<f64> {
        let schedule = LrSchedule { kind, warmup_steps, total_steps, base_rate };
        (0..total_steps).map(|k| schedule.factor(k)).collect()
    }

    fn close(got: Vec<f64>, want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() < 1e-9, "{got:?} for {want:?}");
        }
    }

    #[test]
    fn factors_are_the_peers() {
        close(factors(LrKind::Linear, 2, 6, 1.0), &[0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
        close(factors(LrKind::Constant, 2, 3, 1.0), &[1.0, 1.0, 1.0]);
        close(factors(LrKind::ConstantWithWarmup, 2, 4, 1.0), &[0.0, 0.5, 1.0, 1.0]);
        close(factors(LrKind::Cosine, 0, 4, 1.0), &[1.0, 0.85355339059, 0.5, 0.14644660941]);
        close(factors(LrKind::CosineWithRestarts { cycles: 2 }, 0, 4, 1.0), &[1.0, 0.5, 1.0, 0.5]);
        // 1e-4 over 4 steps with the optimizer's default at 1e-3: 7.5e-5, 5.001e-5, 2.501e-5 follow (relative to 1e-4).
        close(factors(LrKind::Polynomial { power: 1.0 }, 0, 4, 1e-3)[1..].to_vec(), &[0.750025, 0.50005, 0.250075]);
        assert_eq!(
            LrSchedule {
                kind: LrKind::CosineWithRestarts { cycles: 1 },
                warmup_steps: 0,
                total_steps: 2,
                base_rate: 1.0
            }
            .factor(2),
            0.0
        );
    }
}

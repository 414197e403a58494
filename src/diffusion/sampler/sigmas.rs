//! Noise levels σ = √((1−ᾱ)/ᾱ): the table over training steps, time steps and levels into each other, and the spreads
//! of levels that do not follow the time steps (Karras and others). In numpy's arithmetic: the table in f32, all else in f64.

use super::beta_quantile::beta_quantile;
use super::spacing::{Time, linspace};
use crate::Refusal;
use crate::diffusion::scheduler_file::{choice, flag, optional_number};
use anyhow::Result;
use serde_json::Value;

/// How levels are spread between the largest and the smallest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spread {
    /// Those of the time steps.
    OfTime,
    /// Karras et al. 2022, <https://arxiv.org/abs/2206.00364>, eq. 5, ρ = 7.
    Karras,
    /// Evenly in log σ.
    Exponential,
    /// By quantiles of the beta distribution B(0.6, 0.6), <https://arxiv.org/abs/2407.12173>.
    Beta,
    /// Evenly in the log signal-to-noise ratio λ = −log σ (Lu et al.); as [`Spread::Exponential`] but for rounding.
    Lambda,
}

impl Spread {
    /// Reads `use_karras_sigmas`, `use_exponential_sigmas`, `use_beta_sigmas` and, where the class knows it (`lambda`),
    /// `use_lu_lambdas`.
    pub(super) fn read(config: &Value, lambda: bool) -> Result<Self> {
        let (karras, exponential, beta) = (
            flag(config, "use_karras_sigmas", false)?,
            flag(config, "use_exponential_sigmas", false)?,
            flag(config, "use_beta_sigmas", false)?,
        );
        if u8::from(karras) + u8::from(exponential) + u8::from(beta) > 1 {
            return Err(Refusal::error(
                "only one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas can be true. Set the others to false.",
            ));
        }
        Ok(match (karras, lambda && flag(config, "use_lu_lambdas", false)?) {
            (true, _) => Spread::Karras,
            (_, true) => Spread::Lambda,
            _ if exponential => Spread::Exponential,
            _ if beta => Spread::Beta,
            _ => Spread::OfTime,
        })
    }

    /// n levels from `max` down to `min`; those of [`Spread::OfTime`] are not made here.
    pub(super) fn levels(self, max: f64, min: f64, n: usize) -> Vec<f64> {
        let ramp = || linspace(0.0, 1.0, n).into_iter();
        match self {
            Spread::Karras => {
                let rho = 7.0f64;
                let (low, high) = (min.powf(1.0 / rho), max.powf(1.0 / rho));
                ramp().map(|r| (high + r * (low - high)).powf(rho)).collect()
            }
            Spread::Beta => ramp().map(|r| min + beta_quantile(1.0 - r) * (max - min)).collect(),
            Spread::Lambda => {
                // The logarithms are f32 there.
                let (low, high) = (f64::from(min.ln() as f32), f64::from(max.ln() as f32));
                ramp().map(|r| (high + r * (low - high)).exp()).collect()
            }
            Spread::Exponential | Spread::OfTime => linspace(max.ln(), min.ln(), n).into_iter().map(f64::exp).collect(),
        }
    }
}

/// The level after the last step (`final_sigmas_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FinalSigma {
    Zero,
    /// That of the first training step.
    Min,
}

impl FinalSigma {
    pub(super) fn read(config: &Value) -> Result<Self> {
        choice(config, "final_sigmas_type", "zero", &[("zero", FinalSigma::Zero), ("sigma_min", FinalSigma::Min)])
    }
}

/// `sigma_max` and `sigma_min` of the configuration, which bound the spread in place of the schedule's own.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bounds {
    pub max: Option<f64>,
    pub min: Option<f64>,
}

impl Bounds {
    pub(super) fn read(config: &Value) -> Result<Self> {
        let bounds = Bounds { max: optional_number(config, "sigma_max")?, min: optional_number(config, "sigma_min")? };
        match [bounds.max, bounds.min].iter().flatten().all(|&bound| bound > 0.0) {
            true => Ok(bounds),
            false => Err(Refusal::error("sigma_min and sigma_max must be above 0. Restore the file.")),
        }
    }
}

/// σ of every training step, rising.
pub(super) struct SigmaTable {
    sigmas: Vec<f32>,
    logs: Vec<f32>,
}

impl SigmaTable {
    pub(super) fn new(time: &Time) -> Self {
        let sigmas: Vec<f32> = time.signal.iter().map(|&signal| ((1.0 - signal) / signal).sqrt()).collect();
        let logs = sigmas.iter().map(|&sigma| f64::from(sigma).ln() as f32).collect();
        SigmaTable { sigmas, logs }
    }

    pub(super) fn first(&self) -> f32 {
        self.sigmas[0]
    }

    pub(super) fn last(&self) -> f32 {
        self.sigmas[self.sigmas.len() - 1]
    }

    /// The largest logarithm and the smallest.
    pub(super) fn log_range(&self) -> (f32, f32) {
        (self.logs[self.logs.len() - 1], self.logs[0])
    }

    /// σ at a time step, interpolated (`numpy.interp`).
    pub(super) fn at(&self, t: f64) -> f64 {
        let below = t.floor().max(0.0) as usize;
        match self.sigmas.get(below..below + 2) {
            Some(&[low, high]) => (f64::from(high) - f64::from(low)) * (t - below as f64) + f64::from(low),
            _ => f64::from(self.last()),
        }
    }

    /// The time step at which the level is σ, interpolated in log σ and kept within the table.
    pub(super) fn time_of(&self, sigma: f64) -> f64 {
        let log = sigma.max(1e-10).ln();
        let reached = self.logs.partition_point(|&known| log - f64::from(known) >= 0.0);
        let below = reached.saturating_sub(1).min(self.logs.len().saturating_sub(2));
        let (low, high) = (self.logs[below], self.logs[(below + 1).min(self.logs.len() - 1)]);
        let share = ((f64::from(low) - log) / f64::from(low - high)).clamp(0.0, 1.0);
        (1.0 - share) * below as f64 + share * (below + 1) as f64
    }
}

//! Euler's method over noise levels, with and without ancestral noise: diffusers' `EulerDiscreteScheduler` (without
//! churn) and `EulerAncestralDiscreteScheduler`. Karras et al. 2022, <https://arxiv.org/abs/2206.00364>, algorithm 1.

use super::output::{Output, mean_part};
use super::sigmas::{Bounds, FinalSigma, SigmaTable, Spread};
use super::spacing::{Spacing, Time};
use super::{LatentShape, Sampler, check_step};
use crate::diffusion::schedule::linspace;
use crate::diffusion::scheduler_file::{choice, text};
use anyhow::{Context, Result};
use serde_json::Value;

pub(super) struct Euler {
    calls: Vec<f64>,
    /// One a call, and the last one's goal.
    sigmas: Vec<f32>,
    initial_scale: f32,
    output: Output,
    ancestral: bool,
}

impl Euler {
    pub(super) fn new(config: &Value, n: usize) -> Result<Self> {
        let time = sigma_time(config, n)?;
        let table = SigmaTable::new(&time);
        // "original_sample" is an older name.
        let output = match text(config, "prediction_type", "epsilon")?.as_str() {
            "original_sample" => Output::Clean,
            _ => Output::read(config, true)?,
        };
        let mut calls = time_steps(&time, n);
        let in_logs = choice(config, "interpolation_type", "linear", &[("linear", false), ("log_linear", true)])?;
        let mut levels: Vec<f64> = match in_logs {
            false => calls.iter().map(|&t| table.at(t)).collect(),
            // One level more than calls, so that the last step ends at the smallest level of the table.
            true => {
                let (high, low) = table.log_range();
                linspace(high.into(), low.into(), n + 1)
                    .into_iter()
                    .map(|log| f64::from(log).exp() as f32)
                    .map(f64::from)
                    .collect()
            }
        };
        let spread = Spread::read(config, false)?;
        if spread != Spread::OfTime {
            let bounds = Bounds::read(config)?;
            let (max, min) = (bounds.max.unwrap_or(levels[0]), bounds.min.unwrap_or(levels[levels.len() - 1]));
            levels = spread.levels(max, min, n);
            calls = levels.iter().map(|&sigma| f64::from(table.time_of(sigma) as f32)).collect();
        }
        let last = match FinalSigma::read(config)? {
            FinalSigma::Zero => 0.0,
            FinalSigma::Min => f64::from(table.first()),
        };
        levels.push(last);
        let sigmas: Vec<f32> = levels.into_iter().map(|sigma| sigma as f32).collect();
        let types = [("discrete", false), ("continuous", true)];
        if choice(config, "timestep_type", "discrete", &types)? && output == Output::Velocity {
            calls = sigmas[..n].iter().map(|&sigma| f64::from(0.25 * (f64::from(sigma).ln() as f32))).collect();
        }
        Ok(Euler { calls, initial_scale: initial_scale(&time, &sigmas), sigmas, output, ancestral: false })
    }

    pub(super) fn ancestral(config: &Value, n: usize) -> Result<Self> {
        let time = sigma_time(config, n)?;
        let table = SigmaTable::new(&time);
        let calls = time_steps(&time, n);
        let mut sigmas: Vec<f32> = calls.iter().map(|&t| table.at(t) as f32).collect();
        sigmas.push(0.0);
        let output = Output::read(config, false)?;
        Ok(Euler { calls, initial_scale: initial_scale(&time, &sigmas), sigmas, output, ancestral: true })
    }

    /// The level that the deterministic part of a step goes down to, and the noise added after it.
    fn goal(&self, call: usize) -> (f32, f32) {
        let (from, to) = (self.sigmas[call], self.sigmas[call + 1]);
        if !self.ancestral {
            return (to, 0.0);
        }
        let up = (to * to * (from * from - to * to) / (from * from)).sqrt();
        // Rounding can make the difference negative, where diffusers then has NaN.
        ((to * to - up * up).max(0.0).sqrt(), up)
    }
}

fn sigma_time(config: &Value, n: usize) -> Result<Time> {
    let mut time = Time::read(config, "linspace", true)?;
    if time.spacing != Spacing::Linspace {
        time.at_most_train_steps(n)?;
    }
    time.keep_sigmas_finite();
    Ok(time)
}

/// The time steps, which are f32 there.
fn time_steps(time: &Time, n: usize) -> Vec<f64> {
    time.spread(n).into_iter().map(|t| f64::from(t as f32)).collect()
}

fn initial_scale(time: &Time, sigmas: &[f32]) -> f32 {
    let max = sigmas.iter().copied().fold(0.0, f32::max);
    if time.spacing == Spacing::Leading { (max * max + 1.0).sqrt() } else { max }
}

impl Sampler for Euler {
    fn timesteps(&self) -> &[f64] {
        &self.calls
    }

    fn initial_scale(&self) -> f32 {
        self.initial_scale
    }

    fn network_input(&self, call: usize, sample: &[f32]) -> Vec<f32> {
        let sigma = self.sigmas[call.min(self.calls.len() - 1)];
        let length = (sigma * sigma + 1.0).sqrt();
        sample.iter().map(|x| x / length).collect()
    }

    fn wants_noise(&self, _call: usize) -> bool {
        self.ancestral
    }

    fn step(
        &mut self,
        call: usize,
        prediction: &[f32],
        noise: Option<&[f32]>,
        shape: LatentShape,
        sample: &mut Vec<f32>,
    ) -> Result<()> {
        check_step(self, call, prediction, noise, shape, sample)?;
        let prediction = mean_part(prediction, shape);
        let sigma = self.sigmas[call];
        let (down, up) = self.goal(call);
        let (square, change) = (sigma * sigma + 1.0, down - sigma);
        let of_velocity = -sigma / square.sqrt();
        for (x, &p) in sample.iter_mut().zip(prediction.iter()) {
            let clean = match self.output {
                Output::Noise => *x - sigma * p,
                Output::Clean => p,
                Output::Velocity => p * of_velocity + *x / square,
            };
            *x += (*x - clean) / sigma * change;
        }
        if self.ancestral {
            let noise = noise.context("the step needs noise")?;
            sample.iter_mut().zip(noise).for_each(|(x, &z)| *x += z * up);
        }
        Ok(())
    }
}

//! Ancestral sampling: diffusers' `DDPMScheduler`. Ho et al. 2020, <https://arxiv.org/abs/2006.11239>, eq. 7; learned
//! variances of Nichol & Dhariwal 2021, <https://arxiv.org/abs/2102.09672>, eq. 15.

use super::ddim::refuse_no_signal;
use super::output::{Limit, Output, mean_part, variance_part};
use super::spacing::Time;
use super::{LatentShape, Sampler, check_step};
use crate::diffusion::scheduler_file::choice;
use anyhow::{Context, Result};
use serde_json::Value;

/// Where the noise's deviation comes from (`variance_type`). "fixed_large_log" is not here: diffusers takes the root of
/// a negative logarithm there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variance {
    /// The posterior's, β̃.
    FixedSmall,
    FixedSmallLog,
    /// β.
    FixedLarge,
    /// The network's second half is the variance.
    Learned,
    /// The network's second half, −1 … 1, is the place between log β̃ and log β.
    LearnedRange,
}

pub(super) struct Ddpm {
    time: Time,
    steps: Vec<usize>,
    calls: Vec<f64>,
    output: Output,
    limit: Limit,
    variance: Variance,
}

impl Ddpm {
    pub(super) fn new(config: &Value, n: usize) -> Result<Self> {
        let time = Time::read(config, "leading", true)?;
        let steps = time.whole_steps(n)?;
        let output = Output::read(config, true)?;
        let limit = Limit::read(config, true)?;
        refuse_no_signal(&time, &steps, output, limit)?;
        let variances = [
            ("fixed_small", Variance::FixedSmall),
            ("fixed_small_log", Variance::FixedSmallLog),
            ("fixed_large", Variance::FixedLarge),
            ("learned", Variance::Learned),
            ("learned_range", Variance::LearnedRange),
        ];
        Ok(Ddpm {
            calls: steps.iter().map(|&t| t as f64).collect(),
            output,
            limit,
            variance: choice(config, "variance_type", "fixed_small", &variances)?,
            time,
            steps,
        })
    }

    /// ᾱ at a call's time step and at the next call's, 1 after the last.
    fn signals(&self, call: usize) -> (f32, f32) {
        let next = self.steps.get(call + 1);
        (self.time.signal[self.steps[call]], next.map_or(1.0, |&t| self.time.signal[t]))
    }

    /// The deviation of the noise for every number of the sample, or one for all.
    fn deviation(&self, call: usize, prediction: &[f32], shape: LatentShape) -> Result<Vec<f32>> {
        let (here, next) = self.signals(call);
        let large = 1.0 - here / next;
        let small = ((1.0 - next) / (1.0 - here) * large).max(1e-20);
        Ok(match self.variance {
            Variance::FixedSmall => vec![small.sqrt()],
            Variance::FixedSmallLog => vec![(0.5 * small.ln()).exp()],
            Variance::FixedLarge => vec![large.sqrt()],
            Variance::Learned => variance_part(prediction, shape)?.into_iter().map(f32::sqrt).collect(),
            Variance::LearnedRange => {
                let (low, high) = (small.ln(), large.ln());
                let learned = variance_part(prediction, shape)?.into_iter();
                learned
                    .map(|v| {
                        let share = (v + 1.0) / 2.0;
                        (0.5 * (share * high + (1.0 - share) * low)).exp()
                    })
                    .collect()
            }
        })
    }
}

impl Sampler for Ddpm {
    fn timesteps(&self) -> &[f64] {
        &self.calls
    }

    fn wants_noise(&self, call: usize) -> bool {
        self.steps.get(call).is_some_and(|&t| t > 0)
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
        let mean = mean_part(prediction, shape);
        let (here, next) = self.signals(call);
        let alpha = here / next;
        let mut clean = self.output.clean(sample, &mean, here.sqrt(), (1.0 - here).sqrt());
        self.limit.apply(&mut clean, shape);
        let of_clean = (next.sqrt() * (1.0 - alpha)) / (1.0 - here);
        let of_sample = alpha.sqrt() * (1.0 - next) / (1.0 - here);
        sample.iter_mut().zip(clean).for_each(|(x, x0)| *x = of_clean * x0 + of_sample * *x);
        if self.wants_noise(call) {
            let noise = noise.context("the step needs noise")?;
            let deviation = self.deviation(call, prediction, shape)?;
            let each = deviation.iter().cycle();
            sample.iter_mut().zip(noise).zip(each).for_each(|((x, &z), &d)| *x += d * z);
        }
        Ok(())
    }
}

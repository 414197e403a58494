//! DDIM: diffusers' `DDIMScheduler`. Song et al. 2020, <https://arxiv.org/abs/2010.02502>, eq. 12.

use super::output::{Limit, Output, mean_part};
use super::spacing::Time;
use super::{LatentShape, Sampler, check_step};
use crate::Refusal;
use crate::diffusion::scheduler_file::flag;
use anyhow::Result;
use serde_json::Value;

pub(super) struct Ddim {
    time: Time,
    steps: Vec<usize>,
    calls: Vec<f64>,
    output: Output,
    limit: Limit,
    /// ᾱ before the first training step.
    final_signal: f32,
    eta: f32,
}

impl Ddim {
    /// `eta` is the share of the ancestral noise, 0 … 1.
    pub(super) fn new(config: &Value, n: usize, eta: f64) -> Result<Self> {
        let time = Time::read(config, "leading", true)?;
        let steps = time.whole_steps(n)?;
        let output = Output::read(config, true)?;
        let limit = Limit::read(config, true)?;
        refuse_no_signal(&time, &steps, output, limit)?;
        let final_signal = if flag(config, "set_alpha_to_one", true)? { 1.0 } else { time.signal[0] };
        Ok(Ddim {
            calls: steps.iter().map(|&t| t as f64).collect(),
            output,
            limit,
            final_signal,
            eta: eta as f32,
            time,
            steps,
        })
    }

    /// ᾱ at a call's time step and at the one its step leads to, ⌊T/n⌋ earlier.
    fn signals(&self, call: usize) -> (f32, f32) {
        let t = self.steps[call];
        let earlier = t.checked_sub(self.time.train_steps / self.steps.len());
        (self.time.signal[t], earlier.map_or(self.final_signal, |t| self.time.signal[t]))
    }
}

/// x0 cannot be told from noise at a step without signal, which a schedule of zero terminal SNR has: it is infinite,
/// unless clipped.
pub(super) fn refuse_no_signal(time: &Time, steps: &[usize], output: Output, limit: Limit) -> Result<()> {
    let infinite = output == Output::Noise && !matches!(limit, Limit::Clip(_));
    if infinite && steps.iter().any(|&t| time.signal[t] == 0.0) {
        return Err(Refusal::error(
            "prediction_type = \"epsilon\" does not go with a noise schedule whose last step has no signal (rescale_betas_zero_snr): the first sampling step would divide by zero. Set rescale_betas_zero_snr to false, or choose another sampler.",
        ));
    }
    Ok(())
}

impl Sampler for Ddim {
    fn timesteps(&self) -> &[f64] {
        &self.calls
    }

    fn wants_noise(&self, _call: usize) -> bool {
        self.eta > 0.0
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
        let (here, next) = self.signals(call);
        let (signal, spread) = (here.sqrt(), (1.0 - here).sqrt());
        let mut clean = self.output.clean(sample, &prediction, signal, spread);
        let eps = self.output.noise(sample, &prediction, signal, spread);
        self.limit.apply(&mut clean, shape);
        let deviation = self.eta * (((1.0 - next) / (1.0 - here)) * (1.0 - here / next)).sqrt();
        // Rounding can make the difference negative, where diffusers then has NaN.
        let (root, direction) = (next.sqrt(), (1.0 - next - deviation * deviation).max(0.0).sqrt());
        for ((x, x0), e) in sample.iter_mut().zip(clean).zip(eps) {
            *x = root * x0 + direction * e;
        }
        if let Some(noise) = noise.filter(|_| self.eta > 0.0) {
            sample.iter_mut().zip(noise).for_each(|(x, &z)| *x += deviation * z);
        }
        Ok(())
    }
}

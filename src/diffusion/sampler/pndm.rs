//! Pseudo linear multistep: diffusers' `PNDMScheduler`, with the pseudo Runge-Kutta start (twelve calls) or, as Stable
//! Diffusion is configured, with one step called twice. Liu et al. 2022, <https://arxiv.org/abs/2202.09778>.

use super::ddim::refuse_no_signal;
use super::output::{Limit, Output, mean_part};
use super::spacing::Time;
use super::{LatentShape, Sampler, check_order, check_step};
use crate::Refusal;
use crate::diffusion::scheduler_file::flag;
use anyhow::Result;
use serde_json::Value;

/// Calls of the Runge-Kutta start: three steps of four calls.
const START: usize = 12;

pub(super) struct Pndm {
    time: Time,
    steps: Vec<usize>,
    calls: Vec<f64>,
    output: Output,
    /// ᾱ before the first training step.
    final_signal: f32,
    /// ⌊T/n⌋.
    stride: usize,
    /// Calls of the Runge-Kutta start, 12 or 0.
    start: usize,
    /// Number of the next call.
    next: usize,
    /// The last four predictions, newest last.
    history: Vec<Vec<f32>>,
    /// The sum of the predictions of a Runge-Kutta step so far.
    sum: Vec<f32>,
    /// The sample at the start of a step of several calls.
    origin: Vec<f32>,
}

impl Pndm {
    pub(super) fn new(config: &Value, n: usize) -> Result<Self> {
        // The class does not know rescale_betas_zero_snr.
        let time = Time::read(config, "leading", false)?;
        let rising: Vec<usize> = time.whole_steps(n)?.into_iter().rev().collect();
        refuse_no_signal(&time, &rising, Output::Noise, Limit::None)?;
        let stride = time.train_steps / n;
        let skip = flag(config, "skip_prk_steps", false)?;
        if !skip && n < 4 {
            return Err(Refusal::error(format!(
                "{n} sampling steps are too few for the Runge-Kutta start, which takes at least 4. Ask for more, or set skip_prk_steps to true."
            )));
        }
        let steps = if skip { twice_called(&rising) } else { runge_kutta_start(&rising, stride) };
        let steps = time.inside(steps, n)?;
        let final_signal = if flag(config, "set_alpha_to_one", false)? { 1.0 } else { time.signal[0] };
        Ok(Pndm {
            calls: steps.iter().map(|&t| t as f64).collect(),
            output: Output::read(config, false)?,
            final_signal,
            stride,
            start: if skip { 0 } else { START },
            next: 0,
            history: Vec::new(),
            sum: Vec::new(),
            origin: Vec::new(),
            time,
            steps,
        })
    }

    /// One call of the Runge-Kutta start: the prediction to follow, and the time steps from and to.
    fn runge_kutta(&mut self, call: usize, prediction: &[f32], sample: &[f32]) -> (Vec<f32>, usize, Option<usize>) {
        let part = |weight: f64| prediction.iter().map(move |p| weight as f32 * p);
        let third = |sum: &mut [f32]| sum.iter_mut().zip(part(1.0 / 3.0)).for_each(|(s, p)| *s += p);
        let follow = match call % 4 {
            0 => {
                self.sum = part(1.0 / 6.0).collect();
                self.remember(prediction);
                self.origin = sample.to_vec();
                prediction.to_vec()
            }
            1 | 2 => {
                third(&mut self.sum);
                prediction.to_vec()
            }
            _ => std::mem::take(&mut self.sum).into_iter().zip(part(1.0 / 6.0)).map(|(s, p)| s + p).collect(),
        };
        let back = if call % 2 == 1 { 0 } else { self.stride / 2 };
        (follow, self.steps[call / 4 * 4], self.steps[call].checked_sub(back))
    }

    /// One call of the multistep method, likewise: Adams-Bashforth of the order that the history allows.
    fn multistep(&mut self, call: usize, prediction: &[f32], sample: &[f32]) -> (Vec<f32>, usize, Option<usize>) {
        let t = self.steps[call];
        if self.start == 0 && call == 1 {
            // The first step once more, now with the mean of the predictions at both its ends.
            let follow = self.history[0].iter().zip(prediction).map(|(old, new)| (new + old) / 2.0).collect();
            return (follow, t + self.stride, Some(t));
        }
        self.remember(prediction);
        self.origin = sample.to_vec();
        let mix = |weights: &[f32]| -> Vec<f32> {
            let newest = self.history.iter().rev().take(weights.len());
            let mut terms = newest.zip(weights).map(|(e, w)| e.iter().map(move |e| w * e));
            let mut sum: Vec<f32> = terms.next().into_iter().flatten().collect();
            terms.for_each(|term| sum.iter_mut().zip(term).for_each(|(s, t)| *s += t));
            sum
        };
        let follow = match self.history.len() {
            1 => prediction.to_vec(),
            2 => mix(&[3.0, -1.0]).into_iter().map(|e| e / 2.0).collect(),
            3 => mix(&[23.0, -16.0, 5.0]).into_iter().map(|e| e / 12.0).collect(),
            _ => mix(&[55.0, -59.0, 37.0, -9.0]).into_iter().map(|e| (1.0f64 / 24.0) as f32 * e).collect(),
        };
        (follow, t, t.checked_sub(self.stride))
    }

    fn remember(&mut self, prediction: &[f32]) {
        if self.history.len() == 4 {
            self.history.remove(0);
        }
        self.history.push(prediction.to_vec());
    }
}

/// The time steps with the second one told twice.
fn twice_called(rising: &[usize]) -> Vec<usize> {
    let mut steps: Vec<usize> = rising.iter().rev().copied().collect();
    if let Some(&second) = steps.get(1) {
        steps.insert(2, second);
    }
    steps
}

/// The time steps of three Runge-Kutta steps, then the rest. Each of the three calls its start, its middle twice and its end.
fn runge_kutta_start(rising: &[usize], stride: usize) -> Vec<usize> {
    let falling: Vec<usize> = rising.iter().rev().copied().collect();
    let steps = (0..START / 4).flat_map(|i| {
        let (from, to) = (falling[i], falling[i + 1]);
        [from, to + stride / 2, to + stride / 2, to]
    });
    steps.chain(falling[START / 4..].iter().copied()).collect()
}

impl Sampler for Pndm {
    fn timesteps(&self) -> &[f64] {
        &self.calls
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
        check_order(call, self.next)?;
        self.next += 1;
        let prediction = mean_part(prediction, shape);
        let (follow, from, to) = match call < self.start {
            true => self.runge_kutta(call, &prediction, sample),
            false => self.multistep(call, &prediction, sample),
        };
        // Eq. 9 of the paper, between the signal shares of the two time steps.
        let here = self.time.signal[from];
        let there = to.map_or(self.final_signal, |t| self.time.signal[t]);
        let eps = self.output.noise(&self.origin, &follow, here.sqrt(), (1.0 - here).sqrt());
        let of_sample = (there / here).sqrt();
        let (difference, divisor) = (there - here, here * (1.0 - there).sqrt() + (here * (1.0 - here) * there).sqrt());
        for ((x, origin), e) in sample.iter_mut().zip(&self.origin).zip(eps) {
            *x = of_sample * origin - difference * e / divisor;
        }
        Ok(())
    }
}

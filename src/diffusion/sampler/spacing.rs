//! Which of the T training time steps a sampler visits, in numpy's arithmetic.

use crate::Refusal;
use crate::diffusion::schedule::signal_shares;
use crate::diffusion::scheduler_file::{choice, count, flag};
use anyhow::Result;
use serde_json::Value;

/// How time steps are spread (`timestep_spacing`; Lin et al. 2023, <https://arxiv.org/abs/2305.08891>, table 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spacing {
    /// From T−1 to 0, both included.
    Linspace,
    /// Multiples of ⌊T/n⌋ from 0, plus `steps_offset`: the last training step is never visited.
    Leading,
    /// From T−1 down in steps of T/n.
    Trailing,
}

/// What all samplers read: the noise schedule and the spread of time steps over it.
#[derive(Clone, Debug)]
pub(super) struct Time {
    /// ᾱ of every training step.
    pub signal: Vec<f32>,
    /// T.
    pub train_steps: usize,
    pub spacing: Spacing,
    /// Added to the time steps of [`Spacing::Leading`].
    pub offset: usize,
    pub zero_terminal_snr: bool,
}

impl Time {
    /// `default_spacing` is the class's; `rescales` says whether it knows `rescale_betas_zero_snr`.
    pub(super) fn read(config: &Value, default_spacing: &str, rescales: bool) -> Result<Self> {
        let spacings =
            [("linspace", Spacing::Linspace), ("leading", Spacing::Leading), ("trailing", Spacing::Trailing)];
        let spacing = choice(config, "timestep_spacing", default_spacing, &spacings)?;
        let zero_terminal_snr = rescales && flag(config, "rescale_betas_zero_snr", false)?;
        let signal = signal_shares(config, zero_terminal_snr)?;
        let train_steps = count(config, "num_train_timesteps", 1000)?;
        if signal.len() < train_steps || train_steps == 0 {
            return Err(Refusal::error(format!(
                "num_train_timesteps = {train_steps}, but trained_betas has {} values. Set num_train_timesteps to the number of betas.",
                signal.len()
            )));
        }
        let offset = count(config, "steps_offset", 0)?;
        Ok(Time { signal, train_steps, spacing, offset, zero_terminal_snr })
    }

    /// The largest noise share that is still finite as a ratio: where ᾱ_{T−1} is zero the samplers in terms of
    /// σ = √((1−ᾱ)/ᾱ) take 2⁻²⁴ in its place, as diffusers does.
    pub(super) fn keep_sigmas_finite(&mut self) {
        if self.zero_terminal_snr
            && let Some(last) = self.signal.last_mut()
        {
            *last = 2f32.powi(-24);
        }
    }

    /// The n time steps, falling, of samplers that end at the first training step: ddpm, ddim, pndm.
    ///
    /// # Errors
    /// A [`Refusal`]: more steps than the model was trained with; an offset that leads past the last training step.
    pub(super) fn whole_steps(&self, n: usize) -> Result<Vec<usize>> {
        self.at_most_train_steps(n)?;
        let steps: Vec<usize> = self.spread(n).into_iter().map(|t| t.round_ties_even() as usize).collect();
        self.inside(steps, n)
    }

    pub(super) fn at_most_train_steps(&self, n: usize) -> Result<()> {
        if n > self.train_steps {
            return Err(Refusal::error(format!(
                "{n} sampling steps are more than the {} time steps that the model was trained with (num_train_timesteps). Ask for fewer.",
                self.train_steps
            )));
        }
        Ok(())
    }

    /// Time steps that must be places in the table.
    pub(super) fn inside(&self, steps: Vec<usize>, n: usize) -> Result<Vec<usize>> {
        match steps.iter().find(|&&t| t >= self.signal.len()) {
            None => Ok(steps),
            Some(t) => Err(Refusal::error(format!(
                "{n} sampling steps with steps_offset = {} lead to time step {t}, past the model's last, {}. Ask for fewer steps.",
                self.offset,
                self.signal.len() - 1
            ))),
        }
    }

    /// n time steps, falling, not rounded in the case of [`Spacing::Linspace`].
    pub(super) fn spread(&self, n: usize) -> Vec<f64> {
        match self.spacing {
            Spacing::Linspace => linspace(0.0, (self.train_steps - 1) as f64, n).into_iter().rev().collect(),
            Spacing::Leading => {
                let ratio = self.train_steps / n;
                (0..n).rev().map(|i| (i * ratio + self.offset) as f64).collect()
            }
            Spacing::Trailing => self.trailing(self.train_steps, n),
        }
    }

    /// From `last`−1 down in steps of T/n, rounded; n of them if `last` is T. (numpy's `arange` gives one more, time
    /// step −1, for a few n such as 61, where T/(T/n) is rounded up; we do not follow it there.)
    pub(super) fn trailing(&self, last: usize, n: usize) -> Vec<f64> {
        let ratio = self.train_steps as f64 / n as f64;
        let stride = (last as f64 - ratio) - last as f64;
        let many = ((last as f64 / ratio).ceil() as usize).min(n);
        (0..many).map(|i| (last as f64 + i as f64 * stride).round_ties_even() - 1.0).collect()
    }
}

/// `numpy.linspace(start, stop, n)`.
pub(super) fn linspace(start: f64, stop: f64, n: usize) -> Vec<f64> {
    let stride = (stop - start) / (n.max(2) - 1) as f64;
    (0..n).map(|i| if i + 1 == n && n > 1 { stop } else { i as f64 * stride + start }).collect()
}

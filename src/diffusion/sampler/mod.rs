//! Samplers: the way from noise to a picture, each equal to diffusers' scheduler class of that name. A sampler says at
//! which time steps the network is called and what each answer makes of the latents; it calls no network, draws no
//! numbers and knows nothing of guidance. Arithmetic is in f32 in PyTorch's order of operations, on plain slices; every
//! element's chain of operations depends on its own picture alone, so a picture's bits do not depend on the batch.

mod beta_quantile;
mod config;
mod ddim;
mod ddpm;
mod dpm_solver;
mod euler;
mod kind;
mod multistep;
mod output;
mod pndm;
mod sigmas;
mod spacing;
#[cfg(test)]
mod tests;
mod unipc;

pub use config::SamplerConfig;
pub use kind::SamplerKind;

use anyhow::{Result, bail};

/// The shape of a batch of latents: (pictures, channels, height·width).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentShape {
    pub pictures: usize,
    pub channels: usize,
    /// Height times width.
    pub area: usize,
}

impl LatentShape {
    /// Numbers in one picture.
    pub fn picture(&self) -> usize {
        self.channels * self.area
    }

    /// Numbers in the batch.
    pub fn numbers(&self) -> usize {
        self.pictures * self.picture()
    }
}

/// One way from noise to a picture, over a fixed number of steps. It is used up by one batch: build another for the next.
///
/// ```text
/// sample = standard normal * initial_scale()
/// for call in 0 .. timesteps().len():
///     prediction = network(network_input(call, sample), timesteps()[call])
///     step(call, prediction, noise if wants_noise(call), shape, sample)
/// ```
pub trait Sampler: Send {
    /// What the network is told, one for every call of it. Fractions occur; PLMS tells one time twice at its start.
    fn timesteps(&self) -> &[f64];

    /// The factor of the standard normal start (`init_noise_sigma`).
    fn initial_scale(&self) -> f32 {
        1.0
    }

    /// What the network is shown in place of `sample` (`scale_model_input`).
    fn network_input(&self, _call: usize, sample: &[f32]) -> Vec<f32> {
        sample.to_vec()
    }

    /// Whether this step takes standard normal numbers: exactly where diffusers draws them, even if their factor is zero.
    fn wants_noise(&self, _call: usize) -> bool {
        false
    }

    /// Replaces `sample` (pictures, channels, area) by the next one, given the network's `prediction` for call number
    /// `call`: of the same shape, or with twice the channels, the second half being the learned variance, which is
    /// dropped by samplers that have no use for it.
    ///
    /// # Errors
    /// Slices of wrong lengths, noise missing where it is wanted, a learned variance missing, calls out of order.
    fn step(
        &mut self,
        call: usize,
        prediction: &[f32],
        noise: Option<&[f32]>,
        shape: LatentShape,
        sample: &mut Vec<f32>,
    ) -> Result<()>;
}

/// What every step asks of its arguments.
fn check_step(
    sampler: &dyn Sampler,
    call: usize,
    prediction: &[f32],
    noise: Option<&[f32]>,
    shape: LatentShape,
    sample: &[f32],
) -> Result<()> {
    let (calls, numbers) = (sampler.timesteps().len(), shape.numbers());
    if call >= calls {
        bail!("call {call} of a sampler that has {calls}");
    }
    if sample.len() != numbers {
        bail!("{} latents for the shape {shape:?}", sample.len());
    }
    if prediction.len() != numbers && prediction.len() != 2 * numbers {
        bail!("a prediction of {} numbers for {numbers} latents", prediction.len());
    }
    match noise {
        None if sampler.wants_noise(call) => bail!("call {call} of the sampler needs noise"),
        Some(noise) if noise.len() != numbers => bail!("{} numbers of noise for {numbers} latents", noise.len()),
        _ => Ok(()),
    }
}

/// Multistep samplers remember earlier calls, so these must come in order.
fn check_order(call: usize, expected: usize) -> Result<()> {
    if call != expected {
        bail!("call {call} of a sampler that was at call {expected}");
    }
    Ok(())
}

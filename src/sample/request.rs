//! What is asked of [`Sampling`](super::Sampling), and what it hands over.

use anyhow::Result;
use image::RgbImage;

use super::noise::Noise;
use crate::Refusal;
use crate::diffusion::sampler::SamplerKind;
use crate::model::{UnetConfig, VaeConfig};
use crate::pipeline::Prompts;

/// One picture to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Keys its noise: the same number under the same seed is the same picture.
    pub number: u64,
    /// What it shows, by its number among the request's prompts.
    pub prompt: usize,
    /// What it does not show, likewise. Not read where the guidance scale is 1 or less.
    pub negative: usize,
}

/// How pictures are made; the same for all of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    pub sampler: SamplerKind,
    pub steps: usize,
    /// 1 and less: no guidance, as in diffusers.
    pub guidance_scale: f64,
    /// Lin et al. 2023, <https://arxiv.org/abs/2305.08891>, section 3.4; 0: off.
    pub guidance_rescale: f64,
    /// Of the latents.
    pub height: usize,
    /// Of the latents.
    pub width: usize,
    /// Pictures that a rank makes at a time.
    pub batch_size: usize,
}

impl Settings {
    /// diffusers' defaults: 50 steps, guidance 7.5, the size that the model was made for (64 latents where it says
    /// nothing), one picture at a time.
    pub fn of(sampler: SamplerKind, unet: &UnetConfig) -> Self {
        let (height, width) = unet.sample_size.unwrap_or((64, 64));
        Settings { sampler, steps: 50, guidance_scale: 7.5, guidance_rescale: 0.0, height, width, batch_size: 1 }
    }

    /// The same for pictures of this size in pixels.
    ///
    /// # Errors
    /// A [`Refusal`] if a side is not a multiple of 8 and of the VAE's step.
    pub fn with_size(self, height: usize, width: usize, vae: &VaeConfig) -> Result<Self> {
        let step = vae.downscale().max(8);
        for (name, side) in [("height", height), ("width", width)] {
            if side == 0 || !side.is_multiple_of(step) {
                let (below, above) = (side / step * step, (side / step + 1) * step);
                let near = if below > 0 { format!("{below} or {above}") } else { above.to_string() };
                return Err(Refusal::error(format!(
                    "a {name} of {side} pixels: it must be a multiple of {step}, such as {near}"
                )));
            }
        }
        Ok(Settings { height: height / vae.downscale(), width: width / vae.downscale(), ..self })
    }

    /// Whether the network is asked twice, with and without the prompt.
    pub fn guided(&self) -> bool {
        self.guidance_scale > 1.0
    }
}

/// Pictures to make, the same list on every rank.
pub struct Request<'a> {
    pub pictures: &'a [Picture],
    /// What the pictures' prompt numbers mean. Where the graph has a text encoder in front of it: tokens.
    pub prompts: &'a Prompts,
    pub settings: Settings,
    pub noise: &'a Noise,
}

/// A picture that is done.
pub struct Made {
    pub picture: Picture,
    /// Its place in the request.
    pub index: usize,
    pub image: RgbImage,
    /// (C, h, w), as the sampler leaves them.
    pub latents: Vec<f32>,
}

/// How a request ended, errors aside; the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Done,
    /// A rank was told to stop. What was handed over is whole.
    Interrupted,
}

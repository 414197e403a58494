//! Networks of published shapes, and weights that need no file.

use std::ops::Range;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use crate::device::Compute;
use crate::diffusion::{Draws, Purpose, Row};
use crate::model::{Conditioning, Denoiser, TextConfig, UnetConfig, denoiser, time_features};
use crate::optim::AdamW;
use crate::segment::SlotId;
use crate::train::step::{Group, Inputs};
use crate::zero::WeightSource;

/// Weights that depend on the tensor's name and the element alone, so that every rank makes just its own: small
/// uniform numbers, and ones where a norm's scale is.
pub struct Made;

impl WeightSource for Made {
    fn read(&self, name: &str, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        let scale = name.contains("norm") && name.ends_with("weight");
        let mut state = twox_hash::XxHash3_64::oneshot_with_seed(range.start as u64, name.as_bytes()) | 1;
        for to in into {
            // xorshift64: quality does not matter, speed does.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let uniform = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            *to = if scale { 1.0 + 0.1 * uniform } else { 0.04 * uniform };
        }
        Ok(())
    }
}

/// SD 1.5's UNet, all of it trainable, for fp32.
pub fn sd15() -> (UnetConfig, Denoiser) {
    sd15_in(DType::F32, false)
}

/// SD 1.5's UNet, all of it trainable; if wanted with its text encoder in front of it, that too.
pub fn sd15_in(dtype: DType, with_text_encoder: bool) -> (UnetConfig, Denoiser) {
    let config = UnetConfig::sd15_shape();
    let text = with_text_encoder.then(TextConfig::sd15_shape);
    let denoiser = denoiser(&config, text.as_ref(), false, dtype);
    (config, denoiser)
}

pub fn noise(draws: &Draws, item: u64, shape: &[usize]) -> Result<Tensor> {
    let mut values = vec![0f32; shape.iter().product()];
    draws.normal(Purpose::Noise, Row::Instance, item, &mut values);
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Inputs of `rows` rows for the whole UNet, where it computes: `latent` x `latent` latents, 77 tokens.
pub fn unet_inputs(
    config: &UnetConfig,
    denoiser_slots: &crate::model::DenoiserSlots,
    compute: &Compute,
    (rows, latent): (usize, usize),
    item: u64,
) -> Result<Inputs> {
    let draws = Draws::new(item);
    let there = |tensor: Tensor| tensor.to_dtype(compute.dtype)?.to_device(&compute.device);
    let features = time_features(vec![500.0; rows], config);
    let width = features.len() / rows;
    let mut slots: Vec<(SlotId, Tensor)> = vec![
        (denoiser_slots.sample, there(noise(&draws, 0, &[rows, config.in_channels, latent, latent])?)?),
        (denoiser_slots.time_features, there(Tensor::from_vec(features, (rows, width), &Device::Cpu)?)?),
    ];
    match &denoiser_slots.conditioning {
        Conditioning::Context(slot) => {
            slots.push((*slot, there(noise(&draws, 1, &[rows, 77, config.cross_attention_dim])?)?));
        }
        Conditioning::Prompts(text) => {
            // One prompt for all rows.
            let ids: Vec<u32> = (0..77).map(|i| i * 631 % 49_408).collect();
            slots.push((text.token_ids, Tensor::from_vec(ids, (1, 77), &compute.device)?));
            slots.push((text.rows, Tensor::zeros(rows, DType::U32, &compute.device)?));
        }
    }
    Ok(Inputs { slots, prediction: denoiser_slots.prediction })
}

pub fn group() -> Group {
    Group { adamw: AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 }, rate: 1e-6 }
}

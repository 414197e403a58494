//! The encoder of the VAE (`AutoencoderKL`) as frozen segments, so that a large one streams too, and the layers that it
//! has in common with the decoder, which is `vae_decoder.rs`.

use candle_core::{Result, Tensor};

use super::config::VaeConfig;
use super::layers::{Conv, GroupNorm, Linear, take};
use super::resnet::{Resnet, ResnetShape};
use crate::ops::{self, Mask};
use crate::segment::{GraphBuilder, Params, Segment, SegmentGraph, SlotId};

/// Every norm of the VAE has this eps, whatever the configuration says.
pub(super) const EPS: f64 = 1e-6;

/// Pixels -> mean and log-variance of the latents.
pub struct VaeEncoder {
    pub graph: SegmentGraph,
    /// Input: (B, 3, H, W), from -1 to 1.
    pub pixels: SlotId,
    /// Output: (B, 2 * latent_channels, H/8, W/8), means first; not clamped, not scaled.
    pub moments: SlotId,
}

pub fn vae_encoder(config: &VaeConfig) -> VaeEncoder {
    let mut b = GraphBuilder::new();
    let pixels = b.input("pixels");
    let moments = append_encoder(&mut b, config, pixels, false);
    VaeEncoder { graph: b.finish(), pixels, moments }
}

/// Appends the encoder, which reads `pixels`; returns the slot of the moments.
pub(super) fn append_encoder(b: &mut GraphBuilder, config: &VaeConfig, pixels: SlotId, trainable: bool) -> SlotId {
    let mut segment = |name: &str, input: SlotId, build: &dyn Fn(&Params) -> Box<dyn Segment>| {
        let name = format!("vae.encoder.{name}");
        let [output] = b.segment(name.clone(), "vae", trainable, &[input], [name.as_str()], build);
        output
    };
    let shape = ResnetShape { groups: config.norm_num_groups, eps: EPS, time_width: None, output_scale: 1.0 };
    let mut channels = config.channels[0];
    let mut x = segment("in", pixels, &|p| {
        Box::new(Convolution(Conv::same(&p.pp("encoder.conv_in"), config.in_channels, channels, 3)))
    });
    for (i, &outputs) in config.channels.iter().enumerate() {
        let block = format!("down_blocks.{i}");
        for layer in 0..config.layers {
            x = segment(&format!("{block}.layer{layer}"), x, &|p| {
                let p = p.pp("encoder").pp(&block).pp("resnets").pp(layer);
                Box::new(Layer(Resnet::new(&p, channels, outputs, shape)))
            });
            channels = outputs;
        }
        if i + 1 < config.channels.len() {
            x = segment(&format!("{block}.downsample"), x, &|p| {
                let p = p.pp("encoder").pp(&block).pp("downsamplers.0.conv");
                Box::new(Convolution(Conv::halving(&p, channels, 0)))
            });
        }
    }
    x = segment("mid_block", x, &|p| Box::new(Mid::new(&p.pp("encoder.mid_block"), channels, config, shape)));
    segment("out", x, &|p| {
        let latents = 2 * config.latent_channels;
        Box::new(Output {
            norm: GroupNorm::new(&p.pp("encoder.conv_norm_out"), channels, config.norm_num_groups, EPS),
            conv: Conv::same(&p.pp("encoder.conv_out"), channels, latents, 3),
            quant: config.use_quant_conv.then(|| Conv::same(&p.pp("quant_conv"), latents, latents, 1)),
        })
    })
}

struct Convolution(Conv);

impl Segment for Convolution {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x] = take(inputs)?;
        Ok(vec![self.0.forward(x)?])
    }
}

pub(super) struct Layer(pub(super) Resnet);

impl Segment for Layer {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x] = take(inputs)?;
        Ok(vec![self.0.forward(x, None)?])
    }
}

pub(super) struct Mid {
    first: Resnet,
    attention: Option<PixelAttention>,
    second: Resnet,
}

impl Mid {
    pub(super) fn new(p: &Params, channels: usize, config: &VaeConfig, shape: ResnetShape) -> Self {
        Mid {
            first: Resnet::new(&p.pp("resnets.0"), channels, channels, shape),
            attention: config.mid_attention.then(|| PixelAttention::new(&p.pp("attentions.0"), channels, shape.groups)),
            second: Resnet::new(&p.pp("resnets.1"), channels, channels, shape),
        }
    }
}

impl Segment for Mid {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x] = take(inputs)?;
        let mut x = self.first.forward(x, None)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        Ok(vec![self.second.forward(&x, None)?])
    }
}

/// Single-head attention of the pixels among themselves, with its own norm and residual.
struct PixelAttention {
    norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl PixelAttention {
    fn new(p: &Params, channels: usize, groups: usize) -> Self {
        let linear = |name: &str| Linear::new(&p.pp(name), channels, channels);
        PixelAttention {
            norm: GroupNorm::new(&p.pp("group_norm"), channels, groups, EPS),
            to_q: linear("to_q"),
            to_k: linear("to_k"),
            to_v: linear("to_v"),
            to_out: linear("to_out.0"),
        }
    }

    /// (B, C, H, W) -> (B, C, H, W)
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = x.dims4()?;
        let h = ops::tokens_from_image(&self.norm.forward(x)?)?;
        let (q, k, v) = (self.to_q.forward(&h)?, self.to_k.forward(&h)?, self.to_v.forward(&h)?);
        let h = self.to_out.forward(&ops::attention(&q, &k, &v, 1, &Mask::default())?)?;
        ops::add(&ops::image_from_tokens(&h, height, width)?, x)
    }
}

pub(super) struct Output {
    pub(super) norm: GroupNorm,
    pub(super) conv: Conv,
    pub(super) quant: Option<Conv>,
}

impl Segment for Output {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x] = take(inputs)?;
        let x = self.conv.forward(&self.norm.silu(x)?)?;
        match &self.quant {
            Some(quant) => Ok(vec![quant.forward(&x)?]),
            None => Ok(vec![x]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_encoder_has_its_parameters() {
        assert_eq!(vae_encoder(&VaeConfig::sd_shape()).graph.parameters(), 34_163_592 + 72);
    }
}

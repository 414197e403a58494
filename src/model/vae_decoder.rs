//! The decoder of the VAE (`AutoencoderKL`) as frozen segments: the encoder's mirror image.

use candle_core::{Result, Tensor};

use super::config::VaeConfig;
use super::layers::{Conv, GroupNorm, take};
use super::resnet::{Resnet, ResnetShape};
use super::vae::{EPS, Layer, Mid, Output};
use crate::ops;
use crate::segment::{GraphBuilder, Params, Segment, SegmentGraph, SlotId};

/// Latents -> pixels.
pub struct VaeDecoder {
    pub graph: SegmentGraph,
    /// Input: (B, latent_channels, h, w), as the encoder's means are: neither scaled nor shifted.
    pub latents: SlotId,
    /// Output: (B, 3, H, W) with H/h = W/w = [`VaeConfig::downscale`]; from -1 to 1, give or take.
    pub pixels: SlotId,
}

pub fn vae_decoder(config: &VaeConfig) -> VaeDecoder {
    let mut b = GraphBuilder::new();
    let latents = b.input("latents");
    let pixels = append_decoder(&mut b, config, latents, false);
    VaeDecoder { graph: b.finish(), latents, pixels }
}

/// Appends the decoder, which reads `latents`; returns the slot of the pixels.
pub(super) fn append_decoder(b: &mut GraphBuilder, config: &VaeConfig, latents: SlotId, trainable: bool) -> SlotId {
    let mut segment = |name: &str, input: SlotId, build: &dyn Fn(&Params) -> Box<dyn Segment>| {
        let name = format!("vae.decoder.{name}");
        let [output] = b.segment(name.clone(), "vae", trainable, &[input], [name.as_str()], build);
        output
    };
    let shape = ResnetShape { groups: config.norm_num_groups, eps: EPS, time_width: None, output_scale: 1.0 };
    let levels = config.channels.len();
    let mut channels = config.channels[levels - 1];
    let mut x = segment("in", latents, &|p| {
        let latents = config.latent_channels;
        Box::new(Input {
            quant: config.use_post_quant_conv.then(|| Conv::same(&p.pp("post_quant_conv"), latents, latents, 1)),
            conv: Conv::same(&p.pp("decoder.conv_in"), latents, channels, 3),
        })
    });
    x = segment("mid_block", x, &|p| Box::new(Mid::new(&p.pp("decoder.mid_block"), channels, config, shape)));
    for (i, &outputs) in config.channels.iter().rev().enumerate() {
        let block = format!("up_blocks.{i}");
        for layer in 0..=config.layers {
            x = segment(&format!("{block}.layer{layer}"), x, &|p| {
                let p = p.pp("decoder").pp(&block).pp("resnets").pp(layer);
                Box::new(Layer(Resnet::new(&p, channels, outputs, shape)))
            });
            channels = outputs;
        }
        if i + 1 < levels {
            x = segment(&format!("{block}.upsample"), x, &|p| {
                let p = p.pp("decoder").pp(&block).pp("upsamplers.0.conv");
                Box::new(Upsample(Conv::same(&p, channels, channels, 3)))
            });
        }
    }
    segment("out", x, &|p| {
        Box::new(Output {
            norm: GroupNorm::new(&p.pp("decoder.conv_norm_out"), channels, config.norm_num_groups, EPS),
            conv: Conv::same(&p.pp("decoder.conv_out"), channels, 3, 3),
            quant: None,
        })
    })
}

struct Input {
    quant: Option<Conv>,
    conv: Conv,
}

impl Segment for Input {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x] = take(inputs)?;
        let x = match &self.quant {
            Some(quant) => self.conv.forward(&quant.forward(x)?)?,
            None => self.conv.forward(x)?,
        };
        Ok(vec![x])
    }
}

/// [x] -> [x at twice the size].
struct Upsample(Conv);

impl Segment for Upsample {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x] = take(inputs)?;
        let (_, _, height, width) = x.dims4()?;
        Ok(vec![self.0.forward(&ops::upsample_nearest(x, 2 * height, 2 * width)?)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_decoder_has_its_parameters() {
        // What AutoencoderKL has in all, less the encoder and `quant_conv`.
        assert_eq!(vae_decoder(&VaeConfig::sd_shape()).graph.parameters(), 83_653_863 - 34_163_664);
    }
}

//! The UNet of Stable Diffusion 1.x and 2.x (`UNet2DConditionModel`) as segments: the embeddings with `conv_in`, every
//! layer (ResNet and, where the block has attention, transformer), every down- and upsampler, the mid block, the output.

use candle_core::{Result, Tensor};

use super::config::UnetConfig;
use super::layers::{Conv, GroupNorm, Linear, take};
use super::resnet::{Resnet, ResnetShape};
use super::transformer::{Transformer, TransformerShape};
use crate::ops::{self, Activation};
use crate::segment::{GraphBuilder, Params, Segment, SlotId};

/// The slots that the UNet reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct UnetInputs {
    /// Noisy latents (B, in_channels, h, w).
    pub sample: SlotId,
    /// [`time_features`](super::time_features) (B, c0).
    pub time_features: SlotId,
    /// Encoded prompts (B, tokens, cross_attention_dim).
    pub context: SlotId,
}

/// Appends the UNet; returns the slot of its prediction (B, out_channels, h, w).
pub(super) fn append(b: &mut GraphBuilder, config: &UnetConfig, inputs: UnetInputs, trainable: bool) -> SlotId {
    let outputs = ["unet.conv_in", "unet.temb"];
    let [x, temb] = b.segment("unet.embed", PREFIX, trainable, &[inputs.sample, inputs.time_features], outputs, |p| {
        Box::new(Embed::new(p, config))
    });
    let mut wiring = Wiring {
        b,
        config,
        trainable,
        x: (x, config.levels[0].channels),
        skips: vec![(x, config.levels[0].channels)],
        temb,
        context: inputs.context,
    };
    wiring.down();
    wiring.mid();
    wiring.up();
    wiring.output()
}

const PREFIX: &str = "unet";

/// The graph as far as it is built. A slot goes with its channels.
struct Wiring<'a> {
    b: &'a mut GraphBuilder,
    config: &'a UnetConfig,
    trainable: bool,
    x: (SlotId, usize),
    /// Written on the way down, read on the way up, last first.
    skips: Vec<(SlotId, usize)>,
    temb: SlotId,
    context: SlotId,
}

impl Wiring<'_> {
    fn segment(&mut self, name: &str, inputs: &[SlotId], build: impl FnOnce(&Params) -> Box<dyn Segment>) -> SlotId {
        let name = format!("{PREFIX}.{name}");
        let [output] = self.b.segment(name.clone(), PREFIX, self.trainable, inputs, [name.as_str()], build);
        output
    }

    fn transformer(&self, level: usize, depth: usize, only_cross_attention: bool) -> TransformerShape {
        TransformerShape {
            channels: self.config.levels[level].channels,
            heads: self.config.levels[level].heads,
            depth,
            context_width: self.config.cross_attention_dim,
            groups: self.config.norm_num_groups,
            linear_projection: self.config.use_linear_projection,
            only_cross_attention,
        }
    }

    /// Resnet `layer` of `block` and its transformer, if it has one; with `skip` it reads [x, skip].
    fn layer(
        &mut self,
        block: &str,
        layer: usize,
        outputs: usize,
        skip: Option<(SlotId, usize)>,
        transformer: Option<TransformerShape>,
    ) {
        let resnet = resnet_shape(self.config, 1.0);
        let channels = self.x.1 + skip.map_or(0, |(_, channels)| channels);
        let mut inputs = vec![self.x.0];
        inputs.extend(skip.map(|(slot, _)| slot));
        inputs.push(self.temb);
        inputs.extend(transformer.map(|_| self.context));
        let slot = self.segment(&format!("{block}.layer{layer}"), &inputs, |p| {
            let p = p.pp(block);
            Box::new(Layer {
                resnet: Resnet::new(&p.pp("resnets").pp(layer), channels, outputs, resnet),
                transformer: transformer.map(|shape| Transformer::new(&p.pp("attentions").pp(layer), shape)),
                skip: skip.is_some(),
            })
        });
        self.x = (slot, outputs);
    }

    fn down(&mut self) {
        let config = self.config;
        for (i, level) in config.levels.iter().enumerate() {
            let block = format!("down_blocks.{i}");
            let transformer = level.down_depth.map(|depth| self.transformer(i, depth, level.only_cross_attention));
            for layer in 0..level.layers {
                self.layer(&block, layer, level.channels, None, transformer);
                self.skips.push(self.x);
            }
            if i + 1 < config.levels.len() {
                let inputs = [self.x.0];
                self.x.0 = self.segment(&format!("{block}.downsample"), &inputs, |p| {
                    let p = p.pp(&block).pp("downsamplers.0.conv");
                    Box::new(Downsample(Conv::halving(&p, level.channels, config.downsample_padding)))
                });
                self.skips.push(self.x);
            }
        }
    }

    fn mid(&mut self) {
        let config = self.config;
        let channels = self.x.1;
        // The peer's mid block has self-attention whatever `only_cross_attention` says.
        let transformer = self.transformer(config.levels.len() - 1, config.mid_depth, false);
        let resnet = resnet_shape(config, config.mid_block_scale_factor);
        let inputs = [self.x.0, self.temb, self.context];
        self.x.0 = self.segment("mid_block", &inputs, |p| {
            let p = p.pp("mid_block");
            Box::new(Mid {
                first: Resnet::new(&p.pp("resnets.0"), channels, channels, resnet),
                transformer: Transformer::new(&p.pp("attentions.0"), transformer),
                second: Resnet::new(&p.pp("resnets.1"), channels, channels, resnet),
            })
        });
    }

    fn up(&mut self) {
        let config = self.config;
        for (i, level) in config.levels.iter().rev().enumerate() {
            let block = format!("up_blocks.{i}");
            let at = config.levels.len() - 1 - i;
            let transformer = level.up_depth.map(|depth| self.transformer(at, depth, level.only_cross_attention));
            for layer in 0..=level.layers {
                let skip = self.skips.pop();
                self.layer(&block, layer, level.channels, skip, transformer);
            }
            // No skip is left after the last block, which does not upsample either.
            if let Some(&(next, _)) = self.skips.last() {
                let inputs = [self.x.0, next];
                self.x.0 = self.segment(&format!("{block}.upsample"), &inputs, |p| {
                    let p = p.pp(&block).pp("upsamplers.0.conv");
                    Box::new(Upsample(Conv::same(&p, level.channels, level.channels, 3)))
                });
            }
        }
    }

    fn output(mut self) -> SlotId {
        let (config, (x, channels)) = (self.config, self.x);
        self.segment("out", &[x], |p| {
            Box::new(Output {
                norm: GroupNorm::new(&p.pp("conv_norm_out"), channels, config.norm_num_groups, config.norm_eps),
                conv: Conv::same(&p.pp("conv_out"), channels, config.out_channels, config.conv_out_kernel),
            })
        })
    }
}

fn resnet_shape(config: &UnetConfig, output_scale: f64) -> ResnetShape {
    ResnetShape {
        groups: config.norm_num_groups,
        eps: config.norm_eps,
        time_width: Some(config.time_embedding_dim),
        output_scale,
    }
}

/// [sample, time features] -> [features, SiLU of the time embedding].
struct Embed {
    conv_in: Conv,
    linear_1: Linear,
    linear_2: Linear,
    center: bool,
}

impl Embed {
    fn new(p: &Params, config: &UnetConfig) -> Self {
        let (first, time) = (config.levels[0].channels, config.time_embedding_dim);
        Embed {
            conv_in: Conv::same(&p.pp("conv_in"), config.in_channels, first, config.conv_in_kernel),
            linear_1: Linear::new(&p.pp("time_embedding.linear_1"), first, time),
            linear_2: Linear::new(&p.pp("time_embedding.linear_2"), time, time),
            center: config.center_input_sample,
        }
    }
}

impl Segment for Embed {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [sample, time] = take(inputs)?;
        let x = if self.center {
            let centred = ops::noted(&[sample], sample.affine(2.0, -1.0)?, |dy| Ok(vec![Some(dy.affine(2.0, 0.0)?)]))?;
            self.conv_in.forward(&centred)?
        } else {
            self.conv_in.forward(sample)?
        };
        let time = ops::activation(&self.linear_1.forward(time)?, Activation::Silu)?;
        // Every ResNet applies SiLU to the embedding first; once is enough.
        let time = ops::activation(&self.linear_2.forward(&time)?, Activation::Silu)?;
        Ok(vec![x, time])
    }
}

/// [x, skip if it has one, time, context if it has a transformer] -> [x].
struct Layer {
    resnet: Resnet,
    transformer: Option<Transformer>,
    skip: bool,
}

impl Segment for Layer {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (x, rest) = if self.skip {
            let (skipped, rest) = inputs.split_at(2);
            (ops::cat_channels(&[&skipped[0], &skipped[1]])?, rest)
        } else {
            let (x, rest) = inputs.split_at(1);
            (x[0].clone(), rest)
        };
        let x = match &self.transformer {
            Some(transformer) => {
                let [time, context] = take(rest)?;
                transformer.forward(&self.resnet.forward(&x, Some(time))?, context)?
            }
            None => {
                let [time] = take(rest)?;
                self.resnet.forward(&x, Some(time))?
            }
        };
        Ok(vec![x])
    }
}

/// [x, time, context] -> [x].
struct Mid {
    first: Resnet,
    transformer: Transformer,
    second: Resnet,
}

impl Segment for Mid {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x, time, context] = take(inputs)?;
        let x = self.transformer.forward(&self.first.forward(x, Some(time))?, context)?;
        Ok(vec![self.second.forward(&x, Some(time))?])
    }
}

/// [x] -> [x at half the size].
struct Downsample(Conv);

impl Segment for Downsample {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x] = take(inputs)?;
        Ok(vec![self.0.forward(x)?])
    }
}

/// [x, next skip] -> [x at the size of the next skip], of which only the shape is read: that is twice the size of x,
/// or one less where the way down halved an odd side.
struct Upsample(Conv);

impl Segment for Upsample {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x, skip] = take(inputs)?;
        let (_, _, height, width) = skip.dims4()?;
        Ok(vec![self.0.forward(&ops::upsample_nearest(x, height, width)?)?])
    }
}

/// [x] -> [prediction].
struct Output {
    norm: GroupNorm,
    conv: Conv,
}

impl Segment for Output {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x] = take(inputs)?;
        Ok(vec![self.conv.forward(&self.norm.silu(x)?)?])
    }
}

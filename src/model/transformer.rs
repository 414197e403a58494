//! The transformer of the UNet (diffusers' `Transformer2DModel`): pixels attend to each other and to the text.

use candle_core::{Result, Tensor};

use super::layers::{GroupNorm, LayerNorm, Linear};
use crate::ops::{self, Mask};
use crate::segment::Params;

/// `Transformer2DModel` fixes both, whatever the configuration says.
const GROUP_NORM_EPS: f64 = 1e-6;
const LAYER_NORM_EPS: f64 = 1e-5;
/// Hidden width of the feed-forward, in widths of the transformer.
const FEED_FORWARD: usize = 4;

/// What the transformer of one block looks like.
#[derive(Clone, Copy, Debug)]
pub(super) struct TransformerShape {
    pub channels: usize,
    pub heads: usize,
    pub depth: usize,
    pub context_width: usize,
    pub groups: usize,
    /// `proj_in` and `proj_out` are stored as linear layers, not as 1x1 convolutions.
    pub linear_projection: bool,
    /// The first attention reads the text too.
    pub only_cross_attention: bool,
}

/// x + proj_out(blocks(proj_in(norm x))).
pub(super) struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<Block>,
    proj_out: Linear,
}

impl Transformer {
    pub fn new(p: &Params, shape: TransformerShape) -> Self {
        let projection = if shape.linear_projection { Linear::new } else { Linear::pointwise };
        let c = shape.channels;
        Transformer {
            norm: GroupNorm::new(&p.pp("norm"), c, shape.groups, GROUP_NORM_EPS),
            proj_in: projection(&p.pp("proj_in"), c, c),
            blocks: (0..shape.depth).map(|i| Block::new(&p.pp("transformer_blocks").pp(i), shape)).collect(),
            proj_out: projection(&p.pp("proj_out"), c, c),
        }
    }

    /// x (B, C, H, W), context (B, tokens, context_width) -> (B, C, H, W)
    pub fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = x.dims4()?;
        let mut h = self.proj_in.forward(&ops::tokens_from_image(&self.norm.forward(x)?)?)?;
        for block in &self.blocks {
            h = block.forward(&h, context)?;
        }
        ops::add(&ops::image_from_tokens(&self.proj_out.forward(&h)?, height, width)?, x)
    }
}

/// `BasicTransformerBlock`: self-attention, attention to the text, feed-forward, each after a norm and added.
struct Block {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    widen: Linear,
    narrow: Linear,
    only_cross_attention: bool,
}

impl Block {
    fn new(p: &Params, shape: TransformerShape) -> Self {
        let TransformerShape { channels: c, heads, context_width, only_cross_attention, .. } = shape;
        let own = if only_cross_attention { context_width } else { c };
        Block {
            norm1: LayerNorm::new(&p.pp("norm1"), c, LAYER_NORM_EPS),
            attn1: Attention::new(&p.pp("attn1"), c, own, heads),
            norm2: LayerNorm::new(&p.pp("norm2"), c, LAYER_NORM_EPS),
            attn2: Attention::new(&p.pp("attn2"), c, context_width, heads),
            norm3: LayerNorm::new(&p.pp("norm3"), c, LAYER_NORM_EPS),
            widen: Linear::new(&p.pp("ff.net.0.proj"), c, 2 * FEED_FORWARD * c),
            narrow: Linear::new(&p.pp("ff.net.2"), FEED_FORWARD * c, c),
            only_cross_attention,
        }
    }

    /// x (B, pixels, C)
    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let h = self.norm1.forward(x)?;
        let own = if self.only_cross_attention { context } else { &h };
        let x = ops::add(&self.attn1.forward(&h, own)?, x)?;
        let x = ops::add(&self.attn2.forward(&self.norm2.forward(&x)?, context)?, &x)?;
        let h = ops::geglu(&self.widen.forward(&self.norm3.forward(&x)?)?)?;
        ops::add(&self.narrow.forward(&h)?, &x)
    }
}

/// Multi-head attention without biases but the output's.
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    fn new(p: &Params, width: usize, context_width: usize, heads: usize) -> Self {
        Attention {
            to_q: Linear::without_bias(&p.pp("to_q"), width, width),
            to_k: Linear::without_bias(&p.pp("to_k"), context_width, width),
            to_v: Linear::without_bias(&p.pp("to_v"), context_width, width),
            to_out: Linear::new(&p.pp("to_out.0"), width, width),
            heads,
        }
    }

    /// Queries from x (B, S, width), keys and values from context (B, T, context_width) -> (B, S, width)
    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (q, k, v) = (self.to_q.forward(x)?, self.to_k.forward(context)?, self.to_v.forward(context)?);
        self.to_out.forward(&ops::attention(&q, &k, &v, self.heads, &Mask::default())?)
    }
}

//! The CLIP text encoder (`CLIPTextModel`) as segments: the embeddings, every layer, the final norm.
//!
//! It runs over a micro-batch's *unique* prompts; the last segment hands each image its prompt's states.

use candle_core::{DType, Result, Tensor};

use super::config::TextConfig;
use super::layers::{LayerNorm, Linear, take};
use crate::device::WeightRef;
use crate::ops::{self, Activation, Mask};
use crate::segment::{GraphBuilder, Params, Segment, SegmentGraph, SlotId};

/// The slots of a text encoder.
#[derive(Clone, Copy, Debug)]
pub struct TextSlots {
    /// Input: u32 (U, tokens), the unique prompts.
    pub token_ids: SlotId,
    /// Input: u32 (B), which of the unique prompts belongs to each image.
    pub rows: SlotId,
    /// Input, if padding is masked: u32 (U), how many tokens of each prompt are real.
    pub key_lengths: Option<SlotId>,
    /// Output: (B, tokens, hidden_size).
    pub context: SlotId,
}

/// A frozen text encoder.
pub struct TextEncoder {
    pub graph: SegmentGraph,
    pub slots: TextSlots,
}

/// A frozen text encoder by itself, computing in `dtype`. `mask_padding`: nobody sees the padding of a prompt, not even
/// the padding itself (`text_encoder_use_attention_mask`).
pub fn text_encoder(config: &TextConfig, mask_padding: bool, dtype: DType) -> TextEncoder {
    let mut b = GraphBuilder::new();
    let slots = append(&mut b, config, mask_padding, dtype, false);
    TextEncoder { graph: b.finish(), slots }
}

const PREFIX: &str = "text_encoder";

pub(super) fn append(
    b: &mut GraphBuilder,
    config: &TextConfig,
    mask_padding: bool,
    dtype: DType,
    trainable: bool,
) -> TextSlots {
    let token_ids = b.input("token_ids");
    let rows = b.input("prompt_rows");
    let key_lengths = mask_padding.then(|| b.input("key_lengths"));
    let mut segment = |name: String, inputs: &[SlotId], build: &dyn Fn(&Params) -> Box<dyn Segment>| {
        let name = format!("{PREFIX}.{name}");
        let [output] =
            b.segment(name.clone(), PREFIX, trainable, inputs, [name.as_str()], |p| build(&p.pp("text_model")));
        output
    };
    let width = config.hidden_size;
    let mut x = segment("embeddings".into(), &[token_ids], &|p| {
        Box::new(Embeddings {
            tokens: p.get("embeddings.token_embedding.weight", &[config.vocab_size, width]),
            positions: p.get("embeddings.position_embedding.weight", &[config.max_positions, width]),
            dtype,
        })
    });
    for i in 0..config.layers {
        let mut inputs = vec![x];
        inputs.extend(key_lengths);
        x = segment(format!("layers.{i}"), &inputs, &|p| Box::new(Layer::new(&p.pp("encoder.layers").pp(i), config)));
    }
    let context = segment("final".into(), &[x, rows], &|p| {
        Box::new(Final(LayerNorm::new(&p.pp("final_layer_norm"), width, config.layer_norm_eps)))
    });
    TextSlots { token_ids, rows, key_lengths, context }
}

/// [token ids] -> [x (U, tokens, D)].
struct Embeddings {
    tokens: WeightRef,
    positions: WeightRef,
    dtype: DType,
}

impl Segment for Embeddings {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [ids] = take(inputs)?;
        Ok(vec![ops::embedding(ids, &self.tokens, Some(&self.positions), self.dtype)?])
    }
}

/// `CLIPEncoderLayer`: [x, key lengths if padding is masked] -> [x].
struct Layer {
    layer_norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
    activation: Activation,
}

impl Layer {
    fn new(p: &Params, config: &TextConfig) -> Self {
        let (d, wide) = (config.hidden_size, config.intermediate_size);
        let attention = |name: &str| Linear::new(&p.pp("self_attn").pp(name), d, d);
        Layer {
            layer_norm1: LayerNorm::new(&p.pp("layer_norm1"), d, config.layer_norm_eps),
            q: attention("q_proj"),
            k: attention("k_proj"),
            v: attention("v_proj"),
            out: attention("out_proj"),
            layer_norm2: LayerNorm::new(&p.pp("layer_norm2"), d, config.layer_norm_eps),
            fc1: Linear::new(&p.pp("mlp.fc1"), d, wide),
            fc2: Linear::new(&p.pp("mlp.fc2"), wide, d),
            heads: config.heads,
            activation: config.activation,
        }
    }
}

impl Segment for Layer {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let x = &inputs[0];
        let lengths =
            |t: &Tensor| Ok::<_, candle_core::Error>(t.to_vec1::<u32>()?.iter().map(|&n| n as usize).collect());
        let mask = Mask { causal: true, key_lengths: inputs.get(1).map(lengths).transpose()? };
        let h = self.layer_norm1.forward(x)?;
        let (q, k, v) = (self.q.forward(&h)?, self.k.forward(&h)?, self.v.forward(&h)?);
        let x = ops::add(x, &self.out.forward(&ops::attention(&q, &k, &v, self.heads, &mask)?)?)?;
        let h = self.fc1.forward(&self.layer_norm2.forward(&x)?)?;
        let h = self.fc2.forward(&ops::activation(&h, self.activation)?)?;
        Ok(vec![ops::add(&x, &h)?])
    }
}

/// [x (U, tokens, D), rows (B)] -> [context (B, tokens, D)].
struct Final(LayerNorm);

impl Segment for Final {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x, rows] = take(inputs)?;
        let all = self.0.forward(x)?;
        let (taken, shape, of) = (all.index_select(rows, 0)?, all.shape().clone(), rows.clone());
        let back = move |dy: &Tensor| {
            let nothing = Tensor::zeros(&shape, dy.dtype(), dy.device())?;
            Ok(vec![Some(nothing.index_add(&of, dy, 0)?), None])
        };
        Ok(vec![ops::noted(&[&all, rows], taken, back)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_encoders_have_their_parameters() {
        for (config, parameters) in [(TextConfig::sd15_shape(), 123_060_480), (TextConfig::sd21_shape(), 340_387_840)] {
            let encoder = text_encoder(&config, false, DType::F32);
            assert_eq!(encoder.graph.parameters(), parameters);
            assert!(encoder.graph.nodes.iter().all(|n| n.grads.is_none()));
        }
    }
}

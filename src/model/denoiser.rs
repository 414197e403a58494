//! What is trained: the UNet, with the text encoder in front where that trains too.

use anyhow::Result;
use candle_core::DType;

use super::clip::{self, TextSlots};
use super::config::{TextConfig, UnetConfig};
use super::unet::{self, UnetInputs};
use crate::Refusal;
use crate::segment::{GraphBuilder, SegmentGraph, SlotId};

/// The trained graph and where its inputs and its output are.
pub struct Denoiser {
    pub graph: SegmentGraph,
    pub slots: DenoiserSlots,
}

/// The slots of a [`Denoiser`].
#[derive(Clone, Copy, Debug)]
pub struct DenoiserSlots {
    /// Input: noisy latents (B, in_channels, h, w).
    pub sample: SlotId,
    /// Input: [`time_features`](super::time_features) (B, c0).
    pub time_features: SlotId,
    pub conditioning: Conditioning,
    /// Output: (B, out_channels, h, w).
    pub prediction: SlotId,
}

/// How the text comes in.
#[derive(Clone, Copy, Debug)]
pub enum Conditioning {
    /// Input: encoded prompts (B, tokens, cross_attention_dim), from a frozen text encoder.
    Context(SlotId),
    /// The text encoder is part of the graph.
    Prompts(TextSlots),
}

/// The UNet, trainable; with `text` the text encoder in front of it, trainable too. Allocates no weights. `dtype` is
/// what the graph computes in; `mask_padding` as for [`text_encoder`](super::text_encoder).
pub fn denoiser(config: &UnetConfig, text: Option<&TextConfig>, mask_padding: bool, dtype: DType) -> Denoiser {
    let mut b = GraphBuilder::new();
    let (conditioning, context) = match text {
        Some(text) => {
            let slots = clip::append(&mut b, text, mask_padding, dtype, true);
            (Conditioning::Prompts(slots), slots.context)
        }
        None => {
            let context = b.input("context");
            (Conditioning::Context(context), context)
        }
    };
    let (sample, time_features) = (b.input("sample"), b.input("time_features"));
    let prediction = unet::append(&mut b, config, UnetInputs { sample, time_features, context }, true);
    Denoiser { graph: b.finish(), slots: DenoiserSlots { sample, time_features, conditioning, prediction } }
}

/// A [`Refusal`] if the text encoder's states do not fit the UNet.
pub fn check_text_width(unet: &UnetConfig, text: &TextConfig) -> Result<()> {
    if unet.cross_attention_dim == text.hidden_size {
        return Ok(());
    }
    Err(Refusal::error(format!(
        "unet/config.json: cross_attention_dim = {}, but text_encoder/config.json: hidden_size = {}. \
         The two components do not belong together; model.path must be one whole pipeline.",
        unet.cross_attention_dim, text.hidden_size
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(graph: &SegmentGraph) -> usize {
        graph.nodes.iter().map(|n| n.params.layout().entries.len()).sum()
    }

    #[test]
    fn published_unets_have_their_parameters() {
        for (config, parameters) in [(UnetConfig::sd15_shape(), 859_520_964), (UnetConfig::sd21_shape(), 865_910_724)] {
            let d = denoiser(&config, None, false, DType::F32);
            assert_eq!((d.graph.parameters(), tensors(&d.graph)), (parameters, 686));
            let largest = d.graph.nodes.iter().max_by_key(|n| n.params.layout().parameters()).unwrap();
            assert_eq!(largest.name, "unet.mid_block");
            assert!(d.graph.nodes.iter().all(|n| n.grads.is_some()));
        }
    }

    #[test]
    fn a_trained_text_encoder_stands_in_front() {
        let d = denoiser(&UnetConfig::sd15_shape(), Some(&TextConfig::sd15_shape()), true, DType::F32);
        assert_eq!(d.graph.parameters(), 859_520_964 + 123_060_480);
        assert_eq!(d.graph.nodes[0].name, "text_encoder.embeddings");
        let Conditioning::Prompts(text) = d.slots.conditioning else { panic!("no text encoder") };
        assert!(text.key_lengths.is_some());
        let readers = d.graph.nodes.iter().filter(|n| n.inputs.contains(&text.context)).count();
        assert_eq!(readers, 6 + 1 + 9);
    }

    #[test]
    fn components_of_different_models_are_refused() {
        let error = check_text_width(&UnetConfig::sd21_shape(), &TextConfig::sd15_shape()).unwrap_err();
        assert!(error.downcast_ref::<Refusal>().is_some() && error.to_string().contains("1024"));
    }
}

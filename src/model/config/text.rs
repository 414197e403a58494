//! `text_encoder/config.json` of a CLIP text encoder (`CLIPTextModel`).

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::Reader;
use crate::ops::Activation;

/// A validated CLIP text configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct TextConfig {
    pub vocab_size: usize,
    /// The longest prompt, in tokens.
    pub max_positions: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub activation: Activation,
    pub layer_norm_eps: f64,
}

impl TextConfig {
    /// Reads `dir/config.json`. Errors are [`Refusal`](crate::Refusal)s that name every key we do not support.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut r = Reader::open(dir)?;
        r.only("model_type", &[json!("clip_text_model")]);
        r.only("architectures", &[json!(["CLIPTextModel"]), json!(null)]);
        r.only("attention_dropout", &[json!(0), json!(null)]);
        let activation = match r.get("hidden_act", "quick_gelu".to_string()).as_str() {
            "quick_gelu" => Activation::QuickGelu,
            "gelu" => Activation::Gelu,
            _ => {
                r.refuse("hidden_act", "is not supported; supported: quick_gelu, gelu");
                Activation::Gelu
            }
        };
        let config = TextConfig {
            vocab_size: r.count("vocab_size", 49408),
            max_positions: r.count("max_position_embeddings", 77),
            hidden_size: r.count("hidden_size", 512),
            intermediate_size: r.count("intermediate_size", 2048),
            layers: r.layers("num_hidden_layers", 12),
            heads: r.count("num_attention_heads", 8),
            activation,
            layer_norm_eps: r.get("layer_norm_eps", 1e-5),
        };
        if !config.hidden_size.is_multiple_of(config.heads) {
            r.refuse("num_attention_heads", "must divide hidden_size");
        }
        r.finish(config)
    }

    /// Stable Diffusion 1.5 (CLIP ViT-L/14): 123,060,480 parameters.
    pub fn sd15_shape() -> Self {
        TextConfig {
            vocab_size: 49408,
            max_positions: 77,
            hidden_size: 768,
            intermediate_size: 3072,
            layers: 12,
            heads: 12,
            activation: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }

    /// Stable Diffusion 2.1 (OpenCLIP ViT-H without its last layer): 340,387,840 parameters.
    pub fn sd21_shape() -> Self {
        TextConfig {
            hidden_size: 1024,
            intermediate_size: 4096,
            layers: 23,
            heads: 16,
            activation: Activation::Gelu,
            ..Self::sd15_shape()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::tests::folder;

    #[test]
    fn published_files_are_read() {
        let file = json!({"architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "hidden_act": "gelu",
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23,
            "model_type": "clip_text_model", "projection_dim": 512, "torch_dtype": "float16", "vocab_size": 49408});
        assert_eq!(TextConfig::read(folder(file).path()).unwrap(), TextConfig::sd21_shape());
    }

    #[test]
    fn another_encoder_is_refused() {
        let file = json!({"architectures": ["T5EncoderModel"], "model_type": "t5", "hidden_act": "relu"});
        let error = TextConfig::read(folder(file).path()).unwrap_err().to_string();
        assert!(error.contains("T5EncoderModel") && error.contains("hidden_act = \"relu\""), "{error}");
    }
}

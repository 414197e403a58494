//! Components, and the one name we use for each of their tensors whatever spelling a file has.

use std::borrow::Cow;

/// A part of a pipeline whose weights we read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Component {
    Unet,
    TextEncoder,
    Vae,
}

impl Component {
    /// Its folder in a pipeline, and what its tensors' names begin with.
    pub fn name(self) -> &'static str {
        match self {
            Component::Unet => "unet",
            Component::TextEncoder => "text_encoder",
            Component::Vae => "vae",
        }
    }

    /// The component that a canonical name belongs to.
    pub fn of(canonical: &str) -> Option<Self> {
        let (prefix, _) = canonical.split_once('.')?;
        [Component::Unet, Component::TextEncoder, Component::Vae].into_iter().find(|c| c.name() == prefix)
    }

    /// What the weight files' names begin with.
    pub(super) fn stem(self) -> &'static str {
        match self {
            Component::TextEncoder => "model",
            Component::Unet | Component::Vae => "diffusion_pytorch_model",
        }
    }

    /// The class that reads the component in Python.
    pub(super) fn class(self) -> (&'static str, &'static str) {
        match self {
            Component::Unet => ("diffusers", "UNet2DConditionModel"),
            Component::TextEncoder => ("transformers", "CLIPTextModel"),
            Component::Vae => ("diffusers", "AutoencoderKL"),
        }
    }

    /// The canonical name of the tensor that a file calls `name`: the current spelling with the component in front.
    ///
    /// transformers 5 writes CLIP's tensors without `text_model.`; old VAE files call the attention's four layers
    /// query, key, value and proj_attn.
    pub(super) fn canonical(self, name: &str) -> String {
        let spelled: Cow<str> = match self {
            Component::Unet => name.into(),
            Component::TextEncoder if name.starts_with("text_model.") => name.into(),
            Component::TextEncoder => format!("text_model.{name}").into(),
            Component::Vae => new_attention_name(name),
        };
        format!("{}.{spelled}", self.name())
    }

    /// Tensors that a file may have beside those that the graph declares; they are copied, never read.
    pub(super) fn is_extra(self, canonical: &str) -> bool {
        match self {
            Component::Unet => false,
            Component::TextEncoder => canonical.ends_with(".embeddings.position_ids"),
            Component::Vae => canonical.starts_with("vae.decoder.") || canonical.starts_with("vae.post_quant_conv."),
        }
    }

    /// Whether a tensor of shape `found` can stand for one of shape `wanted`. Old VAE files have 1x1 convolutions
    /// where newer ones have linear layers.
    pub(super) fn same_shape(self, canonical: &str, found: &[usize], wanted: &[usize]) -> bool {
        let old_linear = self == Component::Vae && canonical.contains(".attentions.") && wanted.len() == 2;
        found == wanted || (old_linear && found.len() == 4 && found[..2] == *wanted && found[2..] == [1, 1])
    }
}

fn new_attention_name(name: &str) -> Cow<'_, str> {
    if !name.contains(".attentions.") {
        return name.into();
    }
    for (old, new) in [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")] {
        for end in ["weight", "bias"] {
            if let Some(layer) = name.strip_suffix(&format!(".{old}.{end}")) {
                return format!("{layer}.{new}.{end}").into();
            }
        }
    }
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_have_one_name() {
        let text = Component::TextEncoder;
        let canonical = "text_encoder.text_model.final_layer_norm.bias";
        assert_eq!(text.canonical("final_layer_norm.bias"), canonical);
        assert_eq!(text.canonical("text_model.final_layer_norm.bias"), canonical);
        assert!(text.is_extra(&text.canonical("embeddings.position_ids")));
        let vae = Component::Vae;
        let canonical = "vae.encoder.mid_block.attentions.0.to_out.0.weight";
        assert_eq!(vae.canonical("encoder.mid_block.attentions.0.proj_attn.weight"), canonical);
        assert_eq!(vae.canonical("encoder.mid_block.attentions.0.to_out.0.weight"), canonical);
        assert!(vae.same_shape(canonical, &[8, 8, 1, 1], &[8, 8]));
        assert!(!Component::Unet.same_shape("unet.a.attentions.0.proj_in.weight", &[8, 8, 1, 1], &[8, 8]));
        assert_eq!(Component::of("vae.quant_conv.bias"), Some(vae));
        assert_eq!(Component::of("lora.x"), None);
    }
}

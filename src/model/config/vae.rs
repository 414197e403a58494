//! `vae/config.json` (`AutoencoderKL`).

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::{OneOrMany, Reader};

/// A validated VAE configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct VaeConfig {
    pub in_channels: usize,
    pub latent_channels: usize,
    /// Channels of each level, from the largest resolution to the smallest.
    pub channels: Vec<usize>,
    /// ResNet layers of each level of the encoder; the decoder has one more.
    pub layers: usize,
    pub norm_num_groups: usize,
    pub mid_attention: bool,
    pub use_quant_conv: bool,
    pub use_post_quant_conv: bool,
    /// The latents are multiplied with this before the UNet sees them.
    pub scaling_factor: f64,
    /// Subtracted from the latents before; 0 in Stable Diffusion 1.x, 2.x and XL.
    pub shift_factor: f64,
    /// Side of the pictures it was trained on, in pixels, which tiles have too.
    pub sample_size: usize,
    /// It overflows in fp16, so it is to run in fp32.
    pub force_upcast: bool,
}

impl VaeConfig {
    /// Reads `dir/config.json`. Errors are [`Refusal`](crate::Refusal)s that name every key we do not support.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut r = Reader::open(dir)?;
        r.only("_class_name", &[json!("AutoencoderKL")]);
        r.only("act_fn", &[json!("silu"), json!("swish")]);
        let types: Vec<String> = r.get("down_block_types", vec!["DownEncoderBlock2D".to_string()]);
        if types.iter().any(|t| t != "DownEncoderBlock2D") {
            r.refuse("down_block_types", "is not supported; supported: DownEncoderBlock2D");
        }
        let up: Vec<String> = r.get("up_block_types", vec!["UpDecoderBlock2D".to_string()]);
        if up.iter().any(|t| t != "UpDecoderBlock2D") {
            r.refuse("up_block_types", "is not supported; supported: UpDecoderBlock2D");
        }
        if up.len() != types.len() {
            r.refuse("up_block_types", "must have as many entries as down_block_types");
        }
        r.only("out_channels", &[json!(3)]);
        let channels: Vec<usize> = r.get("block_out_channels", vec![64]);
        let groups = r.count("norm_num_groups", 32);
        if channels.is_empty() || channels.len() != types.len() {
            r.refuse("block_out_channels", "must have as many entries as down_block_types");
        }
        if channels.iter().any(|&c| c == 0 || c % groups != 0) {
            r.refuse("block_out_channels", &format!("must be multiples of norm_num_groups, {groups}"));
        }
        let config = VaeConfig {
            in_channels: r.count("in_channels", 3),
            latent_channels: r.count("latent_channels", 4),
            channels,
            layers: r.layers("layers_per_block", 1),
            norm_num_groups: groups,
            mid_attention: r.get("mid_block_add_attention", true),
            use_quant_conv: r.get("use_quant_conv", true),
            use_post_quant_conv: r.get("use_post_quant_conv", true),
            scaling_factor: r.get("scaling_factor", 0.18215),
            shift_factor: r.get("shift_factor", 0.0),
            sample_size: sample_size(&mut r),
            force_upcast: r.get("force_upcast", true),
        };
        if config.scaling_factor == 0.0 || !config.scaling_factor.is_finite() {
            r.refuse("scaling_factor", "must not be 0");
        }
        r.finish(config)
    }

    /// Pixels per latent, along each side.
    pub fn downscale(&self) -> usize {
        1 << (self.channels.len() - 1)
    }

    /// Stable Diffusion 1.x and 2.x: the encoder and `quant_conv` have 34,163,664 parameters.
    pub fn sd_shape() -> Self {
        VaeConfig {
            in_channels: 3,
            latent_channels: 4,
            channels: vec![128, 256, 512, 512],
            layers: 2,
            norm_num_groups: 32,
            mid_attention: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            scaling_factor: 0.18215,
            shift_factor: 0.0,
            sample_size: 512,
            force_upcast: true,
        }
    }
}

/// A number, or a height and a width of which diffusers' tiles take the first.
fn sample_size(r: &mut Reader) -> usize {
    match r.get("sample_size", OneOrMany::One(32)) {
        OneOrMany::One(side) => side,
        OneOrMany::Many(sides) => sides.first().copied().unwrap_or(32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::tests::folder;

    #[test]
    fn the_published_file_is_read() {
        let types = vec!["DownEncoderBlock2D"; 4];
        let file = json!({"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512],
            "down_block_types": types, "up_block_types": vec!["UpDecoderBlock2D"; 4], "layers_per_block": 2,
            "sample_size": 512});
        let config = VaeConfig::read(folder(file).path()).unwrap();
        assert_eq!(config, VaeConfig::sd_shape());
        assert_eq!(config.downscale(), 8);
    }
}

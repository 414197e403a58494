//! `unet/config.json` of Stable Diffusion 1.x and 2.x (`UNet2DConditionModel`).

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::Reader;

/// One resolution of the UNet, on the way down and on the way up.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    pub channels: usize,
    /// ResNet layers on the way down; the way up has one more.
    pub layers: usize,
    /// Attention heads; the head width is `channels / heads`.
    pub heads: usize,
    /// Transformer layers after each ResNet on the way down; None: a block without attention.
    pub down_depth: Option<usize>,
    /// The same on the way up.
    pub up_depth: Option<usize>,
    /// The transformer's first attention reads the text too, instead of the image.
    pub only_cross_attention: bool,
}

/// A validated UNet configuration. `resnet_out_scale_factor` and `upcast_attention` are not in it: the peer ignores
/// both for these block types and its fused attention.
#[derive(Clone, Debug, PartialEq)]
pub struct UnetConfig {
    /// Height and width of the latents the model was made for, if the file says so.
    pub sample_size: Option<(usize, usize)>,
    pub in_channels: usize,
    pub out_channels: usize,
    pub center_input_sample: bool,
    /// The time features begin with the cosines.
    pub flip_sin_to_cos: bool,
    pub freq_shift: f64,
    /// From the largest resolution to the smallest.
    pub levels: Vec<Level>,
    pub mid_depth: usize,
    pub mid_block_scale_factor: f64,
    pub downsample_padding: usize,
    pub norm_num_groups: usize,
    pub norm_eps: f64,
    /// Width of the text context.
    pub cross_attention_dim: usize,
    pub use_linear_projection: bool,
    /// Width of the time embedding.
    pub time_embedding_dim: usize,
    pub conv_in_kernel: usize,
    pub conv_out_kernel: usize,
}

impl UnetConfig {
    /// Reads `dir/config.json`. Errors are [`Refusal`](crate::Refusal)s that name every key we do not support.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut r = Reader::open(dir)?;
        refuse_unsupported(&mut r);
        let (down, up) = block_types(&mut r);
        let n = down.len();
        let mut channels = r.get("block_out_channels", vec![320, 640, 1280, 1280]);
        if channels.len() != n || channels.contains(&0) {
            r.refuse("block_out_channels", &format!("must have {n} entries of at least 1, as down_block_types"));
            channels = vec![1; n];
        }
        let groups = r.count("norm_num_groups", 32);
        if channels.iter().any(|c| c % groups != 0) {
            r.refuse("block_out_channels", &format!("must be multiples of norm_num_groups, {groups}"));
        }
        let default_heads = r.counts("attention_head_dim", 8, n);
        let heads = match r.optional::<Value>("num_attention_heads") {
            Some(_) => r.counts("num_attention_heads", 8, n),
            None => default_heads,
        };
        let attends = |i: usize| down[i] || up[n - 1 - i] || i == n - 1;
        if (0..n).any(|i| attends(i) && channels[i] % heads[i] != 0) {
            r.refuse("attention_head_dim", "the number of heads must divide the block's channels");
        }
        let layers = r.layers_of("layers_per_block", 2, n);
        let depth = r.layers_of("transformer_layers_per_block", 1, n);
        let mut up_depth = depth.clone();
        if r.optional::<Value>("reverse_transformer_layers_per_block").is_some() {
            up_depth = r.layers_of("reverse_transformer_layers_per_block", 1, n);
            up_depth.reverse();
        }
        let only_cross = r.each("only_cross_attention", false, n);
        let context = r.counts("cross_attention_dim", 1280, n);
        if context.iter().any(|&c| c != context[0]) {
            r.refuse("cross_attention_dim", "must be the same for all blocks");
        }
        let levels = (0..n).map(|i| Level {
            channels: channels[i],
            layers: layers[i],
            heads: heads[i],
            down_depth: down[i].then_some(depth[i]),
            up_depth: up[n - 1 - i].then_some(up_depth[i]),
            only_cross_attention: only_cross[i],
        });
        let config = UnetConfig {
            sample_size: sample_size(&mut r),
            in_channels: r.count("in_channels", 4),
            out_channels: r.count("out_channels", 4),
            center_input_sample: r.get("center_input_sample", false),
            flip_sin_to_cos: r.get("flip_sin_to_cos", true),
            freq_shift: r.get("freq_shift", 0.0),
            levels: levels.collect(),
            mid_depth: depth[n - 1],
            mid_block_scale_factor: r.get("mid_block_scale_factor", 1.0),
            downsample_padding: r.get("downsample_padding", 1),
            norm_num_groups: groups,
            norm_eps: r.get("norm_eps", 1e-5),
            cross_attention_dim: context[0],
            use_linear_projection: r.get("use_linear_projection", false),
            time_embedding_dim: r.count("time_embedding_dim", 4 * channels[0]),
            conv_in_kernel: odd(&mut r, "conv_in_kernel"),
            conv_out_kernel: odd(&mut r, "conv_out_kernel"),
        };
        r.finish(config)
    }

    /// Stable Diffusion 1.5: 859,520,964 parameters.
    pub fn sd15_shape() -> Self {
        let level = |channels, attends: bool| Level {
            channels,
            layers: 2,
            heads: 8,
            down_depth: attends.then_some(1),
            up_depth: attends.then_some(1),
            only_cross_attention: false,
        };
        UnetConfig {
            sample_size: Some((64, 64)),
            in_channels: 4,
            out_channels: 4,
            center_input_sample: false,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            levels: vec![level(320, true), level(640, true), level(1280, true), level(1280, false)],
            mid_depth: 1,
            mid_block_scale_factor: 1.0,
            downsample_padding: 1,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            cross_attention_dim: 768,
            use_linear_projection: false,
            time_embedding_dim: 1280,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
        }
    }

    /// Stable Diffusion 2.1, 768 pixels: 865,910,724 parameters.
    pub fn sd21_shape() -> Self {
        let mut config = Self::sd15_shape();
        config.sample_size = Some((96, 96));
        config.cross_attention_dim = 1024;
        config.use_linear_projection = true;
        for (level, heads) in config.levels.iter_mut().zip([5, 10, 20, 20]) {
            level.heads = heads;
        }
        config
    }
}

/// Whether each block has attention, in the order of the two lists.
fn block_types(r: &mut Reader) -> (Vec<bool>, Vec<bool>) {
    let names = |list: [&str; 4]| list.map(str::to_string).to_vec();
    let (attends_down, attends_up) = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D");
    let down: Vec<String> = r.get("down_block_types", names([attends_down, attends_down, attends_down, "DownBlock2D"]));
    let up: Vec<String> = r.get("up_block_types", names(["UpBlock2D", attends_up, attends_up, attends_up]));
    if down.iter().any(|t| t != attends_down && t != "DownBlock2D") {
        r.refuse("down_block_types", &format!("is not supported; supported: {attends_down}, DownBlock2D"));
    }
    if up.iter().any(|t| t != attends_up && t != "UpBlock2D") {
        r.refuse("up_block_types", &format!("is not supported; supported: {attends_up}, UpBlock2D"));
    }
    if down.is_empty() || down.len() != up.len() {
        r.refuse("up_block_types", "must have as many entries as down_block_types, at least one");
    }
    let down: Vec<bool> = down.iter().map(|t| t == attends_down).collect();
    let mut up: Vec<bool> = up.iter().map(|t| t == attends_up).collect();
    up.resize(down.len().max(1), false);
    (if down.is_empty() { vec![false] } else { down }, up)
}

/// Keys that change the network in ways that we do not build.
fn refuse_unsupported(r: &mut Reader) {
    let null = Value::Null;
    r.only("_class_name", &[json!("UNet2DConditionModel")]);
    for key in [
        "class_embed_type",
        "num_class_embeds",
        "projection_class_embeddings_input_dim",
        "addition_embed_type",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "time_cond_proj_dim",
        "time_embedding_act_fn",
        "timestep_post_act",
        "cross_attention_norm",
    ] {
        r.only(key, std::slice::from_ref(&null));
    }
    r.only("mid_block_type", &[json!("UNetMidBlock2DCrossAttn")]);
    r.only("mid_block_only_cross_attention", &[null.clone(), json!(false)]);
    r.only("dual_cross_attention", &[null.clone(), json!(false)]);
    r.only("class_embeddings_concat", &[null.clone(), json!(false)]);
    r.only("resnet_skip_time_act", &[null.clone(), json!(false)]);
    r.only("resnet_time_scale_shift", &[json!("default")]);
    r.only("time_embedding_type", &[json!("positional")]);
    r.only("attention_type", &[json!("default")]);
    // SiLU's two names.
    r.only("act_fn", &[json!("silu"), json!("swish")]);
    r.only("dropout", &[json!(0)]);
    r.only("downsample_padding", &[null.clone(), json!(0), json!(1)]);
}

/// Of a side: of pictures of 16384 pixels, the most that are made.
const MOST_LATENTS: usize = 2048;

fn sample_size(r: &mut Reader) -> Option<(usize, usize)> {
    use super::OneOrMany::{Many, One};
    let (height, width) = match r.optional("sample_size")? {
        One(side) => (side, side),
        Many(sides) if sides.len() == 2 => (sides[0], sides[1]),
        Many(_) => {
            r.refuse("sample_size", "must be a number or a height and a width");
            return None;
        }
    };
    if [height, width].iter().any(|side| !(1..=MOST_LATENTS).contains(side)) {
        r.refuse("sample_size", &format!("must be 1 to {MOST_LATENTS}"));
        return None;
    }
    Some((height, width))
}

fn odd(r: &mut Reader, key: &str) -> usize {
    let kernel = r.count(key, 3);
    if kernel.is_multiple_of(2) {
        r.refuse(key, "must be odd");
    }
    kernel
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Refusal;
    use crate::model::config::tests::folder;

    fn read(config: Value) -> Result<UnetConfig> {
        UnetConfig::read(folder(config).path())
    }

    #[test]
    fn the_minimal_file_of_sd15_takes_the_class_defaults() {
        let file = json!({"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768});
        assert_eq!(read(file).unwrap(), UnetConfig::sd15_shape());
        let file = json!({"sample_size": 96, "cross_attention_dim": 1024, "use_linear_projection": true,
            "attention_head_dim": [5, 10, 20, 20], "upcast_attention": true, "dual_cross_attention": false,
            "num_class_embeds": null});
        assert_eq!(read(file).unwrap(), UnetConfig::sd21_shape());
    }

    #[test]
    fn lists_are_per_block_and_the_way_up_is_reversed() {
        let config = read(json!({"block_out_channels": [32, 64], "layers_per_block": [1, 3],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "transformer_layers_per_block": [2, 3], "reverse_transformer_layers_per_block": [4, 5],
            "num_attention_heads": [2, 4]}))
        .unwrap();
        let [top, bottom] = &config.levels[..] else { panic!() };
        assert_eq!((top.layers, top.heads, top.down_depth, top.up_depth), (1, 2, None, Some(5)));
        assert_eq!((bottom.layers, bottom.heads, bottom.down_depth, bottom.up_depth), (3, 4, Some(3), None));
        assert_eq!((config.mid_depth, config.time_embedding_dim), (3, 128));
    }

    #[test]
    fn what_is_not_built_is_refused_key_by_key() {
        let error = read(json!({"addition_embed_type": "text_time", "act_fn": "gelu", "block_out_channels": [33, 64],
            "resnet_time_scale_shift": "scale_shift", "mid_block_type": null, "norm_num_groups": 16,
            "down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D"],
            "attention_head_dim": [8, 7]}));
        let refusal = error.unwrap_err().downcast::<Refusal>().unwrap();
        for key in [
            "addition_embed_type",
            "act_fn",
            "resnet_time_scale_shift",
            "mid_block_type",
            "down_block_types",
            "up_block_types",
            "attention_head_dim",
            "block_out_channels",
        ] {
            assert!(refusal.problems.iter().any(|p| p.contains(&format!("{key} = "))), "{key}: {refusal}");
        }
    }
}

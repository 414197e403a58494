//! A small Stable Diffusion pipeline in diffusers' layout: configurations, a tokenizer for the world's words, and fresh
//! weights as PyTorch's own layers begin with.

use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::DType;
use dblaunch::diffusion::{Draws, Purpose, Row};
use dblaunch::model::{TextConfig, UnetConfig, VaeConfig, autoencoder, denoiser};
use dblaunch::segment::SegmentGraph;
use half::f16;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::world;

/// Tokens of a prompt, with begin and end.
const TOKENS: usize = 16;
/// Width of the text's states.
const WIDTH: usize = 64;

pub fn write(folder: &Path) -> Result<()> {
    let vocabulary = write_tokenizer(&folder.join("tokenizer"))?;
    put(&folder.join("model_index.json"), &model_index())?;
    put(&folder.join("scheduler/scheduler_config.json"), &scheduler())?;
    put(&folder.join("unet/config.json"), &unet())?;
    put(&folder.join("vae/config.json"), &vae())?;
    put(&folder.join("text_encoder/config.json"), &text_encoder(vocabulary))?;
    let unet = UnetConfig::read(&folder.join("unet"))?;
    let text = TextConfig::read(&folder.join("text_encoder"))?;
    let denoiser = denoiser(&unet, Some(&text), false, DType::F32);
    let vae = autoencoder(&VaeConfig::read(&folder.join("vae"))?, 0.0);
    save(&folder.join("unet/diffusion_pytorch_model.safetensors"), &fresh_tensors(&denoiser.graph, "unet."))?;
    save(&folder.join("text_encoder/model.safetensors"), &fresh_tensors(&denoiser.graph, "text_encoder."))?;
    save(&folder.join("vae/diffusion_pytorch_model.safetensors"), &fresh_tensors(&vae.graph, "vae."))?;
    println!(
        "a pipeline of {} parameters in {}",
        denoiser.graph.parameters() + vae.graph.parameters(),
        folder.display()
    );
    Ok(())
}

fn model_index() -> Value {
    json!({
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [null, null],
        "image_encoder": [null, null],
        "requires_safety_checker": false,
        "safety_checker": [null, null],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })
}

/// Betas that leave no signal in the last step, so that grounds can be any colour.
fn scheduler() -> Value {
    json!({
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.30.0",
        "algorithm_type": "dpmsolver++",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "solver_order": 2,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    })
}

fn unet() -> Value {
    json!({
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.30.0",
        "act_fn": "silu",
        "attention_head_dim": 4,
        "block_out_channels": [64, 112],
        "cross_attention_dim": WIDTH,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "in_channels": 4,
        "layers_per_block": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_num_groups": 16,
        "out_channels": 4,
        "sample_size": 16,
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": true,
    })
}

fn vae() -> Value {
    json!({
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0",
        "act_fn": "silu",
        "block_out_channels": [16, 32, 32],
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
        "force_upcast": false,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "mid_block_add_attention": false,
        "norm_num_groups": 8,
        "out_channels": 3,
        "sample_size": 64,
        "scaling_factor": 1.0,
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
        "use_post_quant_conv": false,
        "use_quant_conv": false,
    })
}

fn text_encoder(vocabulary: usize) -> Value {
    json!({
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
        "hidden_act": "quick_gelu",
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": TOKENS,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "projection_dim": WIDTH,
        "torch_dtype": "float32",
        "vocab_size": vocabulary,
    })
}

/// CLIP's byte-level tokens, and merges that make one token of each of the world's words. Other words, such as a new
/// subject's, are a few tokens that no caption had. Returns the number of tokens.
fn write_tokenizer(folder: &Path) -> Result<usize> {
    let bytes: Vec<String> = byte_characters().into_iter().map(String::from).collect();
    let mut vocabulary: Vec<String> = bytes.iter().cloned().chain(bytes.iter().map(|b| format!("{b}</w>"))).collect();
    let mut merges: Vec<(String, String)> = Vec::new();
    for word in world::words() {
        let mut parts: Vec<String> = word.chars().map(String::from).collect();
        if let Some(last) = parts.last_mut() {
            last.push_str("</w>");
        }
        // What the merges so far make of it, lowest first; then new ones, from the left.
        loop {
            let known = |pair: &[String]| merges.iter().position(|(a, b)| *a == pair[0] && *b == pair[1]);
            let best = parts.windows(2).enumerate().filter_map(|(i, pair)| Some((known(pair)?, i))).min();
            let at = match best {
                Some((_, at)) => at,
                None if parts.len() > 1 => {
                    merges.push((parts[0].clone(), parts[1].clone()));
                    vocabulary.push(parts[..2].concat());
                    0
                }
                None => break,
            };
            let joined = parts[at..at + 2].concat();
            parts.splice(at..at + 2, [joined]);
        }
    }
    vocabulary.extend(["<|startoftext|>", "<|endoftext|>"].map(String::from));
    let ids: serde_json::Map<String, Value> =
        vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    put(&folder.join("vocab.json"), &ids.into())?;
    let lines: String = merges.iter().map(|(a, b)| format!("{a} {b}\n")).collect();
    fs::write(folder.join("merges.txt"), format!("#version: 0.2\n{lines}"))?;
    let special = json!({
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
    });
    put(&folder.join("special_tokens_map.json"), &special)?;
    let mut config = special;
    config["tokenizer_class"] = "CLIPTokenizer".into();
    config["model_max_length"] = TOKENS.into();
    put(&folder.join("tokenizer_config.json"), &config)?;
    Ok(vocabulary.len())
}

/// GPT-2's printable character for each byte, in its order: those that are printable by themselves, then the others.
fn byte_characters() -> Vec<char> {
    let own: Vec<u32> = (33..=126).chain(161..=172).chain(174..=255).collect();
    let others = (0..256 - own.len() as u32).map(|i| 256 + i);
    own.iter().copied().chain(others).filter_map(char::from_u32).collect()
}

/// A tensor with its name in the file.
pub struct Named {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// Fresh tensors of a component: uniform as PyTorch's layers for weights and biases, ones and zeros for norms, normal
/// for embeddings.
fn fresh_tensors(graph: &SegmentGraph, prefix: &str) -> Vec<Named> {
    let entries = graph.nodes.iter().flat_map(|node| &node.params.layout().entries);
    let entries: Vec<_> = entries.filter(|entry| entry.name.starts_with(prefix)).collect();
    let fan_in = |name: &str| {
        let weight = name.strip_suffix("bias").map(|stem| format!("{stem}weight"));
        let shape = entries.iter().find(|e| e.name == weight.as_deref().unwrap_or(name)).map(|e| &e.shape[..]);
        shape.and_then(|shape| shape.get(1..)).map_or(0, |rest| rest.iter().product::<usize>())
    };
    let tensor = |(item, entry): (usize, &&dblaunch::device::Entry)| {
        let values = fresh(&entry.name, fan_in(&entry.name), item as u64, 0..entry.len);
        Named { name: entry.name[prefix.len()..].to_string(), shape: entry.shape.clone(), values }
    };
    entries.iter().enumerate().map(tensor).collect()
}

fn fresh(name: &str, fan_in: usize, item: u64, range: Range<usize>) -> Vec<f32> {
    if fan_in == 0 {
        return vec![if name.ends_with("weight") { 1.0 } else { 0.0 }; range.len()];
    }
    let draws = Draws::new(u64::from(name.bytes().fold(7u32, |sum, b| sum.wrapping_mul(31) + u32::from(b))));
    if name.contains("embedding.weight") {
        let mut values = vec![0f32; range.len()];
        draws.normal(Purpose::Noise, Row::Instance, item, &mut values);
        values.iter_mut().for_each(|x| *x *= 0.1);
        return values;
    }
    let bound = 1.0 / (fan_in as f32).sqrt();
    let mut stream = draws.stream(Purpose::Noise, Row::Instance, item);
    range.map(|_| bound * (2.0 * stream.below(1 << 24) as f32 / (1 << 24) as f32 - 1.0)).collect()
}

fn put(path: &Path, value: &Value) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
    }
    fs::write(path, serde_json::to_string_pretty(value)? + "\n").with_context(|| path.display().to_string())
}

/// Writes tensors in half precision: the repository holds them.
pub fn save(path: &Path, tensors: &[Named]) -> Result<()> {
    let bytes = |t: &Named| t.values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect::<Vec<u8>>();
    let data: Vec<Vec<u8>> = tensors.iter().map(bytes).collect();
    let view = |(t, data)| -> Result<(String, TensorView)> {
        let t: &Named = t;
        let data: &Vec<u8> = data;
        Ok((t.name.clone(), TensorView::new(Dtype::F16, t.shape.clone(), data)?))
    };
    let views = tensors.iter().zip(&data).map(view).collect::<Result<Vec<_>>>()?;
    let metadata = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize_to_file(views, Some(metadata), path).with_context(|| path.display().to_string())
}

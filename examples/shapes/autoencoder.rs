//! Trains a pipeline's autoencoder from what is in its folder, on drawings made as they are needed.

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use dblaunch::comm::Solo;
use dblaunch::device::threads::set_threads;
use dblaunch::diffusion::{Draws, Purpose, Row};
use dblaunch::model::{Autoencoder, VaeConfig, autoencoder};
use dblaunch::optim::AdamW;
use dblaunch::pipeline::PipelineWeights;
use dblaunch::segment::{Keep, Tape};
use dblaunch::train::network::{Build, Network};
use dblaunch::train::step::{Group, Inputs, Then, clip_factor};
use dblaunch::zero::{Ranks, Stage};
use serde_json::Value;

use super::draw::SIDE;
use super::pipeline::{Named, save};
use super::world;

const BATCH: usize = 8;
const RATE: f64 = 2e-3;
/// The posterior's deviation.
const NOISE: f32 = 0.1;
/// How much half the latents' squares weigh, against pixels from -1 to 1.
const PULL: f64 = 0.01;

pub fn train(pipeline: &Path, steps: u64) -> Result<()> {
    set_threads(std::thread::available_parallelism().map_or(1, NonZeroUsize::get));
    let folder = pipeline.join("vae");
    let config = VaeConfig::read(&folder)?;
    let latents = BATCH * config.latent_channels * (SIDE as usize / config.downscale()).pow(2);
    let vae = autoencoder(&config, PULL / latents as f64);
    let weights = PipelineWeights::open(pipeline, "")?;
    let ranks = Ranks { comm: Arc::new(Solo), stage: Stage::Replicated, reduce_dtype: DType::F32 };
    let Autoencoder { graph, pixels, noise, moments, reconstruction } = vae;
    let build = Build::on_device(&ranks, DType::F32, Keep::Graph, &graph)?;
    let mut network = Network::load(graph, build, &weights)?;
    let begun = Instant::now();
    let mut recent = 0.0;
    for step in 0..steps {
        let picture = batch(step * BATCH as u64)?;
        let slots = vec![(pixels, picture.clone()), (noise, deviations(&config, step)?)];
        let mut error = 0.0;
        network.forward_backward(Some(Inputs { slots, prediction: reconstruction }), Then::Norm, |made| {
            let (value, gradient) = absolute_error(made, &picture)?;
            error = value;
            Ok(gradient)
        })?;
        let norm = network.reduce()?;
        let done = step as f64 / steps as f64;
        // A short way up, then half a cosine down.
        let rate = RATE * (step as f64 / 100.0).min(1.0) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        let adamw = AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.0 };
        network.update(step + 1, clip_factor(norm, 1.0), |_| Group { adamw, rate })?;
        recent += error;
        if (step + 1) % 100 == 0 {
            println!("step {} mean error {:.4} after {:.0} s", step + 1, recent / 100.0, begun.elapsed().as_secs_f64());
            recent = 0.0;
        }
    }
    let scale = 1.0 / deviation(&network, pixels, moments, &config)?;
    write(&folder, &network, scale)?;
    println!("trained for {steps} steps of {BATCH} pictures in {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// (B, 3, H, W) from -1 to 1: the drawings from number `first` on.
fn batch(first: u64) -> Result<Tensor> {
    let side = SIDE as usize;
    let mut values = Vec::with_capacity(BATCH * 3 * side * side);
    for item in 0..BATCH as u64 {
        let image = world::any(first + item);
        values.extend((0..3).flat_map(|c| image.pixels().map(move |p| f32::from(p.0[c]) / 127.5 - 1.0)));
    }
    Ok(Tensor::from_vec(values, (BATCH, 3, side, side), &Device::Cpu)?)
}

fn deviations(config: &VaeConfig, step: u64) -> Result<Tensor> {
    let side = SIDE as usize / config.downscale();
    let mut values = vec![0f32; BATCH * config.latent_channels * side * side];
    Draws::new(4).normal(Purpose::Noise, Row::Instance, step, &mut values);
    values.iter_mut().for_each(|x| *x *= NOISE);
    Ok(Tensor::from_vec(values, (BATCH, config.latent_channels, side, side), &Device::Cpu)?)
}

/// The mean of sqrt(d^2 + e^2) - e over all numbers, which is the mean absolute error but for small ones, with its
/// gradient.
fn absolute_error(made: &Tensor, wanted: &Tensor) -> Result<(f64, Tensor)> {
    const SMALL: f32 = 0.02;
    let shape = made.shape().clone();
    let (made, wanted) = (made.flatten_all()?.to_vec1::<f32>()?, wanted.flatten_all()?.to_vec1::<f32>()?);
    let count = made.len() as f32;
    let mut error = 0.0;
    let gradient = made.iter().zip(&wanted).map(|(m, w)| {
        let d = m - w;
        let root = d.hypot(SMALL);
        error += f64::from(root - SMALL);
        d / root / count
    });
    let gradient = gradient.collect::<Vec<f32>>();
    Ok((error / f64::from(count), Tensor::from_vec(gradient, shape, &Device::Cpu)?))
}

/// The deviation of the latents of some drawings, which the UNet is to see at 1.
fn deviation(network: &Network, pixels: usize, moments: usize, config: &VaeConfig) -> Result<f64> {
    let (mut sum, mut squares, mut count) = (0.0, 0.0, 0.0);
    for number in 0..16 {
        let mut tape = Tape::new(&network.graph, Keep::Nothing);
        tape.set(pixels, batch((1 << 30) + number * BATCH as u64)?);
        for (i, node) in network.graph.nodes.iter().enumerate() {
            let _fetched = network.store.fetch(i)?;
            tape.run(i)?;
            if node.outputs.contains(&moments) {
                break;
            }
        }
        let means = tape.take(moments)?.narrow(1, 0, config.latent_channels)?.flatten_all()?.to_vec1::<f32>()?;
        for x in means.into_iter().map(f64::from) {
            (sum, squares, count) = (sum + x, squares + x * x, count + 1.0);
        }
    }
    let mean: f64 = sum / count;
    Ok((squares / count - mean * mean).sqrt())
}

/// Writes the weights, with log-variances that say what the deviation was, and the scaling factor.
fn write(folder: &Path, network: &Network, scale: f64) -> Result<()> {
    let mut tensors = Vec::new();
    for i in 0..network.store.len() {
        let whole = network.store.whole_master(i)?;
        for entry in &network.store.layout(i).entries {
            let mut values = whole.as_slice::<f32>()[entry.offset..entry.offset + entry.len].to_vec();
            let half = entry.len / 2;
            match entry.name.as_str() {
                "vae.encoder.conv_out.weight" => values[half..].fill(0.0),
                "vae.encoder.conv_out.bias" => values[half..].fill(2.0 * NOISE.ln()),
                _ => {}
            }
            tensors.push(Named { name: entry.name["vae.".len()..].to_string(), shape: entry.shape.clone(), values });
        }
    }
    save(&folder.join("diffusion_pytorch_model.safetensors"), &tensors)?;
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    // Three digits are plenty for a scale.
    config["scaling_factor"] = ((scale * 1000.0).round() / 1000.0).into();
    println!("latents are scaled by {scale:.3}");
    Ok(fs::write(path, serde_json::to_string_pretty(&config)? + "\n")?)
}

//! Forward passes of the small pipelines against the peer's recorded ones.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::device::Buffer;
use crate::segment::{Keep, SegmentGraph, SlotId, Tape};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

/// Fetches every parameter of `component` from its files.
fn fill(graph: &SegmentGraph, weights: &ComponentWeights) {
    weights.check(&wanted(graph, weights.component())).unwrap();
    for node in graph.nodes.iter() {
        let layout = node.params.layout();
        let mut buffer = Buffer::unbudgeted(DType::F32, layout.padded_len(1)).unwrap();
        for entry in &layout.entries {
            let range = entry.offset..entry.offset + entry.len;
            weights.read(&entry.name, 0..entry.len, &mut buffer.as_mut_slice::<f32>()[range]).unwrap();
        }
        node.params.fill(Arc::new(buffer));
    }
}

fn run(graph: &SegmentGraph, inputs: &[(SlotId, Tensor)], output: SlotId) -> Tensor {
    let mut tape = Tape::new(graph, Keep::Nothing);
    inputs.iter().for_each(|(slot, value)| tape.set(*slot, value.clone()));
    (0..graph.nodes.len()).for_each(|i| tape.run(i).unwrap());
    tape.take(output).unwrap()
}

/// The largest difference over the largest element.
fn difference(got: &Tensor, want: &Tensor) -> f32 {
    assert_eq!(got.dims(), want.dims());
    let largest = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    largest(&(got - want).unwrap()) / largest(want)
}

/// Tolerated: the peer's own fp32 differs by as much from its float64.
const TOLERANCE: f32 = 1e-5;

fn case(case: &str, model: &str) {
    let load = |file: &str| -> HashMap<String, Tensor> {
        candle_core::safetensors::load(data(&format!("parity/{case}/{file}.safetensors")), &Device::Cpu).unwrap()
    };
    let (probe, draws) = (load("probe"), load("draws"));
    let model = data(&format!("models/{model}"));
    let open = |c: Component| ComponentWeights::open(&model.join(c.name()), "", c).unwrap();
    let ids = |name: &str| probe[name].to_dtype(DType::U32).unwrap();

    let unet = UnetConfig::read(&model.join("unet")).unwrap();
    let d = denoiser(&unet, None, false, DType::F32);
    fill(&d.graph, &open(Component::Unet));
    let timesteps = probe["timesteps"].to_vec1::<i64>().unwrap();
    let features = time_features(timesteps.iter().map(|&t| t as f32), &unet);
    let features = Tensor::from_vec(features, (timesteps.len(), unet.levels[0].channels), &Device::Cpu).unwrap();
    let Conditioning::Context(context) = d.slots.conditioning else { panic!("the text encoder is frozen") };
    let inputs = [
        (d.slots.sample, probe["unet_in"].clone()),
        (d.slots.time_features, features),
        (context, probe["context"].clone()),
    ];
    let unet = difference(&run(&d.graph, &inputs, d.slots.prediction), &probe["unet_out"]);

    let text = TextConfig::read(&model.join("text_encoder")).unwrap();
    let t = text_encoder(&text, false, DType::F32);
    fill(&t.graph, &open(Component::TextEncoder));
    let inputs = [(t.slots.token_ids, ids("token_ids")), (t.slots.rows, ids("rows"))];
    let context = difference(&run(&t.graph, &inputs, t.slots.context), &probe["context"]);

    let v = vae_encoder(&VaeConfig::read(&model.join("vae")).unwrap());
    fill(&v.graph, &open(Component::Vae));
    let pixels = probe.get("pixel_values").unwrap_or_else(|| &draws["000000.pixel_values"]);
    let moments = run(&v.graph, &[(v.pixels, pixels.clone())], v.moments);
    let latents = difference(&moments.narrow(1, 0, 4).unwrap(), &probe["latent_mean"]);

    println!("{case}: UNet {unet:.1e}, text encoder {context:.1e}, VAE {latents:.1e}");
    assert!(unet < TOLERANCE && context < TOLERANCE && latents < TOLERANCE);
}

#[test]
fn sd15() {
    case("sd15_full", "sd15");
}

#[test]
fn sd21_with_linear_projections_and_head_lists() {
    case("sd21v_full", "sd21v");
}

#[test]
fn sd15_with_latents_of_odd_size_and_two_prompts() {
    case("sd15_rough", "sd15");
}

/// Whole networks by kernels: what the peer recorded, and the processor's gradients of every parameter.
#[cfg(feature = "emulate")]
mod by_kernels {
    use super::*;
    use crate::kernels::emulated::{Emulated, Order};
    use crate::ops::compute_on;

    fn device(capability: u32, order: Order) -> std::sync::Arc<Emulated> {
        std::sync::Arc::new(Emulated::new(capability, order).unwrap())
    }

    #[test]
    fn networks_give_what_the_peer_recorded() {
        compute_on(device(80, Order::Ascending), || case("sd15_full", "sd15"));
        compute_on(device(75, Order::Descending), || case("sd21v_full", "sd21v"));
    }

    /// Every segment's summed gradients after one pass, text encoder in front, seeded with numbers that differ.
    fn gradients(dtype: DType) -> Vec<(String, Vec<f32>)> {
        let model = data("models/sd15");
        let unet = UnetConfig::read(&model.join("unet")).unwrap();
        let text = TextConfig::read(&model.join("text_encoder")).unwrap();
        let d = denoiser(&unet, Some(&text), false, dtype);
        let open = |c: Component| ComponentWeights::open(&model.join(c.name()), "", c).unwrap();
        let weights = [open(Component::Unet), open(Component::TextEncoder)];
        for node in d.graph.nodes.iter() {
            let layout = node.params.layout();
            let mut buffer = Buffer::unbudgeted(DType::F32, layout.len).unwrap();
            for entry in &layout.entries {
                let from = weights.iter().find(|w| Some(w.component()) == Component::of(&entry.name)).unwrap();
                let values = &mut buffer.as_mut_slice::<f32>()[entry.offset..entry.offset + entry.len];
                from.read(&entry.name, 0..entry.len, values).unwrap();
            }
            let mut rounded = Buffer::unbudgeted(dtype, layout.len).unwrap();
            match dtype {
                DType::F16 => rounded
                    .as_mut_slice::<half::f16>()
                    .iter_mut()
                    .zip(buffer.as_slice::<f32>())
                    .for_each(|(to, from)| *to = half::f16::from_f32(*from)),
                _ => rounded.as_mut_slice::<f32>().copy_from_slice(buffer.as_slice()),
            }
            node.params.fill(Arc::new(rounded));
            if let Some(grads) = &node.grads {
                grads.fill(Buffer::unbudgeted(DType::F32, layout.len).unwrap());
            }
        }
        let numbers = |seed: u64, shape: &[usize]| {
            let values = crate::ops::testing::numbers(seed, shape.iter().product());
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        };
        let Conditioning::Prompts(slots) = &d.slots.conditioning else { panic!("the text encoder trains") };
        let ids: Vec<u32> = (0..2 * text.max_positions as u32).map(|i| i * 7 % text.vocab_size as u32).collect();
        let mut tape = Tape::new(&d.graph, Keep::Graph);
        tape.set(slots.token_ids, Tensor::from_vec(ids, (2, text.max_positions), &Device::Cpu).unwrap());
        tape.set(slots.rows, Tensor::new(&[1u32, 0], &Device::Cpu).unwrap());
        tape.set(d.slots.sample, numbers(1, &[2, unet.in_channels, 8, 8]));
        tape.set(d.slots.time_features, numbers(2, &[2, unet.levels[0].channels]));
        (0..d.graph.nodes.len()).for_each(|i| tape.run(i).unwrap());
        let prediction = tape.take(d.slots.prediction).unwrap();
        tape.seed(d.slots.prediction, numbers(3, prediction.dims()));
        drop(prediction);
        (0..d.graph.nodes.len()).rev().for_each(|i| tape.pull(i).unwrap());
        let summed = d.graph.nodes.iter().filter_map(|node| {
            let buffer = node.grads.as_ref()?.empty()?;
            Some((node.name.clone(), buffer.as_slice::<f32>().to_vec()))
        });
        summed.collect()
    }

    #[test]
    fn gradients_of_every_parameter_are_the_processors() {
        for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::F16, 1e-2)] {
            let want = gradients(dtype);
            let got = compute_on(device(80, Order::Shuffled(3)), || gradients(dtype));
            assert_eq!(got.len(), want.len());
            for ((name, got), (_, want)) in got.iter().zip(&want) {
                let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
                let off = got.iter().zip(want).fold(0f32, |most, (g, w)| most.max((g - w).abs()));
                assert!(off <= tolerance * largest, "{dtype:?} {name}: {off} of {largest}");
            }
        }
    }
}

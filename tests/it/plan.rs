//! What is planned beside what happens: activations counted by the allocator in passes over real networks.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use dblaunch::config::{self, RunPlan};
use dblaunch::data::{Crop, Dataset, DatasetOptions, Footprint, Row};
use dblaunch::device::threads;
use dblaunch::device::{Arena, Buffer, Queue, activations, count_activations_from_here};
use dblaunch::kernels::Dry;
use dblaunch::model::{self, Conditioning, Denoiser, TextConfig, UnetConfig, VaeConfig};
use dblaunch::pipeline::Configs;
use dblaunch::plan::{Facts, Surroundings, Wiring};
use dblaunch::segment::{Aside, Keep, SlotId, Tape};
use image::imageops::FilterType;
use image::{DynamicImage, ImageFormat, RgbImage};
use serde_json::Value;

use crate::harness::{Home, PLAIN};

/// The counter is the whole process's: the test `name` of this file runs in a process of its own.
fn alone(name: &str, test: impl FnOnce()) {
    const ALONE: &str = "DBLAUNCH_TEST_ALONE";
    if std::env::var(ALONE).is_ok_and(|alone| alone == name) {
        // What threads keep depends on which of them happened to get work.
        threads::set_threads(1);
        return test();
    }
    let program = std::env::current_exe().unwrap();
    let arguments = ["--exact", &format!("plan::{name}"), "--nocapture", "--test-threads=1"];
    let ended = Command::new(program).args(arguments).env(ALONE, name).status().unwrap();
    assert!(ended.success(), "see above");
}

fn plan(sets: &[&str]) -> RunPlan {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/sd15-dreambooth.toml");
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    config::load(&path, &sets, 1).unwrap()
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The most that activations take in a pass whose arithmetic is done.
fn measured(plan: &RunPlan, configs: &Configs, keep: &[Keep]) -> usize {
    let dtype = dblaunch::plan::compute_dtype(plan);
    let text = plan.model.train_text_encoder.then_some(&configs.text);
    let Denoiser { graph, slots } = model::denoiser(&configs.unet, text, false, dtype);
    let rows = plan.train.batch_size * if plan.prior.is_some() { 2 } else { 1 };
    let side = plan.data.resolution / configs.vae.downscale();
    for node in &graph.nodes {
        let mut buffer = Buffer::unbudgeted(DType::F32, node.params.layout().len).unwrap();
        buffer.as_mut_slice::<f32>().iter_mut().enumerate().for_each(|(i, x)| *x = (i % 7) as f32 * 0.01 - 0.03);
        let values = Tensor::from_slice(buffer.as_slice::<f32>(), buffer.len(), &Device::Cpu).unwrap();
        let mut half = Buffer::unbudgeted(dtype, buffer.len()).unwrap();
        match dtype {
            DType::BF16 => {
                half.as_mut_slice().copy_from_slice(&values.to_dtype(dtype).unwrap().to_vec1::<half::bf16>().unwrap())
            }
            DType::F16 => {
                half.as_mut_slice().copy_from_slice(&values.to_dtype(dtype).unwrap().to_vec1::<half::f16>().unwrap())
            }
            _ => half.as_mut_slice().copy_from_slice(buffer.as_slice::<f32>()),
        }
        node.params.fill(Arc::new(half));
        if let Some(grads) = &node.grads {
            grads.fill(Buffer::unbudgeted(DType::F32, node.params.layout().len).unwrap());
        }
    }
    let aside = Aside { arena: Arena::new("host", None), queue: Arc::new(Queue::new("activations").unwrap()) };
    let pass = || {
        let ones = |shape: &[usize], dtype| Tensor::ones(shape, dtype, &Device::Cpu).unwrap();
        let mut given: Vec<(SlotId, Tensor)> = vec![
            (slots.sample, ones(&[rows, configs.unet.in_channels, side, side], dtype)),
            (slots.time_features, ones(&[rows, configs.unet.levels[0].channels], dtype)),
        ];
        match &slots.conditioning {
            Conditioning::Context(slot) => {
                given.push((*slot, ones(&[rows, configs.text.max_positions, configs.unet.cross_attention_dim], dtype)))
            }
            Conditioning::Prompts(text) => {
                let unique = 1 + usize::from(plan.prior.is_some());
                given.push((text.token_ids, ones(&[unique, configs.text.max_positions], DType::U32)));
                given.push((text.rows, Tensor::zeros(&[rows], DType::U32, &Device::Cpu).unwrap()));
            }
        }
        let mut tape = Tape::with_choice(&graph, keep.to_vec(), Some(aside.clone()));
        given.into_iter().for_each(|(slot, value)| tape.set(slot, value));
        (0..graph.nodes.len()).for_each(|i| tape.run(i).unwrap());
        let prediction = tape.take(slots.prediction).unwrap();
        tape.seed(slots.prediction, prediction.ones_like().unwrap());
        drop(prediction);
        (0..graph.nodes.len()).rev().for_each(|i| tape.pull(i).unwrap());
    };
    // What threads keep as scratch is there after the first pass, and is another matter.
    pass();
    count_activations_from_here();
    pass();
    activations().expect("the tests' allocator counts").peak
}

/// The same on a GPU of this kind, which is emulated.
fn measured_on(gpu: Option<Dry>, plan: &RunPlan, configs: &Configs, keep: &[Keep]) -> usize {
    #[cfg(feature = "emulate")]
    if let Some(gpu) = gpu {
        use dblaunch::kernels::emulated::{Emulated, Order};
        let emulated = Emulated::new(gpu.capability, Order::Ascending).unwrap();
        return dblaunch::ops::compute_on(Arc::new(emulated), || measured(plan, configs, keep));
    }
    assert!(gpu.is_none(), "no GPU is emulated in this build");
    measured(plan, configs, keep)
}

fn predicted(plan: &RunPlan, configs: &Configs, gpu: Option<Dry>, keep: impl Fn(usize) -> Keep) -> (usize, Vec<Keep>) {
    let around = Surroundings {
        tokens: configs.text.max_positions,
        items: usize::MAX,
        latents_kept: 0,
        pictures_bytes: 0,
        decoding: 0,
    };
    let facts = Facts::of(plan, configs, around, gpu).unwrap();
    let keep: Vec<Keep> = (0..facts.segments.len()).map(keep).collect();
    let profile = Wiring::of(&facts).profile(&keep);
    (profile.peak(), keep)
}

fn compare(what: &str, plan: &RunPlan, configs: &Configs, keep: impl Fn(usize) -> Keep) {
    compare_on(None, what, plan, configs, keep);
}

fn compare_on(gpu: Option<Dry>, what: &str, plan: &RunPlan, configs: &Configs, keep: impl Fn(usize) -> Keep) {
    let started = std::time::Instant::now();
    let (predicted, keep) = predicted(plan, configs, gpu, keep);
    let planned = started.elapsed();
    let measured = measured_on(gpu, plan, configs, &keep);
    println!(
        "{what}: predicted {predicted} measured {measured}: {:+.2} % (planned in {planned:.2?})",
        100.0 * (predicted as f64 / measured as f64 - 1.0)
    );
    assert!((predicted as f64 / measured as f64 - 1.0).abs() < 0.03, "{what}: {predicted} for {measured}");
}

const SMALL: &[&str] = &["data.resolution=64", "train.batch_size=2"];

#[test]
fn small_networks_take_what_was_planned() {
    alone("small_networks_take_what_was_planned", small_networks);
}

fn small_networks() {
    for name in ["tests/data/models/sd15", "tests/data/models/sd21v", "demo/model"] {
        let configs = Configs::read(&folder(name)).unwrap();
        for text in ["false", "true"] {
            for precision in ["no", "bf16", "fp16"] {
                let sets = [&format!("model.train_text_encoder={text}"), &format!("train.mixed_precision={precision}")];
                let sets: Vec<&str> = SMALL.iter().copied().chain(sets.map(String::as_str)).collect();
                let plan = plan(&sets);
                compare(&format!("{name} {sets:?} inputs"), &plan, &configs, |_| Keep::Inputs);
                compare(&format!("{name} {sets:?} graph"), &plan, &configs, |_| Keep::Graph);
                compare(&format!("{name} {sets:?} mixed"), &plan, &configs, |i| {
                    if i % 3 == 0 { Keep::Graph } else { Keep::Inputs }
                });
                compare(&format!("{name} {sets:?} host"), &plan, &configs, |_| Keep::Host);
                compare(&format!("{name} {sets:?} host and graph"), &plan, &configs, |i| {
                    if i % 3 == 0 { Keep::Graph } else { Keep::Host }
                });
            }
        }
    }
}

/// Where ops launch kernels they take other memory, which a dry run on a GPU of the kind knows; and it counts the same
/// arithmetic.
#[cfg(feature = "emulate")]
#[test]
fn small_networks_take_what_was_planned_on_gpus() {
    alone("small_networks_take_what_was_planned_on_gpus", || {
        let configs = Configs::read(&folder("tests/data/models/sd15")).unwrap();
        for (text, precision, capability) in [("true", "no", 80), ("false", "fp16", 75)] {
            let sets = [format!("model.train_text_encoder={text}"), format!("train.mixed_precision={precision}")];
            let sets: Vec<&str> = SMALL.iter().copied().chain(sets.iter().map(String::as_str)).collect();
            let plan = plan(&sets);
            let gpu = Some(Dry { capability, multiprocessors: 4 });
            let mixed = |i| if i % 3 == 0 { Keep::Graph } else { Keep::Inputs };
            compare_on(gpu, &format!("{sets:?}"), &plan, &configs, mixed);
            let around =
                Surroundings { tokens: 77, items: usize::MAX, latents_kept: 0, pictures_bytes: 0, decoding: 0 };
            let flops = |gpu| Facts::of(&plan, &configs, around, gpu).unwrap().flops();
            for (here, there) in flops(None).into_iter().zip(flops(gpu)) {
                assert!((there / here - 1.0).abs() < 0.02, "{sets:?}: {there:e} for {here:e}");
            }
        }
    });
}

/// Stable Diffusion 1.5's and 2.1's shapes; takes some minutes and memory.
#[test]
fn published_shapes_take_what_was_planned() {
    if std::env::var_os("DBLAUNCH_LARGE_TESTS").is_none() {
        eprintln!("skipped: set DBLAUNCH_LARGE_TESTS to run it");
        return;
    }
    alone("published_shapes_take_what_was_planned", published_shapes);
}

fn published_shapes() {
    let sd15 =
        || Configs { unet: UnetConfig::sd15_shape(), text: TextConfig::sd15_shape(), vae: VaeConfig::sd_shape() };
    let sd21 =
        || Configs { unet: UnetConfig::sd21_shape(), text: TextConfig::sd21_shape(), vae: VaeConfig::sd_shape() };
    type Case = (&'static str, fn() -> Configs, &'static [&'static str]);
    let cases: [Case; 4] = [
        ("sd15 256", sd15, &["data.resolution=256"]),
        ("sd15 128 text", sd15, &["data.resolution=128", "model.train_text_encoder=true"]),
        ("sd21 192", sd21, &["data.resolution=192"]),
        ("sd15 256 bf16", sd15, &["data.resolution=256", "train.mixed_precision=bf16"]),
    ];
    for (what, configs, sets) in cases {
        let (plan, configs) = (plan(sets), configs());
        compare(&format!("{what} inputs"), &plan, &configs, |_| Keep::Inputs);
        compare(&format!("{what} mixed"), &plan, &configs, |i| if i % 4 == 0 { Keep::Graph } else { Keep::Inputs });
        compare(&format!("{what} graph"), &plan, &configs, |_| Keep::Graph);
    }
}

/// What each rank's tiers held at most, beside what was planned: all of a tier to 5 %.
/// Noise, whose files are about as large as its pixels, in every way that `image` writes.
fn write_noise(folder: &Path) {
    let mut state = 1u32;
    let picture = RgbImage::from_fn(1300, 900, |_, _| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        image::Rgb(state.to_be_bytes()[..3].try_into().unwrap())
    });
    let picture = DynamicImage::ImageRgb8(picture);
    let kinds = [
        ("rgb", picture.clone()),
        ("rgba", picture.to_rgba8().into()),
        ("grey", picture.to_luma8().into()),
        ("grey_alpha", picture.to_luma_alpha8().into()),
        ("deep", picture.to_rgb16().into()),
        ("deep_grey", picture.to_luma16().into()),
        ("small", picture.crop_imm(0, 0, 200, 180)),
        ("narrow", picture.crop_imm(0, 0, 70, 900)),
        ("wide", picture.resize_exact(9000, 130, FilterType::Nearest).to_rgb16().into()),
    ];
    for (name, picture) in &kinds {
        picture.save(folder.join(format!("{name}.png"))).unwrap();
        if ["rgb", "rgba"].contains(name) {
            picture.save(folder.join(format!("{name}.webp"))).unwrap();
        }
        if ["rgb", "grey"].contains(name) {
            picture.save_with_format(folder.join(format!("{name}.jpg")), ImageFormat::Jpeg).unwrap();
        }
    }
}

#[test]
fn pictures_take_what_was_planned() {
    alone("pictures_take_what_was_planned", pictures);
}

fn pictures() {
    let noise = tempfile::tempdir().unwrap();
    write_noise(noise.path());
    let (mut seen, mut bad) = (0, Vec::new());
    for folder in [noise.path(), &folder("tests/data/images/large")] {
        for center_crop in [false, true] {
            let options = DatasetOptions {
                instance_dir: folder.to_path_buf(),
                class: None,
                resolution: 64,
                center_crop,
                decode_bytes: None,
                ..plan(&[]).dataset_options(false)
            };
            let dataset = Dataset::open(&options).unwrap();
            for item in 0..dataset.len() as u64 {
                let path = dataset.path(Row::Instance, item);
                let planned = Footprint::read(path, &options, Row::Instance).unwrap().decoding;
                count_activations_from_here();
                drop(dataset.prepare(Row::Instance, item, Crop::Drawn { top: 0, left: 0, flip: false }).unwrap());
                let held = activations().unwrap().peak;
                let off = planned as f64 / held as f64 - 1.0;
                println!("{}: {held} held, {planned} planned ({:+.1} %)", path.display(), 100.0 * off);
                if !(0.0..0.05).contains(&off) {
                    bad.push(path.to_path_buf());
                }
                seen += 1;
            }
        }
    }
    assert!(bad.is_empty(), "{bad:?}");
    assert_eq!(seen, 2 * (13 + 3));
}

/// Decoding is the fullest moment of these runs.
#[test]
fn large_pictures_are_in_the_plan_and_in_the_budget() {
    let large = format!("data.instance_dir={}", folder("tests/data/images/large").display());
    run_holds_what_was_planned(1, &[&large]);
    let home = Home::new();
    let told = home.job(PLAIN).sets(&[&large, "memory.vram=12MiB", "train.batch_size=1"]).run().refused().join(" ");
    assert!(told.contains("fullest in the decoding of a picture"), "{told}");
    assert!(told.contains("smaller pictures: decoding the largest takes"), "{told}");
}

fn run_holds_what_was_planned(ranks: usize, sets: &[&str]) {
    let home = Home::new();
    // More than an epoch: latents and pictures are kept from their first use on.
    let always = ["train.max_steps=8", "train.batch_size=1"];
    home.job(PLAIN).ranks(ranks).sets(&always).sets(sets).run().done();
    let told: Value = serde_json::from_slice(&std::fs::read(home.out().join("memory.json")).unwrap()).unwrap();
    let of_ranks = told["ranks"].as_array().unwrap();
    assert_eq!(of_ranks.len(), ranks);
    for compared in of_ranks.iter().flat_map(|rank| rank.as_array().unwrap()) {
        let number = |key: &str| compared[key].as_f64().unwrap();
        let off = number("predicted") / number("measured") - 1.0;
        println!("{ranks} ranks, {sets:?}: {compared} {:+.1} %", 100.0 * off);
        let whole = !compared["what"].as_str().unwrap().contains('.');
        assert!(!whole || off.abs() < 0.05, "{ranks} ranks, {sets:?}: {compared}");
    }
}

#[test]
fn runs_hold_what_was_planned() {
    run_holds_what_was_planned(1, &[]);
    run_holds_what_was_planned(1, &["zero.offload_optimizer=host", "zero.offload_params=host", "train.recompute=true"]);
    run_holds_what_was_planned(
        2,
        &["zero.offload_gradients=host", "optimizer.kind=adamw8bit", "train.recompute=false"],
    );
    run_holds_what_was_planned(
        3,
        &["zero.stage=3", "optimizer.master_dtype=bf16", "train.mixed_precision=bf16", "zero.prefetch=false"],
    );
}

/// What travels is charged from its beginning to where somebody waits for it, however long it takes.
#[test]
fn what_is_held_does_not_depend_on_how_fast_things_travel() {
    let drive = tempfile::tempdir().unwrap();
    let folder = format!("zero.nvme_dir={}", drive.path().display());
    run_holds_what_was_planned(
        1,
        &[&folder, "zero.offload_optimizer=nvme", "train.max_grad_norm=0", "optimizer.kind=adamw8bit"],
    );
    run_holds_what_was_planned(2, &["zero.stage=2", "train.recompute=true", "zero.reduce_dtype=bf16"]);
    let everywhere = ["zero.offload_optimizer=nvme", "zero.offload_params=nvme", "zero.offload_gradients=none"];
    run_holds_what_was_planned(3, &[&[folder.as_str(), "zero.stage=1"][..], &everywhere].concat());
}

#[test]
fn a_run_that_does_not_fit_is_refused_and_one_that_does_keeps_its_budget() {
    let home = Home::new();
    let problems = home.job(PLAIN).sets(&["memory.vram=512KiB", "train.batch_size=1"]).run().refused();
    let told = problems.join(" ");
    assert!(told.contains("no way to run this fits") && told.contains("memory.vram of"), "{told}");
    let problems = home.job(PLAIN).sets(&["memory.ram=1KiB"]).run().refused();
    assert!(problems.join(" ").contains("memory.ram = \"1KiB\": no way to run this fits"), "{problems:?}");
    assert!(!home.out().exists(), "a refused run has written something");
    home.job(PLAIN).sets(&["memory.vram=3MiB", "train.batch_size=1", "train.max_steps=2"]).run().done();
    let told: Value = serde_json::from_slice(&std::fs::read(home.out().join("memory.json")).unwrap()).unwrap();
    let device = told["ranks"][0].as_array().unwrap().iter().find(|c| c["what"] == "device").unwrap();
    assert!(device["measured"].as_u64().unwrap() <= 3 << 20, "{device}");
}

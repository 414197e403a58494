//! Half precision: fp16 with its scaled loss, whose skipped steps are the same for everyone and no step at all; and both
//! halves beside fp32.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::harness::{EVERYTHING, Home, Job, PLAIN, apart, column, rows, tensors, weights};

const FP16: &str = "train.mixed_precision=fp16";

/// Loss scale of each attempt at a step, and whether it was skipped.
fn attempts(rows: &[Value]) -> Vec<(f64, bool)> {
    let steps = rows.iter().filter(|row| row.get("loss_scale").is_some());
    steps.map(|row| (row["loss_scale"].as_f64().unwrap(), row["skipped"].as_bool().unwrap())).collect()
}

/// The rows of the steps that were made.
fn made(rows: &[Value]) -> Vec<Value> {
    rows.iter().filter(|row| row["skipped"] == false).cloned().collect()
}

#[test]
fn a_scale_that_is_too_large_is_halved_until_steps_are_made_alike_on_all_ranks() {
    let home = Home::new();
    let run = |ranks: usize, stage: usize, name: &str| {
        let sets = [
            format!("output.dir=HOME/{name}"),
            format!("zero.stage={stage}"),
            format!("train.batch_size={}", 2 / ranks),
            FP16.to_string(),
            "train.initial_scale_power=30".to_string(),
        ];
        let ran = home.job(PLAIN).ranks(ranks).sets(&sets.each_ref().map(String::as_str)).run().done();
        (ran, rows(&home.path(name)))
    };
    let (ran, one) = run(1, 0, "one");
    let tried = attempts(&one);
    let skips = tried.iter().filter(|(_, skipped)| *skipped).count();
    assert!(skips >= 4, "{tried:?}");
    ran.says(&format!("fp16 overflowed: {skips}; the loss scale is "));
    assert!(tried[..4].iter().all(|(_, skipped)| *skipped) && tried[0].0 == 30f64.exp2() && tried[1].0 == 29f64.exp2());
    // A skipped step is none: four were made, numbered from 1, with the rates of the schedule's first four.
    assert_eq!(column(&made(&one), "step"), [1.0, 2.0, 3.0, 4.0]);
    let first = one.iter().find(|row| row.get("skipped").is_some()).unwrap();
    assert!(first["step"] == 1 && first["grad_norm"].is_null() && first["skipped"] == true, "{first}");
    let micro_steps = column(&one, "micro_step");
    assert_eq!(micro_steps, (0..tried.len()).map(|i| i as f64).collect::<Vec<_>>(), "its pictures are used up");
    for (stage, name) in [(0, "two0"), (2, "two2"), (3, "two3")] {
        let (_, two) = run(2, stage, name);
        assert_eq!(attempts(&two), tried, "stage {stage}");
        let [got, want] = [&two, &one].map(|rows| column(&made(rows), "loss"));
        assert!(apart(&got, &want) < 1e-3, "stage {stage}: {got:?} for {want:?}");
    }
    assert_eq!(rows(&home.path("two3")), rows(&home.path("two2")));
}

#[test]
fn a_run_that_skips_and_grows_resumes_to_the_bit() {
    let home = Home::new();
    // It grows every second step until something overflows again.
    let sets =
        [FP16, "train.initial_scale_power=28", "train.loss_scale_window=2", "checkpoint.every=2", "zero.stage=2"];
    let job = || home.job(EVERYTHING).ranks(2).sets(&sets);
    job().run().done();
    let (whole, trained) = (rows(&home.out()), weights(&home.out()));
    let tried = attempts(&whole);
    assert!(
        tried.iter().any(|(_, skipped)| *skipped) && tried.windows(2).any(|pair| pair[1].0 > pair[0].0),
        "{tried:?}"
    );
    for step in [2, 4] {
        let manifest = fs::read_to_string(home.out().join(format!("checkpoint-{step}/manifest.json"))).unwrap();
        assert!(manifest.contains("\"loss_scale\"") && manifest.contains("\"good_steps\""), "{manifest}");
    }
    job().set("checkpoint.resume=checkpoint-4").run().done();
    assert_eq!(rows(&home.out()), whole);
    assert!(weights(&home.out()) == trained, "the weights differ");
    job().set("checkpoint.resume=checkpoint-2").run().done();
    assert_eq!(rows(&home.out()), whole);
    assert!(weights(&home.out()) == trained, "the weights differ");
}

/// Scales, skips and weights do not depend on where things rest.
#[test]
fn every_tier_skips_alike() {
    let home = Home::new();
    let run = |name: &str, tiers: &[&str]| {
        let out = format!("output.dir=HOME/{name}");
        let sets = [&*out, FP16, "train.initial_scale_power=26", "train.loss_scale_window=2", "zero.stage=2"];
        home.job(PLAIN).ranks(2).sets(&sets).sets(tiers).run().done();
        let unet = home.path(name).join("unet/diffusion_pytorch_model.safetensors");
        (rows(&home.path(name)), fs::read(unet).unwrap())
    };
    let device = run("device", &[]);
    assert!(attempts(&device.0).iter().any(|(_, skipped)| *skipped));
    fs::create_dir(home.path("drive")).unwrap();
    let host = ["zero.offload_params=host", "zero.offload_optimizer=host", "zero.offload_gradients=host"];
    let drive = ["zero.offload_params=nvme", "zero.offload_optimizer=nvme", "zero.nvme_dir=HOME/drive"];
    for (name, tiers) in [("host", host), ("drive", drive)] {
        let (rows, weights) = run(name, &tiers);
        assert_eq!(rows, device.0, "{name}");
        assert!(weights == device.1, "{name}: the weights differ");
    }
}

#[test]
fn at_the_minimum_the_run_ends_and_says_where() {
    let home = Home::new();
    let job = |more: &[&str]| home.job(PLAIN).ranks(2).sets(&[FP16, "output.overwrite=true"]).sets(more).run();
    let backward = ["train.initial_scale_power=40", "train.min_loss_scale=274877906944", "zero.stage=3"];
    let ran = job(&backward).failed(&["step 1: ", "on the way backward", "unet.", "gradients are not finite", "bf16"]);
    ran.says("2 attempts at this step were all skipped".replace("2", "3").as_str());
    assert!(!ran.stderr.contains("panicked"));
    // Weights that are far too large after the first step: it overflows before any scale matters.
    let forward = ["optimizer.learning_rate=1e5", "train.max_grad_norm=0", "train.min_loss_scale=16384"];
    job(&forward).failed(&["step 2: ", "already on the way forward", "unet.", "output is not finite", "learning_rate"]);
    let fixed = ["train.loss_scale=1e12", "train.batch_size=1"];
    job(&fixed).failed(&["a loss scale of 1000000000000", "last 17 attempts", "on the way backward"]);
}

/// What is reported is without the scale, whatever it is.
#[test]
fn norms_and_saved_gradients_are_unscaled() {
    let home = Home::new();
    let recorded = crate::harness::data("parity/sd15_full");
    let config = fs::read_to_string(recorded.join("train.toml")).unwrap();
    let config = config.replace("\"tests/data/", "\"DATA/");
    let run = |name: &str, sets: &[&str]| {
        let out = format!("output.dir=HOME/{name}");
        let saved = format!("replay.save_gradients=HOME/{name}/gradients.safetensors");
        let job: Job = home.job(&config).sets(&[&out, &saved, "train.max_steps=1"]).sets(sets);
        job.run().done();
        let norm = column(&made(&rows(&home.path(name))), "grad_norm")[0];
        (norm, tensors(&home.path(name).join("gradients.safetensors")))
    };
    let (norm, exact) = run("fp32", &[]);
    for (name, scale) in [("one", "train.loss_scale=1"), ("large", "train.loss_scale=4096")] {
        let (got, gradients) = run(name, &[FP16, scale]);
        assert!((got - norm).abs() < 0.01 * norm, "{scale}: {got} for {norm}");
        let (mut off, mut all) = (0f64, 0f64);
        for (tensor, values) in &exact {
            for (got, want) in gradients[tensor].iter().zip(values) {
                off += f64::from(got - want).powi(2);
                all += f64::from(*want).powi(2);
            }
        }
        assert!(off.sqrt() < 0.02 * all.sqrt(), "{scale}: {} of {}", off.sqrt(), all.sqrt());
    }
}

/// The demo without pictures of validation.
fn demo() -> String {
    let root = env!("CARGO_MANIFEST_DIR");
    let config = fs::read_to_string(Path::new(root).join("configs/demo.toml")).unwrap();
    let (before, rest) = config.split_once("[validation]").unwrap();
    let (_, after) = rest.split_once("[output]").unwrap();
    let config = format!("{before}[output]{after}");
    config.replace("\"demo/", &format!("\"{root}/demo/")).replace("\"runs/demo", "\"HOME/out")
}

#[test]
fn both_halves_follow_fp32_over_50_steps_of_the_demo() {
    let home = Home::new();
    let losses = |precision: &str, more: &[&str]| {
        let sets = [
            format!("output.dir=HOME/{precision}"),
            format!("train.mixed_precision={precision}"),
            "train.max_steps=50".to_string(),
            "prior.num_class_images=8".to_string(),
            "checkpoint.every=1000".to_string(),
        ];
        home.job(&demo()).ranks(2).sets(&sets.each_ref().map(String::as_str)).sets(more).run().done();
        column(&made(&rows(&home.path(precision))), "loss")
    };
    let exact = losses("no", &[]);
    assert_eq!(exact.len(), 50);
    let bf16 = apart(&losses("bf16", &[]), &exact);
    // A scale that skips nothing, so that every step has the same pictures.
    let fp16 = apart(&losses("fp16", &["train.initial_scale_power=12"]), &exact);
    assert!(bf16 < 0.02 && fp16 < 0.005, "bf16 is {bf16} off, fp16 {fp16}");
}

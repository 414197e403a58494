//! The real program with its states anywhere: the rows and weights of the run that keeps everything on the device, to the
//! bit; and checkpoints that go on under another kind of state, other precision and other numbers of ranks.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::harness::{EVERYTHING, Home, Job, PLAIN, apart, column, rows, tensors, weights};

const NVME: [&str; 3] = ["zero.offload_params=nvme", "zero.offload_optimizer=nvme", "zero.nvme_dir=HOME/drive"];

/// Parameters, optimizer state and gradients, as the recipes have them.
const PLACES: [[&str; 3]; 4] =
    [["none", "host", "host"], ["host", "host", "host"], ["host", "nvme", "none"], ["nvme", "nvme", "host"]];

fn home() -> Home {
    let home = Home::new();
    fs::create_dir(home.path("drive")).unwrap();
    home
}

fn placed<'a>(job: Job<'a>, [parameters, optimizer, gradients]: [&str; 3]) -> Job<'a> {
    let set = |key: &str, place: &str| format!("zero.offload_{key}={place}");
    job.set(&set("params", parameters)).set(&set("optimizer", optimizer)).set(&set("gradients", gradients))
}

/// Every recipe's placement gives the run without any.
fn same_anywhere(ranks: usize, sets: &[&str]) {
    let home = home();
    let job = || home.job(EVERYTHING).ranks(ranks).sets(sets).set("train.max_steps=3");
    placed(job(), ["none"; 3]).run().done();
    let (whole, trained) = (rows(&home.out()), weights(&home.out()));
    for places in PLACES {
        let again = job().sets(&["zero.nvme_dir=HOME/drive", "output.overwrite=true"]);
        let ran = placed(again, places).run().done();
        assert_eq!(rows(&home.out()), whole, "{ranks} ranks, {sets:?}, {places:?}");
        assert!(weights(&home.out()) == trained, "{ranks} ranks, {sets:?}, {places:?}: the weights differ");
        assert_eq!(ran.stderr.contains("rated life"), places.contains(&"nvme"), "{}", ran.stderr);
        assert_eq!(fs::read_dir(home.path("drive")).unwrap().count(), 0);
    }
}

#[test]
fn one_rank_trains_the_same_wherever_its_states_rest() {
    same_anywhere(1, &["zero.stage=0"]);
    same_anywhere(1, &["zero.stage=2", "train.mixed_precision=bf16", "train.recompute=true"]);
}

#[test]
fn two_ranks_train_the_same_wherever_their_states_rest() {
    same_anywhere(2, &["zero.stage=2"]);
    same_anywhere(2, &["zero.stage=3", "optimizer.kind=adamw8bit", "train.max_grad_norm=0"]);
}

#[test]
fn small_formats_train_the_same_wherever_they_rest() {
    let small = ["optimizer.kind=adamw8bit", "optimizer.master_dtype=bf16", "zero.grad_accum_dtype=bf16"];
    same_anywhere(2, &[&small[..], &["zero.stage=2"]].concat());
    same_anywhere(1, &[&small[..], &["train.mixed_precision=bf16"]].concat());
}

/// Offloaded, with 8-bit state and bf16 masters: stopped and resumed, the run is the run that was not.
#[test]
fn small_formats_resume_to_the_bit() {
    for (ranks, stage, master) in [(1, 0, "bf16"), (2, 3, "bf16"), (2, 1, "fp32")] {
        let home = home();
        let sets = [
            format!("zero.stage={stage}"),
            format!("optimizer.master_dtype={master}"),
            "train.max_steps=4".to_string(),
        ];
        let sets = [&NVME[..], &["optimizer.kind=adamw8bit", "checkpoint.every=2"], &sets.each_ref().map(|s| &**s)];
        let job = || home.job(EVERYTHING).ranks(ranks).sets(&sets.concat());
        job().run().done();
        let (whole, trained) = (rows(&home.out()), weights(&home.out()));
        job().set("checkpoint.resume=checkpoint-2").run().done().says("after step 2");
        assert_eq!(rows(&home.out()), whole, "{ranks} ranks, stage {stage}, {master}");
        assert!(weights(&home.out()) == trained, "{ranks} ranks, stage {stage}, {master}: the weights differ");
    }
}

/// The rows of the steps after `step`.
fn after(rows: &[Value], step: u64) -> Vec<Value> {
    rows.iter().filter(|row| row["step"].as_u64() > Some(step)).cloned().collect()
}

/// State in 8 bits and bf16 masters, written by two ranks, read by one to four in any stage, with the same items a step.
#[test]
fn small_formats_go_on_with_other_ranks_and_stages() {
    let home = home();
    let job = |ranks: usize, batch: usize| {
        let small = ["optimizer.kind=adamw8bit", "optimizer.master_dtype=bf16", "train.gradient_accumulation_steps=1"];
        home.job(EVERYTHING).ranks(ranks).set(&format!("train.batch_size={batch}")).sets(&small)
    };
    job(2, 6).sets(&NVME).sets(&["zero.stage=3", "checkpoint.every=3"]).run().done();
    let want = after(&rows(&home.out()), 3);
    for (number, (ranks, batch, stage)) in [(1, 12, 0), (3, 4, 2), (4, 3, 3), (2, 6, 1)].iter().enumerate() {
        let sets = [
            format!("output.dir=HOME/again-{number}"),
            format!("zero.stage={stage}"),
            "checkpoint.resume=HOME/out/checkpoint-3".to_string(),
        ];
        job(*ranks, *batch).sets(&sets.each_ref().map(String::as_str)).run().done();
        let got = rows(&home.path(&format!("again-{number}")));
        for key in ["micro_step", "step", "lr"] {
            assert_eq!(column(&got, key), column(&want, key));
        }
        // Sums in another order now and then round a code, or a bf16 weight, the other way.
        for key in ["loss", "grad_norm"] {
            let apart = apart(&column(&got, key), &column(&want, key));
            assert!(apart < 2e-3, "{ranks} ranks, stage {stage}: {key} is {apart} apart");
        }
    }
}

/// A checkpoint of one kind of state, gone on from under the other: converted, and said.
#[test]
fn state_is_converted_between_32_and_8_bits() {
    for (from, to, words) in [
        ("adamw", "adamw8bit", "they were kept in 32 bits, and are now in 8 bits"),
        ("adamw8bit", "adamw", "they were kept in 8 bits, and are now in 32 bits"),
    ] {
        for ranks in [1, 2] {
            let home = home();
            let job = |kind: &str| {
                home.job(PLAIN)
                    .ranks(ranks)
                    .sets(&NVME)
                    .sets(&[&format!("optimizer.kind={kind}"), "checkpoint.every=3"])
            };
            let long = "train.max_steps=6";
            let ran = job(from).set(long).run().done();
            assert!(!ran.stderr.contains("converted"), "{}", ran.stderr);
            let whole = rows(&home.out());
            let ran = job(to).sets(&[long, "checkpoint.resume=checkpoint-3"]).run().done();
            ran.says("going on from");
            ran.says(words);
            let mixed = rows(&home.out());
            // The weights come as they were: so the first step's loss and gradients are the same to the bit.
            let step_4 =
                |rows: &[Value]| after(rows, 3).into_iter().find(|row| row.get("grad_norm").is_some()).unwrap();
            assert_eq!(step_4(&mixed), step_4(&whole));
            // And the moments nearly: a run that begins with none is further away.
            let unet = |out: &Path| tensors(&out.join("unet/diffusion_pytorch_model.safetensors"));
            let converted = unet(&home.out());
            job(from).sets(&[long, "output.dir=HOME/kept"]).run().done();
            let kept = unet(&home.path("kept"));
            let step = 1e-4;
            let (mut worst, mut sum, mut count) = (0f32, 0f64, 0usize);
            for (name, values) in &kept {
                for (a, b) in values.iter().zip(&converted[name]) {
                    worst = worst.max((a - b).abs());
                    sum += f64::from((a - b).abs());
                    count += 1;
                }
            }
            // Three steps of one learning rate each.
            assert!(worst < 6.0 * step, "{from} to {to}: {worst}");
            assert!(sum / (count as f64) < 0.1 * f64::from(step), "{from} to {to}: {}", sum / count as f64);
        }
    }
}

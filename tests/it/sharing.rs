//! The real models shared over ranks in every way: replaying one record, losses and gradients follow those of one rank;
//! what ought to be equal to the bit is.

use std::collections::HashMap;

use serde_json::Value;

use crate::harness::{EVERYTHING, Home, apart, column, rows, tensors, weights};

/// What a run leaves that is compared.
struct Outcome {
    rows: Vec<Value>,
    gradients: HashMap<String, Vec<f32>>,
    weights: [Vec<u8>; 2],
}

/// One way of sharing.
#[derive(Clone, Copy, Debug)]
struct Way {
    ranks: usize,
    stage: usize,
    accumulation: usize,
    recompute: bool,
}

/// A recorded run of tests/data/parity, in some way.
fn replay(case: &str, steps: usize, way: Way, more: &[&str]) -> Outcome {
    let home = Home::new();
    let config = std::fs::read_to_string(crate::harness::data(&format!("parity/{case}/train.toml"))).unwrap();
    let config = config.replace("\"tests/data/", "\"DATA/");
    let gradients = "replay.save_gradients=HOME/gradients.safetensors";
    let sets = [
        "output.dir=HOME/out".to_string(),
        format!("train.max_steps={steps}"),
        format!("zero.stage={}", way.stage),
        format!("train.gradient_accumulation_steps={}", way.accumulation),
        format!("train.recompute={}", way.recompute),
    ];
    let job = home.job(&config).ranks(way.ranks).set(gradients).sets(&sets.each_ref().map(String::as_str));
    job.words(more).run().done();
    Outcome {
        rows: rows(&home.out()),
        gradients: tensors(&home.path("gradients.safetensors")),
        weights: weights(&home.out()),
    }
}

/// Squared distance and squared length, in f64.
fn squares(got: &[f32], want: &[f32]) -> (f64, f64) {
    assert_eq!(got.len(), want.len());
    let distance = got.iter().zip(want).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    (distance, want.iter().map(|b| f64::from(*b).powi(2)).sum())
}

#[track_caller]
fn follows(got: &Outcome, want: &Outcome, way: Way) {
    for key in ["loss", "grad_norm", "lr"] {
        let (got, want) = (column(&got.rows, key), column(&want.rows, key));
        let apart = got.iter().zip(&want).map(|(a, b)| (a - b).abs() / b.abs().max(1e-12)).fold(0.0, f64::max);
        assert!(got.len() == want.len() && apart < 1e-5, "{way:?}: {key} {apart:e}");
    }
    let each: Vec<(f64, f64, &str)> = want
        .gradients
        .iter()
        .map(|(name, tensor)| {
            let (distance, length) = squares(&got.gradients[name], tensor);
            (distance, length, name.as_str())
        })
        .collect();
    let length: f64 = each.iter().map(|(_, length, _)| length).sum();
    let distance: f64 = each.iter().map(|(distance, ..)| distance).sum();
    assert!((distance / length).sqrt() < 1e-5, "{way:?}: gradients {:e}", (distance / length).sqrt());
    // Tensors whose gradient is nothing but rounding (a key's bias, which the softmax takes away) have no direction.
    for (distance, own, name) in each.iter().filter(|(_, own, _)| *own > 1e-10 * length) {
        assert!((distance / own).sqrt() < 1e-4, "{way:?}: {name} {:e}", (distance / own).sqrt());
    }
}

fn same_bits(a: &Outcome, b: &Outcome, what: &str) {
    assert_eq!(a.rows, b.rows, "{what}");
    assert!(a.gradients == b.gradients, "{what}: gradients");
    assert!(a.weights == b.weights, "{what}: weights");
}

/// World sizes 1 to 4 in all stages against one rank. Whether graphs are kept or run again takes turns, so that each
/// stage and each world size has both; it must not show in a single bit.
fn shared_in_every_way(case: &str, steps: usize, accumulation: usize) {
    let way = |ranks, stage, recompute| Way { ranks, stage, accumulation, recompute };
    let alone = replay(case, steps, way(1, 0, false), &[]);
    same_bits(&replay(case, steps, way(1, 0, true), &[]), &alone, "one rank, with and without recomputing");
    for ranks in 1..=4 {
        let first = ranks % 2 == 0;
        let [none, optimizer, gradients, parameters] =
            [(0, first), (1, !first), (2, first), (3, !first)].map(|(stage, recompute)| {
                (way(ranks, stage, recompute), replay(case, steps, way(ranks, stage, recompute), &[]))
            });
        for (way, got) in [&none, &optimizer, &gradients, &parameters] {
            follows(got, &alone, *way);
        }
        same_bits(&gradients.1, &parameters.1, &format!("{ranks} ranks, stages 2 and 3"));
    }
}

#[test]
fn sd15_with_prior_and_text_encoder() {
    shared_in_every_way("sd15_prior_te", 3, 1);
}

#[test]
fn sd15_with_prior_and_text_encoder_over_three_micro_batches() {
    shared_in_every_way("sd15_prior_te", 2, 3);
}

#[test]
fn sd21_with_text_encoder() {
    shared_in_every_way("sd21v_full", 3, 1);
}

#[test]
fn sd21_with_text_encoder_over_three_micro_batches() {
    shared_in_every_way("sd21v_full", 1, 3);
}

#[test]
fn every_number_of_threads_gives_the_same_bits() {
    for (case, ranks, stage) in [("sd15_prior_te", 1, 0), ("sd21v_full", 2, 3)] {
        let way = Way { ranks, stage, accumulation: 1, recompute: true };
        let [one, two, three] = [1, 2, 3].map(|threads| {
            let total = (threads * ranks).to_string();
            replay(case, 2, way, &["--threads", &total])
        });
        same_bits(&two, &one, "two threads");
        same_bits(&three, &one, "three threads");
    }
}

/// Reducing in half precision is a choice that is heard.
#[test]
fn gradients_may_travel_in_half_precision() {
    let way = Way { ranks: 2, stage: 2, accumulation: 1, recompute: false };
    let exact = replay("sd21v_full", 2, way, &[]);
    for (dtype, bound) in [("bf16", 2e-2), ("fp16", 2e-3)] {
        let rounded = replay("sd21v_full", 2, way, &["--set", &format!("zero.reduce_dtype={dtype}")]);
        let norms = apart(&column(&rounded.rows, "grad_norm"), &column(&exact.rows, "grad_norm"));
        assert!(norms < bound && rounded.gradients != exact.gradients, "{dtype}: {norms:e}");
    }
}

/// The same items and the same draws for every world size with the same number of items a step; where an epoch ends
/// with two items, some of four ranks have none.
#[test]
fn draws_depend_on_items_alone() {
    let run = |ranks: usize, batch: usize, accumulation: usize| {
        let home = Home::new();
        let sets = [
            format!("train.batch_size={batch}"),
            format!("train.gradient_accumulation_steps={accumulation}"),
            "train.max_steps=4".to_string(),
            "train.offset_noise=0.1".to_string(),
        ];
        home.job(EVERYTHING).ranks(ranks).sets(&sets.each_ref().map(String::as_str)).run().done();
        rows(&home.out())
    };
    let alone = run(1, 4, 1);
    for ranks in [2, 4] {
        let shared = run(ranks, 4 / ranks, 1);
        for key in ["micro_step", "loss", "grad_norm"] {
            let (got, want) = (column(&shared, key), column(&alone, key));
            assert!(
                got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs()),
                "{ranks} ranks: {got:?} for {want:?}"
            );
        }
    }
    // Six items an epoch: at once, or two by two.
    let steps = |rows: Vec<Value>| rows.into_iter().filter(|row| row.get("grad_norm").is_some()).collect::<Vec<_>>();
    let (once, thrice) = (steps(run(3, 2, 1)), steps(run(1, 2, 3)));
    for key in ["loss", "grad_norm"] {
        let apart = apart(&column(&thrice, key), &column(&once, key));
        assert!(apart < 1e-5, "{key}: {apart:e}");
    }
}

#[test]
fn bf16_stays_near_fp32() {
    let run = |stage: usize, precision: &str| {
        let home = Home::new();
        let sets = [format!("zero.stage={stage}"), format!("train.mixed_precision={precision}")];
        home.job(EVERYTHING).ranks(2).sets(&sets.each_ref().map(String::as_str)).run().done();
        (rows(&home.out()), weights(&home.out()))
    };
    let (exact, _) = run(2, "no");
    let (half, trained) = run(2, "bf16");
    assert!(apart(&column(&half, "loss"), &column(&exact, "loss")) < 2e-2);
    assert_ne!(column(&half, "loss"), column(&exact, "loss"));
    assert!(run(3, "bf16") == (half, trained), "stages 2 and 3 agree to the bit");
}

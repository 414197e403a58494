//! Every way of sharing a training follows the plain one: its losses, its gradients, its weights.

use std::sync::Arc;
use std::time::Duration;

use candle_core::DType;
use dblaunch::comm::probe::Delayed;
use dblaunch::comm::{Communicator, Shared, Solo};
use dblaunch::segment::Keep;
use dblaunch::zero::Stage;

use crate::toy::{MAX_NORM, Outcome, Run, Storage, WIDTH, reference, train};

pub const STAGES: [Stage; 4] = [Stage::Replicated, Stage::OptimizerState, Stage::Gradients, Stage::Parameters];

/// Two micro-batches of unequal size, one of them with fewer items than ranks, over four steps.
pub fn steps() -> Vec<Vec<Vec<usize>>> {
    (0..4).map(|s| vec![(5 * s..5 * s + 5).collect(), vec![20 + s, 30 + s]]).collect()
}

/// The same items, one micro-batch or three per step.
pub fn accumulation(micro_batches: usize) -> Vec<Vec<Vec<usize>>> {
    (0..3usize)
        .map(|s| (12 * s..12 * s + 12).collect::<Vec<_>>().chunks(12 / micro_batches).map(<[_]>::to_vec).collect())
        .collect()
}

pub fn run(stage: Stage, keep: Keep, steps: Vec<Vec<Vec<usize>>>) -> Run {
    Run {
        stage,
        keep,
        steps,
        reduce_dtype: DType::F32,
        dtype: DType::F32,
        storage: Storage::on_device(),
        width: WIDTH,
        max_norm: MAX_NORM,
        threads: None,
    }
}

/// `run` on `world_size` ranks as threads, with sleeps before collectives if `delays`; all ranks agree to the bit.
pub fn together(world_size: usize, run: &Run, delays: bool) -> Outcome {
    let comms = Shared::threads(world_size, Duration::from_secs(60)).unwrap();
    let ranks: Vec<_> = comms
        .into_iter()
        .enumerate()
        .map(|(rank, comm)| {
            let run = run.clone();
            std::thread::spawn(move || {
                let comm: Arc<dyn Communicator> = match delays {
                    true => Arc::new(Delayed::new(comm, rank as u64, Duration::from_millis(3))),
                    false => Arc::new(comm),
                };
                train(comm, &run)
            })
        })
        .collect();
    let outcomes: Vec<_> = ranks.into_iter().map(|r| r.join().unwrap()).collect();
    assert!(outcomes.iter().all(|o| *o == outcomes[0]), "ranks disagree");
    outcomes[0].clone()
}

pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let squares = |f: &dyn Fn(usize) -> f64| (0..b.len()).map(|i| f(i).powi(2)).sum::<f64>();
    (squares(&|i| f64::from(a[i] - b[i])) / squares(&|i| f64::from(b[i])).max(1e-300)).sqrt()
}

fn follows(got: &Outcome, want: &Outcome, what: &str) {
    let relative = |a: &f64, b: &f64| (a - b).abs() / b.abs();
    assert_eq!(got.losses.len(), want.losses.len(), "{what}");
    let loss = got.losses.iter().zip(&want.losses).map(|(a, b)| relative(a, b)).fold(0.0, f64::max);
    let norm = got.norms.iter().zip(&want.norms).map(|(a, b)| relative(a, b)).fold(0.0, f64::max);
    let gradients = distance(&got.first_gradients, &want.first_gradients);
    let weights = distance(&got.weights, &want.weights);
    let worst = [loss, norm, gradients, weights].into_iter().fold(0.0, f64::max);
    assert!(worst < 1e-5, "{what}: loss {loss:e}, norm {norm:e}, gradients {gradients:e}, weights {weights:e}");
}

#[test]
fn one_rank_follows_the_plain_expression() {
    let want = reference(&steps());
    for stage in STAGES {
        for keep in [Keep::Inputs, Keep::Graph] {
            let got = train(Arc::new(Solo), &run(stage, keep, steps()));
            follows(&got, &want, &format!("{stage:?} {keep:?}"));
        }
    }
}

#[test]
fn every_world_size_and_stage_follows_one_rank() {
    let want = train(Arc::new(Solo), &run(Stage::Replicated, Keep::Inputs, steps()));
    for world_size in 1..=4 {
        for keep in [Keep::Inputs, Keep::Graph] {
            let outcomes = STAGES.map(|stage| together(world_size, &run(stage, keep, steps()), false));
            for (stage, got) in STAGES.iter().zip(&outcomes) {
                follows(got, &want, &format!("{world_size} ranks, {stage:?}, {keep:?}"));
            }
            assert_eq!(outcomes[2], outcomes[3], "stages 2 and 3 agree to the bit");
        }
    }
}

#[test]
fn retained_and_recomputed_graphs_agree_to_the_bit() {
    let [kept, recomputed, from_the_host] =
        [Keep::Graph, Keep::Inputs, Keep::Host].map(|keep| together(2, &run(Stage::Gradients, keep, steps()), false));
    assert_eq!(kept, recomputed);
    assert_eq!(kept, from_the_host);
}

#[test]
fn three_small_micro_batches_are_one_large_one() {
    for world_size in [1, 3] {
        for stage in STAGES {
            let [one, three] = [1, 3].map(|n| together(world_size, &run(stage, Keep::Inputs, accumulation(n)), false));
            assert!(distance(&three.first_gradients, &one.first_gradients) < 1e-5);
            assert!(distance(&three.weights, &one.weights) < 1e-5, "{world_size} ranks, {stage:?}");
        }
    }
}

#[test]
fn delays_before_collectives_change_nothing() {
    for stage in STAGES {
        let quick = together(3, &run(stage, Keep::Inputs, steps()), false);
        assert_eq!(quick, together(3, &run(stage, Keep::Inputs, steps()), true), "{stage:?}");
    }
}

#[test]
fn half_precision_compute_and_reduction_stay_near() {
    let want = reference(&steps());
    let run = Run { dtype: DType::BF16, reduce_dtype: DType::BF16, ..run(Stage::Parameters, Keep::Inputs, steps()) };
    let got = together(2, &run, false);
    assert!(distance(&got.first_gradients, &want.first_gradients) < 2e-2);
    assert!(distance(&got.weights, &want.weights) < 2e-2);
}

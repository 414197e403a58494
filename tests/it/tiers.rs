//! Wherever parameters, gradients and optimizer state rest, and however late they arrive, the numbers are those of the
//! run that keeps everything on the device: to the bit, gradients included.

use std::path::Path;

use candle_core::DType;
use dblaunch::device::Place::{self, Device, Host, Nvme};
use dblaunch::optim::StateKind;
use dblaunch::segment::Keep;
use dblaunch::zero::{Placement, Stage};

use crate::equivalence::{STAGES, accumulation, distance, run, steps, together};
use crate::toy::{Outcome, Run, Storage};

/// Of each rank. The runs on the device have as many as there are cores.
const THREADS: [usize; 3] = [1, 2, 3];
/// At this width the threads share the matrix products (2 tasks and more for 12 rows, 4 and more for up to 4), the
/// optimizer's updates (3 to 7 pieces), and the sums of gradients and of their squares; at the toy's own width they share
/// nothing.
const SHARED_WIDTH: usize = 320;

fn placements() -> impl Iterator<Item = Placement> {
    let places = [Device, Host, Nvme];
    let of = |parameters: Place, optimizer: Place| {
        [Device, Host].map(|gradients| Placement { parameters, gradients, optimizer })
    };
    places.into_iter().flat_map(move |p| places.into_iter().flat_map(move |o| of(p, o)))
}

fn with(base: &Run, placement: Placement, folder: &Path) -> Run {
    let storage = Storage { placement, folder: Some(folder.to_path_buf()), ..base.storage.clone() };
    Run { storage, ..base.clone() }
}

/// Every placement of `base`, with each of the numbers of threads, gives the bits of its all-on-device run, which are
/// returned.
fn same_everywhere(world_size: usize, base: &Run, threads: &[usize]) -> Outcome {
    let home = tempfile::tempdir().unwrap();
    let want = together(world_size, base, false);
    for placement in placements() {
        for &threads in threads {
            let run = Run { threads: Some(threads), ..with(base, placement, home.path()) };
            let same = together(world_size, &run, false) == want;
            let (stage, keep) = (base.stage, base.keep);
            assert!(same, "{world_size} ranks, {stage:?}, {placement:?}, {keep:?}, {threads} threads");
        }
    }
    want
}

/// Two steps of every combination of stage, what is kept for the backward, one micro-batch or three, and placement. One
/// and two ranks do each with 1, 2 and 3 threads, and none is left out. Three ranks, for the time it takes, do each with
/// one of these numbers: in every stage and placement each number comes twice, once with one micro-batch and once with
/// three.
fn every_combination(world_size: usize) {
    for stage in STAGES {
        for (i, keep) in [Keep::Inputs, Keep::Graph, Keep::Host].into_iter().enumerate() {
            for (j, micro_batches) in [1, 3].into_iter().enumerate() {
                let turn = (i + j) % THREADS.len();
                let threads = if world_size < 3 { &THREADS[..] } else { &THREADS[turn..=turn] };
                let steps = accumulation(micro_batches)[..2].to_vec();
                same_everywhere(world_size, &Run { width: SHARED_WIDTH, ..run(stage, keep, steps) }, threads);
            }
        }
    }
}

#[test]
fn every_tier_gives_the_bits_of_the_device_to_one_rank() {
    every_combination(1);
}

#[test]
fn every_tier_gives_the_bits_of_the_device_to_two_ranks() {
    every_combination(2);
}

#[test]
fn every_tier_gives_the_bits_of_the_device_to_three_ranks() {
    every_combination(3);
}

#[test]
fn uneven_micro_batches_and_ranks_without_rows_too() {
    for stage in STAGES {
        same_everywhere(3, &run(stage, Keep::Inputs, steps()), &[2]);
    }
}

#[test]
fn without_clipping_updates_begin_at_once_and_change_nothing() {
    for world_size in [1, 2] {
        for stage in STAGES {
            let late = Run { max_norm: 1e30, ..run(stage, Keep::Inputs, accumulation(3)) };
            let at_once = Run { max_norm: 0.0, ..late.clone() };
            let want = together(world_size, &late, false);
            assert!(same_everywhere(world_size, &at_once, &[2]) == want, "{world_size} ranks, {stage:?}");
        }
    }
}

#[test]
fn half_precision_8_bit_state_and_bf16_masters_and_sums_rest_anywhere() {
    for world_size in [1, 2] {
        for (i, stage) in [Stage::Replicated, Stage::Gradients, Stage::Parameters].into_iter().enumerate() {
            // Each kind of numbers in each place meets 1, 2 and 3 threads, one after the other from stage to stage.
            let threads = &THREADS[i..=i];
            let steps = accumulation(3)[..2].to_vec();
            let base = Run { width: SHARED_WIDTH, ..run(stage, Keep::Inputs, steps) };
            let f32_run = together(world_size, &base, false);
            for (dtype, state, master, gradients) in [
                (DType::BF16, StateKind::F32, DType::F32, DType::F32),
                (DType::F16, StateKind::F32, DType::F32, DType::F32),
                (DType::F32, StateKind::Bits8, DType::F32, DType::F32),
                (DType::F32, StateKind::Bits8, DType::BF16, DType::BF16),
                (DType::BF16, StateKind::Bits8, DType::BF16, DType::BF16),
            ] {
                let storage = Storage { state, master, gradients, ..base.storage.clone() };
                let outcome = same_everywhere(world_size, &Run { dtype, storage, ..base.clone() }, threads);
                let (weights, gradients) = (
                    distance(&outcome.weights, &f32_run.weights),
                    distance(&outcome.first_gradients, &f32_run.first_gradients),
                );
                assert!(
                    weights < 4e-2 && gradients < 4e-2,
                    "{stage:?} {dtype:?} {state:?} {master:?}: {weights} {gradients}"
                );
            }
        }
    }
}

#[test]
fn late_copies_collectives_and_disk_requests_change_nothing() {
    let home = tempfile::tempdir().unwrap();
    for world_size in [1, 3] {
        for stage in STAGES {
            for max_norm in [0.5, 0.0] {
                let base = Run { max_norm, ..run(stage, Keep::Inputs, accumulation(3)) };
                let want = together(world_size, &base, false);
                for placement in [
                    Placement { parameters: Nvme, gradients: Host, optimizer: Nvme },
                    Placement { parameters: Host, gradients: Host, optimizer: Host },
                    Placement { parameters: Device, gradients: Host, optimizer: Nvme },
                ] {
                    let mut late = with(&base, placement, home.path());
                    late.storage.delays = true;
                    let got = together(world_size, &late, true);
                    assert!(got == want, "{world_size} ranks, {stage:?}, {placement:?}, {max_norm}");
                    late.storage.prefetch = false;
                    assert!(together(world_size, &late, false) == want, "no prefetch: {stage:?}, {placement:?}");
                }
            }
        }
    }
}

#[test]
fn segments_of_many_pieces_and_any_number_of_threads() {
    let home = tempfile::tempdir().unwrap();
    for (world_size, stage) in [(1, Stage::Replicated), (2, Stage::OptimizerState), (2, Stage::Parameters)] {
        // Two tensors of 1.96 M elements: each shard has several pieces.
        let base = Run { width: 1400, ..run(stage, Keep::Inputs, accumulation(1)) };
        let base = Run { steps: base.steps[..2].to_vec(), ..base };
        for state in [StateKind::F32, StateKind::Bits8] {
            let storage = Storage { state, ..base.storage.clone() };
            let base = Run { storage, ..base.clone() };
            let want = together(world_size, &base, false);
            let nvme = Placement { parameters: Nvme, gradients: Host, optimizer: Nvme };
            let run = with(&base, nvme, home.path());
            for threads in [1, 2, 3] {
                let got = together(world_size, &Run { threads: Some(threads), ..run.clone() }, false);
                assert!(got == want, "{world_size} ranks, {stage:?}, {state:?}, {threads} threads");
            }
        }
    }
}

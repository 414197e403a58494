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

/// Every placement of `base` gives the bits of its all-on-device run, which are returned.
fn same_everywhere(world_size: usize, base: &Run) -> Outcome {
    let home = tempfile::tempdir().unwrap();
    let want = together(world_size, base, false);
    for placement in placements() {
        let got = together(world_size, &with(base, placement, home.path()), false);
        assert!(got == want, "{world_size} ranks, {:?}, {placement:?}, {:?}", base.stage, base.keep);
    }
    want
}

#[test]
fn every_tier_gives_the_bits_of_the_device() {
    for world_size in 1..=3 {
        for stage in STAGES {
            for (keep, micro_batches) in [(Keep::Inputs, 1), (Keep::Graph, 3), (Keep::Host, 3), (Keep::Graph, 1)] {
                same_everywhere(world_size, &run(stage, keep, accumulation(micro_batches)));
            }
        }
    }
}

#[test]
fn uneven_micro_batches_and_ranks_without_rows_too() {
    for stage in STAGES {
        same_everywhere(3, &run(stage, Keep::Inputs, steps()));
    }
}

#[test]
fn without_clipping_updates_begin_at_once_and_change_nothing() {
    for world_size in [1, 2] {
        for stage in STAGES {
            let late = Run { max_norm: 1e30, ..run(stage, Keep::Inputs, accumulation(3)) };
            let at_once = Run { max_norm: 0.0, ..late.clone() };
            let want = together(world_size, &late, false);
            assert!(same_everywhere(world_size, &at_once) == want, "{world_size} ranks, {stage:?}");
        }
    }
}

#[test]
fn half_precision_8_bit_state_and_bf16_masters_and_sums_rest_anywhere() {
    for world_size in [1, 2] {
        for stage in [Stage::Replicated, Stage::Gradients, Stage::Parameters] {
            let base = run(stage, Keep::Inputs, accumulation(3));
            let f32_run = together(world_size, &base, false);
            for (dtype, state, master, gradients) in [
                (DType::BF16, StateKind::F32, DType::F32, DType::F32),
                (DType::F16, StateKind::F32, DType::F32, DType::F32),
                (DType::F32, StateKind::Bits8, DType::F32, DType::F32),
                (DType::F32, StateKind::Bits8, DType::BF16, DType::BF16),
                (DType::BF16, StateKind::Bits8, DType::BF16, DType::BF16),
            ] {
                let storage = Storage { state, master, gradients, ..base.storage.clone() };
                let outcome = same_everywhere(world_size, &Run { dtype, storage, ..base.clone() });
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

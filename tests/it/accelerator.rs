//! Training where the device's memory is not the host's, on the emulated device: whoever looks into its memory from the
//! host, or forgets a copy, is caught. Wherever states rest, the bits are those of the run that keeps everything there;
//! and that run is the processor's but for rounding.

use std::sync::Arc;

use candle_core::DType;
use dblaunch::device::Place::{Device, Host, Nvme};
use dblaunch::kernels::emulated::{Emulated, Order};
use dblaunch::optim::StateKind;
use dblaunch::segment::Keep;
use dblaunch::zero::{Placement, Stage};

use crate::equivalence::{STAGES, accumulation, distance, run, steps, together};
use crate::toy::{Outcome, Run, Storage};

fn accelerated(base: &Run) -> Run {
    let accelerator = Some(Arc::new(Emulated::new(80, Order::Shuffled(5)).unwrap()));
    Run { storage: Storage { accelerator, ..base.storage.clone() }, ..base.clone() }
}

fn placements() -> impl Iterator<Item = Placement> {
    let places = [Device, Host, Nvme];
    let of = |parameters, optimizer| [Device, Host].map(|gradients| Placement { parameters, gradients, optimizer });
    places.into_iter().flat_map(move |p| places.into_iter().flat_map(move |o| of(p, o)))
}

/// Every placement gives the bits of the all-on-device run, which are returned.
fn same_everywhere(world_size: usize, base: &Run) -> Outcome {
    let home = tempfile::tempdir().unwrap();
    let base = accelerated(base);
    let want = together(world_size, &base, false);
    for placement in placements() {
        let storage = Storage { placement, folder: Some(home.path().to_path_buf()), ..base.storage.clone() };
        let got = together(world_size, &Run { storage, ..base.clone() }, false);
        assert!(got == want, "{world_size} ranks, {:?}, {placement:?}, {:?}", base.stage, base.keep);
    }
    want
}

fn near(got: &Outcome, want: &Outcome, bound: f64) {
    let losses = |outcome: &Outcome| outcome.losses.iter().map(|&x| x as f32).collect::<Vec<_>>();
    for (a, b) in
        [(&losses(got), &losses(want)), (&got.first_gradients, &want.first_gradients), (&got.weights, &want.weights)]
    {
        assert!(distance(a, b) < bound, "{:e}", distance(a, b));
    }
}

#[test]
fn every_tier_gives_the_bits_of_the_device_which_are_near_the_processors() {
    for world_size in [1, 2] {
        for stage in STAGES {
            for (keep, micro_batches) in [(Keep::Inputs, 1), (Keep::Graph, 3), (Keep::Host, 3)] {
                let base = run(stage, keep, accumulation(micro_batches));
                near(&same_everywhere(world_size, &base), &together(world_size, &base, false), 1e-5);
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
fn updates_that_begin_at_once_are_the_same() {
    for stage in [Stage::Replicated, Stage::Parameters] {
        let late = Run { max_norm: 1e30, ..run(stage, Keep::Inputs, accumulation(3)) };
        let at_once = Run { max_norm: 0.0, ..late.clone() };
        let want = together(1, &accelerated(&late), false);
        assert!(same_everywhere(1, &at_once) == want, "{stage:?}");
    }
}

#[test]
fn half_precision_8_bit_state_and_bf16_masters_and_sums_rest_anywhere() {
    for (world_size, stage) in [(1, Stage::Replicated), (2, Stage::Gradients), (2, Stage::Parameters)] {
        for (dtype, state, master, gradients) in [
            (DType::BF16, StateKind::F32, DType::F32, DType::F32),
            (DType::F16, StateKind::F32, DType::F32, DType::F32),
            (DType::F32, StateKind::Bits8, DType::F32, DType::F32),
            (DType::F32, StateKind::Bits8, DType::BF16, DType::BF16),
            (DType::BF16, StateKind::Bits8, DType::BF16, DType::BF16),
        ] {
            let base = run(stage, Keep::Inputs, accumulation(3));
            let storage = Storage { state, master, gradients, ..base.storage.clone() };
            let base = Run { dtype, reduce_dtype: dtype, storage, ..base };
            near(&same_everywhere(world_size, &base), &together(world_size, &base, false), 0.05);
        }
    }
}

#[test]
fn late_copies_change_nothing() {
    for stage in [Stage::Replicated, Stage::Gradients] {
        let base = run(stage, Keep::Host, accumulation(3));
        let want = together(2, &accelerated(&base), false);
        let late = Run { storage: Storage { delays: true, ..base.storage.clone() }, ..base };
        assert!(same_everywhere(2, &late) == want, "{stage:?}");
    }
}

#[test]
fn segments_of_many_pieces() {
    let base = Run { width: 1200, ..run(Stage::Replicated, Keep::Inputs, accumulation(1)) };
    same_everywhere(1, &Run { steps: base.steps[..2].to_vec(), ..base });
}

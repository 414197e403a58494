//! Training where the device's memory is not the host's: on a GPU (feature `cuda`, where there is one or a stand-in), else
//! on the emulated device. Whoever looks into its memory from the host, or forgets a copy or a wait, is caught. Wherever
//! states rest, the bits are those of the run that keeps everything there; and that run is the processor's but for
//! rounding.

use candle_core::DType;
use dblaunch::device::Place::{Device, Host, Nvme};
use dblaunch::optim::StateKind;
use dblaunch::segment::Keep;
use dblaunch::zero::{Placement, Stage};

use crate::equivalence::{STAGES, accumulation, distance, run, steps, together};
use crate::toy::{Beside, Outcome, Run, Storage};

/// The GPU of all tests of this process; none, which is said, where there is none, unless DBLAUNCH_TEST_GPU is set.
#[cfg(feature = "cuda")]
fn accelerator() -> Option<Beside> {
    use std::sync::{Arc, OnceLock};

    use dblaunch::device::cuda::Gpu;

    static GPU: OnceLock<Option<Arc<Gpu>>> = OnceLock::new();
    let open = || match Gpu::open(0, Some(4 << 30)) {
        Ok(gpu) => Some(gpu),
        Err(error) if std::env::var_os("DBLAUNCH_TEST_GPU").is_some() => panic!("{error:#}"),
        Err(error) => {
            eprintln!("skipped, there is no GPU: {error:#}");
            None
        }
    };
    GPU.get_or_init(open).clone().map(Beside::Gpu)
}

#[cfg(not(feature = "cuda"))]
fn accelerator() -> Option<Beside> {
    use dblaunch::kernels::emulated::{Emulated, Order};

    Some(Beside::Emulated(Emulated::new(80, Order::Shuffled(5)).unwrap().into()))
}

/// The run on the accelerator, if there is one.
fn accelerated(base: &Run) -> Option<Run> {
    let accelerator = Some(accelerator()?);
    Some(Run { storage: Storage { accelerator, ..base.storage.clone() }, ..base.clone() })
}

fn placements() -> impl Iterator<Item = Placement> {
    let places = [Device, Host, Nvme];
    let of = |parameters, optimizer| [Device, Host].map(|gradients| Placement { parameters, gradients, optimizer });
    places.into_iter().flat_map(move |p| places.into_iter().flat_map(move |o| of(p, o)))
}

/// Every placement gives the bits of the all-on-device run, which are returned; none without an accelerator.
fn same_everywhere(world_size: usize, base: &Run) -> Option<Outcome> {
    let home = tempfile::tempdir().unwrap();
    let base = accelerated(base)?;
    let want = together(world_size, &base, false);
    for placement in placements() {
        let storage = Storage { placement, folder: Some(home.path().to_path_buf()), ..base.storage.clone() };
        let got = together(world_size, &Run { storage, ..base.clone() }, false);
        assert!(got == want, "{world_size} ranks, {:?}, {placement:?}, {:?}", base.stage, base.keep);
    }
    Some(want)
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
                let Some(got) = same_everywhere(world_size, &base) else { return };
                near(&got, &together(world_size, &base, false), 1e-5);
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
        let Some(late) = accelerated(&late) else { return };
        assert!(same_everywhere(1, &at_once) == Some(together(1, &late, false)), "{stage:?}");
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
            let Some(got) = same_everywhere(world_size, &base) else { return };
            near(&got, &together(world_size, &base, false), 0.05);
        }
    }
}

#[test]
fn late_copies_change_nothing() {
    for stage in [Stage::Replicated, Stage::Gradients] {
        let base = run(stage, Keep::Host, accumulation(3));
        let Some(quick) = accelerated(&base) else { return };
        let late = Run { storage: Storage { delays: true, ..base.storage.clone() }, ..base };
        assert!(same_everywhere(2, &late) == Some(together(2, &quick, false)), "{stage:?}");
    }
}

#[test]
fn segments_of_many_pieces() {
    let base = Run { width: 1200, ..run(Stage::Replicated, Keep::Inputs, accumulation(1)) };
    same_everywhere(1, &Run { steps: base.steps[..2].to_vec(), ..base });
}

/// Ranks whose collectives over the GPU's memory are done by NCCL, or what stands for it: the real one does not let several
/// ranks of a process share a GPU.
#[cfg(feature = "cuda")]
fn together_over_nccl(world_size: usize, run: &Run) -> Outcome {
    use std::sync::Arc;
    use std::time::Duration;

    use dblaunch::comm::{Communicator, DeviceCommunicator, Nccl, Paired, Shared};

    use crate::toy::train;

    let Some(Beside::Gpu(gpu)) = &run.storage.accelerator else { unreachable!("only on a GPU") };
    let timeout = Duration::from_secs(60);
    let rank = |comm: Shared| {
        let host: Arc<dyn Communicator> = Arc::new(comm);
        let device = Arc::new(Nccl::join(gpu, host.clone(), timeout).unwrap());
        let outcome = train(Arc::new(Paired::new(host, device.clone())), run);
        device.close().unwrap();
        outcome
    };
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let comms = Shared::threads(world_size, timeout).unwrap();
        let ranks: Vec<_> = comms.into_iter().map(|comm| scope.spawn(|| rank(comm))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert!(outcomes.iter().all(|o| *o == outcomes[0]), "ranks disagree");
    outcomes[0].clone()
}

#[cfg(feature = "cuda")]
#[test]
fn collectives_of_the_gpus_sum_as_the_hosts() {
    if std::env::var_os("STAND_IN_KERNELS").is_none() {
        return eprintln!("skipped, there is no NCCL with which the ranks of a process share a GPU");
    }
    let home = tempfile::tempdir().unwrap();
    for stage in STAGES {
        for (world_size, dtype) in [(2, DType::F32), (3, DType::F32), (2, DType::BF16)] {
            let base = Run { dtype, reduce_dtype: dtype, ..run(stage, Keep::Inputs, accumulation(3)) };
            let Some(base) = accelerated(&base) else { return };
            let want = together(world_size, &base, false);
            for placement in placements() {
                let storage = Storage { placement, folder: Some(home.path().to_path_buf()), ..base.storage.clone() };
                let got = together_over_nccl(world_size, &Run { storage, ..base.clone() });
                // Sums of two are the same in any order.
                match (world_size, dtype) {
                    (2, DType::F32) => assert!(got == want, "{stage:?}, {placement:?}"),
                    (_, DType::F32) => near(&got, &want, 1e-5),
                    _ => near(&got, &want, 0.05),
                }
            }
        }
    }
}

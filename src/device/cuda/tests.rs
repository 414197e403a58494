//! On a real GPU. Where there is none they say so and pass, unless DBLAUNCH_TEST_GPU is set, as `tests/gpu.sh` does.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::comm::{AloneOnDevice, DeviceCommunicator, Operation, Scalar};
use crate::kernels::{Arg, Family, Grid, Launcher};

/// Enough for everything below, and less than any card has.
const LIMIT: usize = 1 << 30;

/// The GPU of all tests of this process, which share its pool.
pub(crate) fn gpu() -> Option<Arc<Gpu>> {
    static GPU: OnceLock<Option<Arc<Gpu>>> = OnceLock::new();
    let open = || match Gpu::open(0, Some(LIMIT)) {
        Ok(gpu) => Some(gpu),
        Err(error) if std::env::var_os("DBLAUNCH_TEST_GPU").is_some() => panic!("{error:#}"),
        Err(error) => {
            eprintln!("skipped, there is no GPU: {error:#}");
            None
        }
    };
    GPU.get_or_init(open).clone()
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u8).collect()
}

#[test]
fn bytes_go_up_across_and_down_over_three_streams() -> anyhow::Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let (up, down) = (gpu.stream("up")?, gpu.stream("down")?);
    let bytes = pattern(8 << 20);
    for round in 0..20usize {
        let mut pinned = Pinned::new(&gpu, bytes.len(), "a test")?;
        pinned.bytes_mut().copy_from_slice(&bytes);
        pinned.bytes_mut()[round] ^= 0xff;
        let pinned = Arc::new(pinned);
        let first = gpu.computing().alloc_zeroed(bytes.len(), "a test")?;
        let second = gpu.computing().alloc_zeroed(bytes.len(), "a test")?;
        up.after(&gpu.computing().mark()?)?;
        let arrived = up.upload(&pinned, 0..bytes.len(), &first, 0)?;
        gpu.computing().after(&arrived)?;
        gpu.computing().copy(&first, 0..bytes.len(), &second, 0)?;
        down.after(&gpu.computing().mark()?)?;
        let back = down.download(&second, 0..bytes.len(), Pinned::new(&gpu, bytes.len(), "a test")?, 0)?;
        // Dropped and handed out again while the copy may still be under way.
        drop((first, second));
        let other = gpu.computing().alloc(2 * bytes.len(), "a test")?;
        gpu.computing().zero(&other, 0..other.len())?;
        assert!(back.wait()?.bytes() == pinned.bytes(), "round {round}");
    }
    Ok(())
}

#[test]
fn the_limit_holds_for_our_memory_and_for_candles() -> anyhow::Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let error = gpu.computing().alloc(LIMIT + 1, "a bucket").err().unwrap().to_string();
    assert!(error.starts_with(&format!("a bucket: {} bytes do not fit into the device memory", LIMIT + 1)), "{error}");
    if gpu.limit_is_enforced() {
        assert!(Tensor::zeros(LIMIT / 4 + 1, DType::F32, gpu.device()).is_err());
    }
    // Other tests use the pool at the same time: all that is certain is what this one holds.
    let tensor = Tensor::zeros(8 << 20, DType::F32, gpu.device())?;
    let usage = gpu.usage()?;
    assert!(usage.used >= 32 << 20 && usage.used_peak >= usage.used && usage.held <= LIMIT, "{usage:?}");
    drop(tensor);
    Ok(())
}

#[test]
fn kernels_compute_and_unknown_ones_are_named() -> anyhow::Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let scratch = gpu.scratch(1024)?;
    let grid = Grid { blocks: [1, 1, 1], threads: 256, shared: 0 };
    let error = gpu.launch(Family::Selftest, "selftest_none", grid, &[Arg::Address(scratch.address())]);
    assert!(error.unwrap_err().to_string().contains("the kernel selftest_none in selftest.cu"));
    let huge = Grid { shared: 1 << 30, ..grid };
    let error = gpu.launch(Family::Selftest, "selftest_sums", huge, &[Arg::Address(scratch.address()), Arg::U32(1)]);
    assert!(format!("{:#}", error.unwrap_err()).contains("shared memory"));
    Ok(())
}

#[test]
fn tensors_lie_where_they_are_said_to() -> anyhow::Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let values: Vec<f32> = (0..64).map(|i| i as f32).collect();
    let tensor = Tensor::from_vec(values.clone(), (8, 8), gpu.device())?.narrow(0, 2, 3)?;
    let (storage, layout) = tensor.storage_and_layout();
    let candle_core::Storage::Cuda(storage) = &*storage else { anyhow::bail!("not on the GPU") };
    let copy = gpu.computing().alloc(24 * 4, "a test")?;
    // SAFETY: 24 elements on both sides, in use until the read below has waited.
    unsafe { gpu.computing().copy_on_device(copy.address(), address_of(storage, layout)?, 24 * 4)? };
    let bytes = gpu.read(&copy)?;
    let read: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    assert_eq!(read, values[16..40]);
    Ok(())
}

#[test]
fn candle_computes_in_all_three_precisions() -> anyhow::Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let product = |device: &Device, dtype: DType| -> candle_core::Result<Vec<f32>> {
        let a = Tensor::arange(0f32, 96.0, device)?.affine(1.0 / 16.0, -3.0)?.reshape((8, 12))?.to_dtype(dtype)?;
        let product = a.matmul(&a.t()?)?.add(&a.narrow(1, 0, 8)?)?;
        product.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
    };
    // candle has no bf16 for Turing.
    let half = if gpu.capability() >= found::CANDLES_OLDEST { DType::BF16 } else { DType::F16 };
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 0.05), (half, 0.4)] {
        let (ours, theirs) = (product(gpu.device(), dtype)?, product(&Device::Cpu, dtype)?);
        let furthest = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(furthest <= tolerance, "{dtype:?}: {furthest}");
    }
    Ok(())
}

#[test]
fn a_world_of_one_gathers_by_copying() -> anyhow::Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let comm = AloneOnDevice::on(gpu.stream("collectives")?);
    let bytes = pattern(4096);
    let input = gpu.write(&bytes, "a test")?;
    let output = gpu.computing().alloc_zeroed(bytes.len(), "a test")?;
    let ready = gpu.computing().mark()?;
    let gather = Operation::all_gather(Scalar::F32, 1024, input.address(), output.address());
    let mark =
        comm.begin(&[gather, Operation::all_reduce(Scalar::F32, 1024, output.address())], &[&ready], "a test")?;
    gpu.computing().after(&mark)?;
    assert!(gpu.read(&output)? == bytes, "other bytes were gathered");
    comm.close()
}

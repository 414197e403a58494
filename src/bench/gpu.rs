//! What a GPU and the ways to it can do, each rank for its own and the ranks together: that results are right, then how
//! fast. One JSON line for each thing.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};
use serde_json::{Value, json};

use crate::comm::{AloneOnDevice, CommunicatorExt, DeviceCommunicator, Nccl, Operation, Scalar, each_its_own};
use crate::device::cuda::{DeviceMemory, Gpu, Pinned, Stream};
use crate::kernels::{Arg, Family, Grid, Launcher};
use crate::launch::Rank;

/// Of a copy and of a collective; large enough that what precedes it does not count.
const BYTES: usize = 256 << 20;
/// Of a measurement; the best of them counts, since everything else on the machine only takes away.
pub(super) const ROUNDS: usize = 5;
const LAUNCHES: u32 = 2000;
/// A GPU that is there all the time answers sooner.
const TIMEOUT: Duration = Duration::from_secs(60);

/// By then the other ranks wait in the collective that is to fail.
const UNTIL_IT_FAILS: Duration = Duration::from_millis(500);

/// Runs everything on this rank's GPU, of whose memory at most `limit` bytes are used. Several ranks may share one GPU if
/// `shared`. With `fail` nothing is timed, and the last rank fails on purpose while the others are in a collective with it.
pub fn gpu(rank: &Rank, limit: usize, shared: bool, fail: bool) -> Result<()> {
    let comm = rank.communicator.clone();
    let started = Instant::now();
    let gpu = comm.agree(Gpu::open(rank.world.local_rank, Some(limit)))?;
    let card = gpu.card();
    say(
        rank,
        json!({
            "gpu": gpu.ordinal(), "name": card.name, "capability": card.capability, "multiprocessors": gpu.multiprocessors(),
            "memory": card.memory, "outside_of_pool": gpu.outside_of_pool()?, "limit": limit,
            "limit_enforced_by_driver": gpu.limit_is_enforced(), "seconds_to_open": started.elapsed().as_secs_f64(),
        }),
    )?;
    if !shared {
        each_its_own(&*comm, Some((card.uuid, &card.name)))?;
    }
    say(rank, limit_holds(&gpu, limit)?)?;
    if !fail {
        say(rank, copies(&gpu)?)?;
        say(rank, overhead(&gpu)?)?;
    }
    let group: Box<dyn DeviceCommunicator> = match comm.world_size() {
        1 => Box::new(AloneOnDevice::on(gpu.stream("collectives")?)),
        _ => Box::new(Nccl::join(&gpu, comm.clone(), TIMEOUT)?),
    };
    for scalar in [Scalar::F32, Scalar::F16, Scalar::BF16, Scalar::F64, Scalar::U8] {
        collectives(&gpu, &*group, scalar).with_context(|| format!("collectives of {scalar}"))?;
    }
    say(rank, json!({"collectives": "right", "world_size": comm.world_size()}))?;
    match fail {
        true => fail_on_purpose(&gpu, &*group)?,
        false => say(rank, collective_speed(&gpu, &*group)?)?,
    }
    group.close()
}

/// The last rank leaves with an error and says when, in seconds since 1970; the others wait for it on the device and must
/// get one, too.
fn fail_on_purpose(gpu: &Gpu, group: &dyn DeviceCommunicator) -> Result<()> {
    if group.rank() + 1 == group.world_size() {
        std::thread::sleep(UNTIL_IT_FAILS);
        println!("{}", json!({"fails_at": SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64()}));
        bail!("failed on purpose");
    }
    let memory = gpu.computing().alloc_zeroed(1024, "a collective's memory")?;
    let ready = gpu.computing().mark()?;
    let mark = group.begin(&[Operation::all_reduce(Scalar::F32, 256, memory.address())], &[&ready], "bench")?;
    mark.wait()
}

/// One line for each rank, in the order of the ranks.
fn say(rank: &Rank, line: Value) -> Result<()> {
    let lines = rank.communicator.gather_strings(&line.to_string())?;
    if rank.world.rank == 0 {
        lines.iter().for_each(|line| println!("{line}"));
    }
    Ok(())
}

/// Memory ends at the limit, with words for ours and with an error for candle's, and goes on being usable.
fn limit_holds(gpu: &Gpu, limit: usize) -> Result<Value> {
    let ours = gpu.computing().alloc(limit, "all of the memory");
    let message = ours.err().context("more memory was handed out than the limit allows")?.to_string();
    let candles = Tensor::zeros(limit / 4 + 1, DType::F32, gpu.device());
    ensure!(candles.is_err() || !gpu.limit_is_enforced(), "candle was handed more memory than the limit allows");
    drop(candles);
    let most = limit - gpu.usage()?.used - (64 << 20);
    drop(gpu.computing().alloc(most, "what is left")?);
    let again = gpu.computing().alloc(most, "what was given back")?;
    let usage = gpu.usage()?;
    drop(again);
    gpu.computing().synchronize()?;
    gpu.trim()?;
    Ok(json!({"limit": "holds", "message": message, "used": usage.used, "held": usage.held}))
}

fn bytes(len: usize) -> impl Iterator<Item = u8> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 9) as u8)
}

/// Bytes a second of `work`, the best of some rounds.
pub(super) fn speed(stream: &Stream, bytes: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let begun = stream.timed_mark()?;
        work()?;
        let done = stream.timed_mark()?;
        done.wait()?;
        best = best.min(done.since(&begun)?);
    }
    Ok(bytes as f64 / best)
}

/// Page-locked memory to the GPU and back: right, and how fast, alone and both at once.
fn copies(gpu: &Gpu) -> Result<Value> {
    let (up, down) = (gpu.stream("up")?, gpu.stream("down")?);
    let mut source = Pinned::new(gpu, BYTES, "the source of copies")?;
    source.bytes_mut().iter_mut().zip(bytes(BYTES)).for_each(|(to, from)| *to = from);
    let source = Arc::new(source);
    let mut target = Pinned::new(gpu, BYTES, "the target of copies")?;
    let (first, second) =
        (gpu.computing().alloc_zeroed(BYTES, "a copy")?, gpu.computing().alloc_zeroed(BYTES, "another copy")?);
    let ready = gpu.computing().mark()?;
    up.after(&ready)?;
    down.after(&ready)?;
    let to_gpu = speed(&up, BYTES, || up.upload(&source, 0..BYTES, &first, 0).map(drop))?;
    let on_gpu = speed(&up, 2 * BYTES, || up.copy(&first, 0..BYTES, &second, 0).map(drop))?;
    let mut from_gpu = 0f64;
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        target = down.download(&second, 0..BYTES, target, 0)?.wait()?;
        from_gpu = from_gpu.max(BYTES as f64 / begun.elapsed().as_secs_f64());
    }
    ensure!(target.bytes() == source.bytes(), "bytes came back changed");
    let begun = Instant::now();
    let going = up.upload(&source, 0..BYTES, &first, 0)?;
    let coming = down.download(&second, 0..BYTES, target, 0)?;
    going.wait()?;
    drop(coming.wait()?);
    let both = 2.0 * BYTES as f64 / begun.elapsed().as_secs_f64();
    Ok(json!({"bytes_per_second": {"to_gpu": to_gpu, "from_gpu": from_gpu, "both_ways": both, "on_gpu": on_gpu}}))
}

/// Bytes a second from the host to the GPU and back.
pub(super) fn ways(gpu: &Gpu) -> Result<(f64, f64)> {
    let measured = copies(gpu)?;
    let speed = |way: &str| measured["bytes_per_second"][way].as_f64().context("a speed");
    Ok((speed("to_gpu")?, speed("from_gpu")?))
}

/// What the host pays for a launch and for memory, and what the GPU pays between two small kernels.
fn overhead(gpu: &Gpu) -> Result<Value> {
    let out = gpu.computing().alloc_zeroed(1024, "a small kernel")?;
    let grid = Grid { blocks: [1, 1, 1], threads: 256, shared: 0 };
    let launch = || gpu.launch(Family::Selftest, "selftest_sums", grid, &[Arg::Address(out.address()), Arg::U32(1)]);
    launch()?;
    gpu.computing().synchronize()?;
    let (begun, first) = (Instant::now(), gpu.computing().timed_mark()?);
    (0..LAUNCHES).try_for_each(|_| launch())?;
    let host = begun.elapsed().as_secs_f64();
    let last = gpu.computing().timed_mark()?;
    last.wait()?;
    let each = |seconds: f64| seconds / f64::from(LAUNCHES) * 1e6;
    let device = last.since(&first)?;
    let begun = Instant::now();
    (0..LAUNCHES).try_for_each(|_| gpu.computing().alloc(1 << 20, "a small piece").map(drop))?;
    let memory = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    (0..LAUNCHES).try_for_each(|_| gpu.computing().mark().map(drop))?;
    let mark = begun.elapsed().as_secs_f64();
    Ok(json!({"microseconds": {
        "launch_on_host": each(host), "launch_on_gpu": each(device), "memory_taken_and_given": each(memory),
        "mark": each(mark),
    }}))
}

/// A rank's number as an element's bytes: sums of small whole numbers are exact in every dtype.
fn element(scalar: Scalar, value: usize) -> Vec<u8> {
    match scalar {
        Scalar::F32 => (value as f32).to_le_bytes().to_vec(),
        Scalar::F64 => (value as f64).to_le_bytes().to_vec(),
        Scalar::F16 => half::f16::from_f32(value as f32).to_le_bytes().to_vec(),
        Scalar::BF16 => half::bf16::from_f32(value as f32).to_le_bytes().to_vec(),
        Scalar::U8 => vec![value as u8],
    }
}

fn filled(gpu: &Gpu, scalar: Scalar, values: impl Iterator<Item = usize>) -> Result<DeviceMemory> {
    let bytes: Vec<u8> = values.flat_map(|value| element(scalar, value)).collect();
    gpu.write(&bytes, "a collective's memory")
}

/// Every collective against what it must give, two of them in one group.
fn collectives(gpu: &Gpu, group: &dyn DeviceCommunicator, scalar: Scalar) -> Result<()> {
    const LENGTH: usize = 1000;
    let (rank, world_size, size) = (group.rank(), group.world_size(), scalar.size());
    let value = |rank: usize, i: usize| (rank + 1) * (i % 5 + 1) % 64;
    let mine = filled(gpu, scalar, (0..LENGTH).map(|i| value(rank, i)))?;
    let gathered = gpu.computing().alloc_zeroed(LENGTH * world_size * size, "gathered")?;
    let sent = filled(gpu, scalar, (0..LENGTH).map(|i| if rank == world_size - 1 { value(9, i) } else { 0 }))?;
    let ready = gpu.computing().mark()?;
    let operations = [
        Operation::all_gather(scalar, LENGTH, mine.address(), gathered.address()),
        Operation::broadcast(scalar, LENGTH, sent.address(), world_size - 1),
    ];
    gpu.computing().after(&group.begin(&operations, &[&ready], "bench")?)?;
    let expected: Vec<u8> =
        (0..world_size).flat_map(|r| (0..LENGTH).flat_map(move |i| element(scalar, value(r, i)))).collect();
    ensure!(gpu.read(&gathered)? == expected, "all_gather gave something else");
    let expected: Vec<u8> = (0..LENGTH).flat_map(|i| element(scalar, value(9, i))).collect();
    ensure!(gpu.read(&sent)? == expected, "broadcast gave something else");
    if scalar == Scalar::U8 {
        return Ok(());
    }
    let parts = filled(gpu, scalar, (0..LENGTH * world_size).map(|i| value(rank, i)))?;
    let part = gpu.computing().alloc_zeroed(LENGTH * size, "a part")?;
    let ready = gpu.computing().mark()?;
    let operations = [
        Operation::reduce_scatter(scalar, LENGTH, parts.address(), part.address()),
        Operation::all_reduce(scalar, LENGTH, mine.address()),
    ];
    gpu.computing().after(&group.begin(&operations, &[&ready], "bench")?)?;
    let sum = |i: usize| (0..world_size).map(|r| value(r, i)).sum::<usize>();
    let expected: Vec<u8> = (0..LENGTH).flat_map(|i| element(scalar, sum(rank * LENGTH + i))).collect();
    ensure!(gpu.read(&part)? == expected, "reduce_scatter gave something else");
    let expected: Vec<u8> = (0..LENGTH).flat_map(|i| element(scalar, sum(i))).collect();
    ensure!(gpu.read(&mine)? == expected, "all_reduce gave something else");
    Ok(())
}

/// Bytes a second of what each rank ends up with.
fn collective_speed(gpu: &Gpu, group: &dyn DeviceCommunicator) -> Result<Value> {
    let whole = gpu.computing().alloc_zeroed(BYTES, "a whole bucket")?;
    let part = gpu.computing().alloc_zeroed(BYTES / group.world_size(), "a part of it")?;
    let ready = gpu.computing().mark()?;
    let (all, some) = (BYTES / 4, BYTES / 4 / group.world_size());
    let (whole, part) = (whole.address(), part.address());
    let time =
        |operation: Operation| speed(group.stream(), BYTES, || group.begin(&[operation], &[&ready], "bench").map(drop));
    Ok(json!({"bytes_per_second": {
        "all_gather": time(Operation::all_gather(Scalar::F32, some, part, whole))?,
        "reduce_scatter": time(Operation::reduce_scatter(Scalar::F32, some, whole, part))?,
        "all_reduce": time(Operation::all_reduce(Scalar::F32, all, whole))?,
    }}))
}

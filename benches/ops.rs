//! Speed of `linear` and `conv2d`: billions of floating-point operations per second for each shape, number type and pass.
//!
//! `cargo bench --bench ops` prints a table; `-- --json FILE` writes it too; `-- --only TEXT` keeps the lines with TEXT;
//! `-- --threads N`. `-- --cpu-time` measures one thread by the time it had a core, for a machine that others use too.
//! With `-- --serve` it answers on standard output what it is asked on standard input, one line each:
//! `list` (all cases, then an empty line) or a case (its best time in nanoseconds), so that another program can measure
//! its own way of doing the same in turn.

use std::io::{BufRead, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use candle_core::{CustomOp1, Device, Tensor};
use dblaunch::device::{Element, Keeping, WeightRef, threads};
use dblaunch::ops::{Conv2d, conv2d, conv2d_op, linear, linear_op};
use half::{bf16, f16};

#[global_allocator]
static ALLOCATOR: Keeping<mimalloc::MiMalloc> = Keeping::over(mimalloc::MiMalloc);

const PASSES: [&str; 3] = ["forward", "data", "backward"];

/// linear ROWS INPUTS OUTPUTS, or conv IMAGES INPUTS OUTPUTS HEIGHT WIDTH KERNEL STRIDE PADDING.
const SHAPES: [&str; 30] = [
    "conv 1 320 320 64 64 3 1 1",
    "conv 4 320 320 64 64 3 1 1",
    "conv 1 640 640 32 32 3 1 1",
    "conv 2 1280 1280 16 16 3 1 1",
    "conv 2 1280 1280 8 8 3 1 1",
    "conv 1 2560 1280 8 8 3 1 1",
    "conv 1 2560 1280 16 16 3 1 1",
    "conv 1 960 320 64 64 3 1 1",
    "conv 1 320 320 64 64 3 2 1",
    "conv 1 640 640 32 32 3 2 1",
    "conv 1 4 320 64 64 3 1 1",
    "conv 1 320 4 64 64 3 1 1",
    "conv 16 320 320 8 8 3 1 1",
    "conv 1 640 320 64 64 1 1 0",
    "conv 1 2560 1280 16 16 1 1 0",
    "conv 4 16 16 8 8 3 1 1",
    "conv 2 32 32 16 16 3 1 1",
    "conv 2 32 64 16 16 3 2 1",
    "conv 1 128 128 128 128 3 1 1",
    "linear 4096 320 320",
    "linear 4096 320 2560",
    "linear 4096 1280 320",
    "linear 1024 640 5120",
    "linear 1024 2560 640",
    "linear 256 1280 10240",
    "linear 256 5120 1280",
    "linear 77 768 3072",
    "linear 154 768 320",
    "linear 2 1280 1280",
    "linear 64 32 32",
];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| arguments.iter().position(|a| a == name).and_then(|at| arguments.get(at + 1));
    let count = match value("--threads") {
        Some(count) => count.parse().context("--threads takes a number")?,
        None => std::thread::available_parallelism()?.get(),
    };
    let count = if arguments.iter().any(|a| a == "--cpu-time") { 1 } else { count };
    CPU_TIME.store(arguments.iter().any(|a| a == "--cpu-time"), Relaxed);
    threads::set_threads(count);
    if arguments.iter().any(|a| a == "--serve") {
        return serve();
    }
    let mut lines = Vec::new();
    for case in cases().filter(|case| value("--only").is_none_or(|text| case.contains(text.as_str()))) {
        let (time, operations) = measure(&case)?;
        let rate = operations / time.as_secs_f64() / 1e9;
        println!("{case:48} {:10.3} ms {rate:8.1} GFLOP/s", time.as_secs_f64() * 1e3);
        lines.push(serde_json::json!({ "case": case, "seconds": time.as_secs_f64(), "gflops": rate }));
    }
    if let Some(path) = value("--json") {
        let report = serde_json::json!({ "threads": count, "cases": lines });
        std::fs::write(path, serde_json::to_string_pretty(&report)?).with_context(|| format!("writing {path}"))?;
    }
    Ok(())
}

fn cases() -> impl Iterator<Item = String> {
    ["f32", "bf16"].into_iter().flat_map(|dtype| {
        SHAPES.iter().flat_map(move |shape| PASSES.iter().map(move |pass| format!("{dtype} {pass} {shape}")))
    })
}

fn serve() -> Result<()> {
    let mut out = std::io::stdout();
    for line in std::io::stdin().lock().lines() {
        match line?.trim() {
            "list" => {
                cases().for_each(|case| println!("{case}"));
                println!();
            }
            case => println!("{}", measure(case)?.0.as_nanos()),
        }
        out.flush()?;
    }
    Ok(())
}

/// The best time of a case and its floating-point operations.
fn measure(case: &str) -> Result<(Duration, f64)> {
    let words: Vec<&str> = case.split_whitespace().collect();
    match words.first() {
        Some(&"f32") => measure_in::<f32>(&words[1..]),
        Some(&"bf16") => measure_in::<bf16>(&words[1..]),
        Some(&"f16") => measure_in::<f16>(&words[1..]),
        _ => bail!("no such case: {case}"),
    }
}

fn measure_in<T: Element>(words: &[&str]) -> Result<(Duration, f64)> {
    let [pass, kind, sizes @ ..] = words else { bail!("a case needs a pass, a kind and sizes") };
    let sizes: Vec<usize> = sizes.iter().map(|s| s.parse()).collect::<Result<_, _>>()?;
    let trainable = *pass == "backward";
    match (*kind, &*sizes) {
        ("linear", &[rows, inputs, outputs]) => {
            let matrix = weight::<T>(&[outputs, inputs], trainable)?;
            let bias = weight::<T>(&[outputs], trainable)?;
            let x = numbers::<T>(&[rows, inputs])?;
            let operations = 2 * rows * inputs * outputs;
            let op = linear_op(&x, &matrix, Some(&bias))?;
            measure_op(pass, &x, |x| linear(x, &matrix, Some(&bias)), &op, operations)
        }
        ("conv", &[images, inputs, outputs, height, width, kernel, stride, padding]) => {
            let conv = Conv2d::new(stride, padding);
            let matrix = weight::<T>(&[outputs, inputs, kernel, kernel], trainable)?;
            let bias = weight::<T>(&[outputs], trainable)?;
            let x = numbers::<T>(&[images, inputs, height, width])?;
            let pixels = |size: usize| (size + 2 * padding - kernel) / stride + 1;
            let operations = 2 * images * outputs * pixels(height) * pixels(width) * inputs * kernel * kernel;
            let op = conv2d_op(&x, &matrix, Some(&bias), conv)?;
            measure_op(pass, &x, |x| conv2d(x, &matrix, Some(&bias), conv), &op, operations)
        }
        _ => bail!("no such case: {}", words.join(" ")),
    }
}

/// Backward, the op is called as candle calls it, without candle's own sums around it (`dblaunch bench layers` has those
/// in).
fn measure_op(
    pass: &str,
    x: &Tensor,
    forward: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    op: &impl CustomOp1,
    operations: usize,
) -> Result<(Duration, f64)> {
    let factor = match pass {
        "forward" => return Ok((best(|| forward(x).map(drop))?, operations as f64)),
        "data" => 1.0,
        "backward" => 2.0,
        other => bail!("no such pass: {other}"),
    };
    let y = forward(x)?;
    let dy = y.affine(0.5, 0.25)?;
    Ok((best(|| op.bwd(x, &y, &dy).map(drop))?, operations as f64 * factor))
}

fn values<T: Element>(count: usize) -> Vec<T> {
    (0..count).map(|i| T::from_f32((i * 7919 % 2003) as f32 / 1001.0 - 1.0)).collect()
}

fn numbers<T: Element>(shape: &[usize]) -> candle_core::Result<Tensor> {
    Tensor::from_vec(values::<T>(shape.iter().product()), shape, &Device::Cpu)
}

fn weight<T: Element>(shape: &[usize], trainable: bool) -> candle_core::Result<WeightRef> {
    WeightRef::alone("weight", shape, &values::<T>(shape.iter().product()), trainable)
}

static CPU_TIME: AtomicBool = AtomicBool::new(false);

/// A clock that only runs forward: this thread's time on a core if asked for, which Linux tells, or the time of day.
fn now() -> Result<Duration> {
    static START: OnceLock<Instant> = OnceLock::new();
    if !CPU_TIME.load(Relaxed) {
        return Ok(START.get_or_init(Instant::now).elapsed());
    }
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").context("--cpu-time needs Linux")?;
    let nanoseconds = text.split_whitespace().next().context("an empty schedstat")?;
    Ok(Duration::from_nanos(nanoseconds.parse()?))
}

/// The best of several runs, after one that warms up; short ones are measured many at a time.
fn best(run: impl Fn() -> candle_core::Result<()>) -> Result<Duration> {
    const ENOUGH: Duration = Duration::from_millis(300);
    // The time on a core is counted in ticks of some milliseconds.
    let batch = Duration::from_millis(if CPU_TIME.load(Relaxed) { 200 } else { 20 });
    run()?;
    let time = |count: u32| -> Result<Duration> {
        let start = now()?;
        for _ in 0..count {
            run()?;
        }
        Ok(now()? - start)
    };
    let (mut count, begin) = (1, Instant::now());
    while time(count)? < batch && begin.elapsed() < 4 * ENOUGH {
        count *= 2;
    }
    let (mut total, mut best, mut runs) = (Duration::ZERO, Duration::MAX, 0);
    while runs < 3 || (total < ENOUGH && begin.elapsed() < 10 * ENOUGH) {
        let spent = time(count)?;
        (total, best, runs) = (total + spent, best.min(spent), runs + 1);
    }
    Ok(best / count)
}

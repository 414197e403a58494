//! Kernels whose limit is memory, beside copies on the same GPU: norms, the optimizer, sums, and what joins the large ops, at
//! the shapes of SD 1.5. One JSON line for each: microseconds, and the share of a copy's bytes a second, counted with
//! the bytes that must be moved at least; and attention. (Small tensors stay in the second-level cache, and launching takes
//! long beside them: so each is also compared with a copy that moves as much.)

use anyhow::{Result, ensure};
use candle_core::DType;
use serde_json::{Value, json};

use super::attention::attention;
use super::gpu::speed;
use super::numbers;
use crate::device::cuda::{DeviceMemory, Gpu};
use crate::kernels::glue::moves::transpose;
use crate::kernels::glue::{add, geglu, geglu_backward};
use crate::kernels::norms::{Backward, Forward, GroupNorm, LayerNorm};
use crate::kernels::optimizer::{Grads, Rounded};
use crate::kernels::reduce::sum_of_squares;
use crate::optim::{AdamW, DeviceWeights, RecordLayout, StateKind, table_words, tables_at};
use crate::zero::Placement;

const DTYPE: DType = DType::BF16;
/// Launches in a row, so that what a launch takes is hidden where it can be.
const IN_A_ROW: usize = 20;
/// Of the copy.
const BYTES: usize = 128 << 20;
/// What operands are filled with, again and again.
const PATTERN: usize = 4 << 20;
/// What norms and the optimizer shall reach of a copy that moves as much.
const AIM: f64 = 0.85;
/// Records that the optimizer updates, each of as many elements as in a run.
const RECORDS: usize = 4;

/// Prints all of them for the first GPU, of whose memory at most `limit` bytes are used.
pub fn kernels(limit: usize) -> Result<()> {
    let gpu = Gpu::open(0, Some(limit))?;
    println!("{}", json!({"name": gpu.card().name, "capability": gpu.card().capability}));
    measured(&gpu)?.iter().chain(&attention(&gpu)?).for_each(|line| println!("{line}"));
    Ok(())
}

fn measured(gpu: &Gpu) -> Result<Vec<Value>> {
    let (from, to) = (gpu.computing().alloc_zeroed(BYTES, "a copy")?, gpu.computing().alloc(BYTES, "a copy")?);
    let least = (f64::INFINITY, String::new());
    let (halves, floats) = (numbers::halves(gpu, PATTERN / 2)?, numbers::floats(gpu, PATTERN / 4)?);
    let mut meter = Meter { gpu, from, to, halves, floats, copy: 0.0, least, lines: Vec::new() };
    meter.copy = meter.copy(BYTES)?;
    meter.lines.push(json!({"copy_bytes_per_second": meter.copy}));
    for batch in [1, 4, 16] {
        for (channels, side) in [(320, 64), (960, 64), (640, 32), (1280, 16), (1280, 8)] {
            meter.group_norm(batch, channels, side * side)?;
        }
        for (tokens, width) in [(4096, 320), (1024, 640), (256, 1280)] {
            meter.layer_norm(batch * tokens, width)?;
            meter.feed_forward(batch * tokens, 4 * width)?;
            meter.moves(batch, tokens, width)?;
        }
    }
    meter.optimizer()?;
    let (least, at) = meter.least;
    meter.lines.push(json!({
        "aim": format!("norms and AdamW move {AIM} of what a copy of as much does, at least"),
        "least": least, "at": at, "held": least >= AIM,
    }));
    Ok(meter.lines)
}

struct Meter<'a> {
    gpu: &'a Gpu,
    /// What is copied.
    from: DeviceMemory,
    to: DeviceMemory,
    /// [`PATTERN`] bytes of bf16 and of f32.
    halves: DeviceMemory,
    floats: DeviceMemory,
    /// Bytes a second, read and written, of a large copy.
    copy: f64,
    /// Of what has an aim: the smallest share of a copy of as much, and whose it is.
    least: (f64, String),
    lines: Vec<Value>,
}

impl Meter<'_> {
    /// Zeros.
    fn memory(&self, bytes: usize) -> Result<DeviceMemory> {
        self.gpu.computing().alloc_zeroed(bytes, "a benchmark")
    }

    /// bf16 numbers about zero: of zeros roots and quotients take another way.
    fn halves(&self, bytes: usize) -> Result<DeviceMemory> {
        self.filled(&self.halves, bytes)
    }

    /// The same in f32.
    fn floats(&self, bytes: usize) -> Result<DeviceMemory> {
        self.filled(&self.floats, bytes)
    }

    fn filled(&self, pattern: &DeviceMemory, bytes: usize) -> Result<DeviceMemory> {
        let memory = self.memory(bytes)?;
        for at in (0..bytes).step_by(PATTERN) {
            self.gpu.computing().copy(pattern, 0..PATTERN.min(bytes - at), &memory, at)?;
        }
        Ok(memory)
    }

    /// Bytes a second, read and written, of a copy of so many.
    fn copy(&self, bytes: usize) -> Result<f64> {
        let stream = self.gpu.computing();
        speed(stream, 2 * bytes * IN_A_ROW, || {
            (0..IN_A_ROW).try_for_each(|_| stream.copy(&self.from, 0..bytes, &self.to, 0).map(drop))
        })
    }

    /// Measures launches that move `bytes` each.
    fn measure(&mut self, kernel: &str, shape: String, bytes: usize, launch: impl Fn() -> Result<()>) -> Result<()> {
        launch()?;
        let speed = speed(self.gpu.computing(), bytes * IN_A_ROW, || (0..IN_A_ROW).try_for_each(|_| launch()))?;
        let microseconds = bytes as f64 / speed * 1e6;
        let as_much = if bytes < 2 * BYTES { self.copy(bytes / 2)? } else { self.copy };
        let of_as_much = speed / as_much;
        if (kernel.contains("norm") || kernel.starts_with("adamw")) && of_as_much < self.least.0 {
            self.least = (of_as_much, format!("{kernel}, {shape}"));
        }
        self.lines.push(json!({
            "kernel": kernel, "shape": shape, "microseconds": microseconds,
            "of_copy": speed / self.copy, "of_copy_of_as_much": of_as_much,
        }));
        Ok(())
    }

    fn group_norm(&mut self, batch: usize, channels: usize, pixels: usize) -> Result<()> {
        let norm = GroupNorm { dtype: DTYPE, batch, channels, groups: 32, pixels, eps: 1e-5, silu: true };
        let bytes = 2 * batch * channels * pixels;
        let forward = |gpu: &Gpu, on| norm.forward(gpu, on);
        let backward = |gpu: &Gpu, on| norm.backward(gpu, on);
        let shape = format!("{batch}x{channels}x{pixels} bf16");
        self.norm("group norm", shape, bytes, channels, norm.moments_bytes(), &forward, &backward)
    }

    fn layer_norm(&mut self, rows: usize, width: usize) -> Result<()> {
        let norm = LayerNorm { dtype: DTYPE, rows, width, eps: 1e-5 };
        let forward = |gpu: &Gpu, on| norm.forward(gpu, on);
        let backward = |gpu: &Gpu, on| norm.backward(gpu, on);
        let shape = format!("{rows}x{width} bf16");
        self.norm("layer norm", shape, 2 * rows * width, width, norm.moments_bytes(), &forward, &backward)
    }

    #[allow(clippy::too_many_arguments, reason = "what the two norms differ in")]
    fn norm(
        &mut self,
        name: &str,
        shape: String,
        bytes: usize,
        weights: usize,
        moments: usize,
        forward: &dyn Fn(&Gpu, Forward) -> Result<()>,
        backward: &dyn Fn(&Gpu, Backward) -> Result<()>,
    ) -> Result<()> {
        let gpu = self.gpu;
        let [x, dy, y] = [self.halves(bytes)?, self.halves(bytes)?, self.memory(bytes)?];
        let [gamma, beta] = [self.halves(2 * weights)?, self.halves(2 * weights)?];
        let [dgamma, dbeta] = [self.memory(4 * weights)?, self.memory(4 * weights)?];
        let moments = self.memory(moments)?;
        let (x, gamma, beta) = (x.address(), gamma.address(), beta.address());
        let on = Forward { x, gamma, beta, y: y.address(), moments: moments.address() };
        self.measure(&format!("{name} forward"), shape.clone(), 2 * bytes, || forward(gpu, on))?;
        let on = Backward {
            x,
            dy: dy.address(),
            gamma,
            beta,
            moments: moments.address(),
            dx: y.address(),
            dgamma: dgamma.address(),
            dbeta: dbeta.address(),
        };
        self.measure(&format!("{name} backward"), shape, 3 * bytes, || backward(gpu, on))
    }

    fn feed_forward(&mut self, rows: usize, width: usize) -> Result<()> {
        let (gpu, bytes, shape) = (self.gpu, 2 * rows * width, format!("{rows}x{width} bf16"));
        let [x, y, dx] = [self.halves(2 * bytes)?, self.halves(bytes)?, self.memory(2 * bytes)?];
        let (x, y, dx) = (x.address(), y.address(), dx.address());
        self.measure("geglu forward", shape.clone(), 3 * bytes, || geglu(gpu, DTYPE, x, y, rows, width))?;
        self.measure("geglu backward", shape, 5 * bytes, || geglu_backward(gpu, DTYPE, x, y, dx, rows, width))
    }

    fn moves(&mut self, batch: usize, tokens: usize, width: usize) -> Result<()> {
        let (gpu, count) = (self.gpu, batch * tokens * width);
        let [a, b, y] = [self.halves(2 * count)?, self.halves(2 * count)?, self.memory(2 * count)?];
        let (a, b, y) = (a.address(), b.address(), y.address());
        let shape = format!("{batch}x{tokens}x{width} bf16");
        self.measure("add", shape.clone(), 6 * count, || add(gpu, DTYPE, a, b, y, count))?;
        self.measure("transpose", shape, 4 * count, || transpose(gpu, DTYPE, a, y, batch, tokens, width))
    }

    fn optimizer(&mut self) -> Result<()> {
        let gpu = self.gpu;
        let piece = Placement::DEVICE.optimizer_piece(true);
        let count = piece * RECORDS;
        let words = table_words();
        let books = gpu.write(bytemuck::cast_slice(&words), "code books")?;
        let tables = tables_at(books.address());
        let adam = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
        let [weights, grads] = [self.floats(4 * count)?, self.floats(4 * count)?];
        let [copy, overflow, total] = [self.memory(2 * count)?, self.memory(4)?, self.memory(8)?];
        for (name, kind, bytes, rounded) in [
            ("adamw", StateKind::F32, 28, false),
            ("adamw with a bf16 copy", StateKind::F32, 30, true),
            ("adamw8", StateKind::Bits8, 16, false),
            ("adamw8 with a bf16 copy", StateKind::Bits8, 18, true),
        ] {
            let layout = RecordLayout::new(kind, 0, piece, piece);
            let records = self.memory(layout.bytes() * RECORDS)?;
            let update = |record: usize| {
                let at = |memory: &DeviceMemory, size: usize| memory.address().at(size * record * piece);
                let rounded = if rounded { Rounded::Bf16(at(&copy, 2)) } else { Rounded::None };
                let record = records.address().at(record * layout.bytes());
                let (w, g) = (DeviceWeights::F32(at(&weights, 4)), Grads::F32(at(&grads, 4)));
                adam.launch_chunk(gpu, &tables, 1, 1e-5, 1.0, &layout, record, w, rounded, g, overflow.address())
            };
            let shape = format!("{RECORDS} records of {piece} f32");
            self.measure(name, shape, bytes * count, || (0..RECORDS).try_for_each(update))?;
        }
        let sum = || sum_of_squares(gpu, DType::F32, grads.address(), count, total.address());
        self.measure("sum of squares", format!("{count} f32"), 4 * count, sum)?;
        ensure!(gpu.read(&overflow)? == [0; 4], "a gradient was not finite");
        Ok(())
    }
}

//! What joins the large ops (`kernels/glue*`): one number at a time here, moves in [`moves`], sums in [`sums`]. Every op of
//! `ops` that is no norm, product, convolution or attention has its two directions among them, and the objective. All operands of a call have
//! one dtype unless two are named; `count` is in elements; a result may be one of the operands where every element of it
//! depends on the same element of that operand alone.

pub mod moves;
pub mod sums;
#[cfg(all(test, any(feature = "cuda", feature = "emulate")))]
mod tests;

use anyhow::{Result, bail};
use candle_core::DType;

use super::sizes::{aligned, line, small, width};
use super::{Address, Arg, Family, Grid, Launcher, suffix};

/// Functions of one number, as `ops::Activation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    Silu,
    Gelu,
    QuickGelu,
}

impl Function {
    fn name(self) -> &'static str {
        match self {
            Function::Silu => "silu",
            Function::Gelu => "gelu",
            Function::QuickGelu => "quick_gelu",
        }
    }
}

const THREADS: u32 = 256;

/// Launches a kernel over `count` elements, of which a thread takes `pack`.
fn launch(launcher: &dyn Launcher, kernel: &str, count: usize, pack: usize, args: &[Arg]) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    launcher.launch(Family::Glue, kernel, line(count.div_ceil(pack), THREADS)?, args)
}

/// One whose arguments are addresses, the count, numbers, and whether the addresses are aligned; all of one dtype.
fn pointwise(
    launcher: &dyn Launcher,
    kernel: &str,
    dtype: DType,
    count: usize,
    addresses: &[Address],
    numbers: &[f32],
) -> Result<()> {
    let mut args: Vec<Arg> = addresses.iter().map(|&address| address.into()).collect();
    args.push((count as u64).into());
    args.extend(numbers.iter().map(|&number| Arg::F32(number)));
    args.push(i32::from(aligned(addresses)).into());
    launch(launcher, &format!("{kernel}_{}", suffix(dtype)?), count, width(dtype), &args)
}

/// y = f(x).
pub fn activation(
    launcher: &dyn Launcher,
    function: Function,
    dtype: DType,
    x: Address,
    y: Address,
    count: usize,
) -> Result<()> {
    pointwise(launcher, function.name(), dtype, count, &[x, y], &[])
}

/// dx = dy f'(x).
pub fn activation_backward(
    launcher: &dyn Launcher,
    function: Function,
    dtype: DType,
    x: Address,
    dy: Address,
    dx: Address,
    count: usize,
) -> Result<()> {
    pointwise(launcher, &format!("{}_backward", function.name()), dtype, count, &[x, dy, dx], &[])
}

/// y = a + b.
pub fn add(launcher: &dyn Launcher, dtype: DType, a: Address, b: Address, y: Address, count: usize) -> Result<()> {
    pointwise(launcher, "add", dtype, count, &[a, b, y], &[])
}

/// y = factor x + offset.
pub fn affine(
    launcher: &dyn Launcher,
    dtype: DType,
    x: Address,
    y: Address,
    count: usize,
    factor: f32,
    offset: f32,
) -> Result<()> {
    pointwise(launcher, "affine", dtype, count, &[x, y], &[factor, offset])
}

/// Every element of y becomes `value`.
pub fn fill(launcher: &dyn Launcher, dtype: DType, y: Address, count: usize, value: f32) -> Result<()> {
    pointwise(launcher, "fill", dtype, count, &[y], &[value])
}

/// y = factor x in another dtype (or the same one). Not in place.
pub fn cast(
    launcher: &dyn Launcher,
    (from, x): (DType, Address),
    (to, y): (DType, Address),
    count: usize,
    factor: f32,
) -> Result<()> {
    convert(launcher, "cast", (from, x), (to, y), count, factor)
}

/// y += factor x, the sum in f32 and rounded once.
pub fn accumulate(
    launcher: &dyn Launcher,
    (from, x): (DType, Address),
    (to, y): (DType, Address),
    count: usize,
    factor: f32,
) -> Result<()> {
    convert(launcher, "accumulate", (from, x), (to, y), count, factor)
}

fn convert(
    launcher: &dyn Launcher,
    what: &str,
    (from, x): (DType, Address),
    (to, y): (DType, Address),
    count: usize,
    factor: f32,
) -> Result<()> {
    let args = [x.into(), y.into(), (count as u64).into(), factor.into(), i32::from(aligned(&[x, y])).into()];
    let pack = width(from).min(width(to));
    launch(launcher, &format!("{what}_{}_{}", suffix(from)?, suffix(to)?), count, pack, &args)
}

/// A grid for kernels that take a row's packs along x and rows along y, in turns.
fn rows_grid(rows: usize, width: usize, pack: usize) -> Result<Grid> {
    let threads = super::sizes::threads(width.div_ceil(pack), 32, THREADS);
    let across = width.div_ceil(pack).div_ceil(threads as usize);
    Ok(Grid { blocks: [small(across)?, small(rows.min(65_535))?, 1], threads, shared: 0 })
}

/// x (rows, 2 width) -> y (rows, width): the first half times gelu of the second.
pub fn geglu(
    launcher: &dyn Launcher,
    dtype: DType,
    x: Address,
    y: Address,
    rows: usize,
    row_width: usize,
) -> Result<()> {
    gated(launcher, "geglu", dtype, &[x, y], rows, row_width)
}

/// dx (rows, 2 width) of x and dy (rows, width).
pub fn geglu_backward(
    launcher: &dyn Launcher,
    dtype: DType,
    x: Address,
    dy: Address,
    dx: Address,
    rows: usize,
    row_width: usize,
) -> Result<()> {
    gated(launcher, "geglu_backward", dtype, &[x, dy, dx], rows, row_width)
}

fn gated(
    launcher: &dyn Launcher,
    kernel: &str,
    dtype: DType,
    addresses: &[Address],
    rows: usize,
    row_width: usize,
) -> Result<()> {
    if rows * row_width == 0 {
        return Ok(());
    }
    let whole = aligned(addresses) && row_width.is_multiple_of(width(dtype));
    let mut args: Vec<Arg> = addresses.iter().map(|&address| address.into()).collect();
    args.extend([small(rows)?.into(), small(row_width)?.into(), Arg::I32(whole.into())]);
    let grid = rows_grid(rows, row_width, width(dtype))?;
    launcher.launch(Family::Glue, &format!("{kernel}_{}", suffix(dtype)?), grid, &args)
}

/// Rows of a micro-batch whose loss is wanted (`diffusion::loss_and_gradient`): of each, `predicted` numbers of the dtype, of
/// which the first `used` have an f32 target.
#[derive(Clone, Copy, Debug)]
pub struct Objective {
    pub dtype: DType,
    pub rows: usize,
    pub used: usize,
    pub predicted: usize,
}

impl Objective {
    /// What a row's differences are multiplied with; an f64 of each row is expected at `factors`.
    pub fn factor(&self, weight: f64, accumulation: usize) -> f64 {
        2.0 * weight / (self.used as f64 * accumulation.max(1) as f64)
    }

    /// The gradient by the prediction times `scale`, in the dtype; and each row's mean squared error, f64.
    #[allow(clippy::too_many_arguments, reason = "three operands, two results, and a number")]
    pub fn gradient(
        &self,
        launcher: &dyn Launcher,
        prediction: Address,
        target: Address,
        factors: Address,
        scale: f32,
        gradient: Address,
        row_mse: Address,
    ) -> Result<()> {
        if self.rows * self.used == 0 {
            return Ok(());
        }
        let args = [
            prediction.into(),
            target.into(),
            factors.into(),
            scale.into(),
            gradient.into(),
            row_mse.into(),
            small(self.used)?.into(),
            small(self.predicted)?.into(),
        ];
        let grid = Grid { blocks: [small(self.rows)?, 1, 1], threads: THREADS, shared: 0 };
        launcher.launch(Family::Glue, &format!("loss_gradient_{}", suffix(self.dtype)?), grid, &args)
    }
}

/// The name's end of kernels that only move elements.
fn bytes(dtype: DType) -> Result<usize> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Ok(dtype.size_in_bytes()),
        other => bail!("no kernels for {}", other.as_str()),
    }
}

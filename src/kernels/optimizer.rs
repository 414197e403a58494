//! AdamW on the device (`kernels/optimizer*`): the bits of `optim` on the CPU. What a record looks like, the code books and
//! the numbers of an update are known there (`optim::OnDevice`); here are addresses.

use anyhow::Result;

use super::sizes::{PACK, line, small};
use super::{Address, Arg, Family, Grid, Launcher};

/// Elements that share a scale.
const BLOCK: usize = 256;

/// One update's numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coefficients {
    pub decay: f32,
    pub beta1: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    pub correction2_root: f32,
    pub epsilon: f32,
    pub step_size: f32,
    /// What gradients are multiplied by.
    pub grad_scale: f32,
}

/// The draws of stochastic rounding: an update's two keys, and the element in the bucket of the first one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Draws {
    pub first: u32,
    pub second: u32,
    pub element: u32,
}

/// The master weights that are updated.
#[derive(Clone, Copy, Debug)]
pub enum Weights {
    F32(Address),
    Bf16 { values: Address, draws: Draws },
}

/// Their half-precision copy, rounded to nearest even.
#[derive(Clone, Copy, Debug)]
pub enum Rounded {
    None,
    Bf16(Address),
    F16(Address),
}

/// Gradients, as they were accumulated.
#[derive(Clone, Copy, Debug)]
pub enum Grads {
    F32(Address),
    Bf16(Address),
}

/// The code books on the device: the 256 f32 of the signed book, those of the unsigned one, and the two tables (u32) that
/// find codes. `runs` are the tables' lengths, `lowest` the bits of the smallest magnitudes they know; signed first.
#[derive(Clone, Copy, Debug)]
pub struct Tables {
    pub at: Address,
    pub runs: [u32; 2],
    pub lowest: [u32; 2],
}

impl Tables {
    fn bytes(&self) -> usize {
        4 * (2 * BLOCK + self.runs[0] as usize + self.runs[1] as usize)
    }

    fn args(&self) -> [Arg; 5] {
        let ([m_runs, v_runs], [m_lowest, v_lowest]) = (self.runs, self.lowest);
        [self.at.into(), m_runs.into(), m_lowest.into(), v_runs.into(), v_lowest.into()]
    }

    /// The numbers of a book.
    fn book(&self, signed: bool) -> Address {
        self.at.at(if signed { 0 } else { 4 * BLOCK })
    }
}

/// A run of elements' moments.
#[derive(Clone, Copy, Debug)]
pub enum Moments<'a> {
    F32 {
        m: Address,
        v: Address,
    },
    /// A code an element and a scale a block of 256; the addresses of codes are multiples of 4.
    Bits8 {
        m: Address,
        v: Address,
        m_absmax: Address,
        v_absmax: Address,
        tables: &'a Tables,
    },
}

/// Updates `elements` elements in one pass. The u32 at `overflow` becomes 1 if a gradient is not finite once it is scaled;
/// it is left alone otherwise.
#[allow(clippy::too_many_arguments, reason = "what a step is made of; a struct would only repeat the names")]
pub fn adamw(
    launcher: &dyn Launcher,
    c: &Coefficients,
    elements: usize,
    moments: Moments,
    weights: Weights,
    rounded: Rounded,
    grads: Grads,
    overflow: Address,
) -> Result<()> {
    if elements == 0 {
        return Ok(());
    }
    let (master, weights, draws) = match weights {
        Weights::F32(values) => ("f32", values, Draws::default()),
        Weights::Bf16 { values, draws } => ("bf16", values, draws),
    };
    let (copied, copy) = match rounded {
        Rounded::None => ("none", Address::NULL),
        Rounded::Bf16(copy) => ("bf16", copy),
        Rounded::F16(copy) => ("f16", copy),
    };
    let (added, grads) = match grads {
        Grads::F32(values) => ("f32", values),
        Grads::Bf16(values) => ("bf16", values),
    };
    // A thread moves four elements at once, whatever they are.
    let plain = match moments {
        Moments::F32 { m, v } => [m, v],
        Moments::Bits8 { .. } => [Address::NULL; 2],
    };
    let whole = [weights, copy, grads, plain[0], plain[1]].iter().all(|address| address.aligned(PACK as u64));
    let update = [
        c.decay.into(),
        c.beta1.into(),
        c.one_minus_beta1.into(),
        c.beta2.into(),
        c.one_minus_beta2.into(),
        c.correction2_root.into(),
        c.epsilon.into(),
        c.step_size.into(),
        c.grad_scale.into(),
        draws.first.into(),
        draws.second.into(),
        draws.element.into(),
        Arg::I32(whole.into()),
        overflow.into(),
    ];
    let operands = [weights.into(), copy.into(), grads.into()];
    let end = format!("{master}_{copied}_{added}");
    match moments {
        Moments::F32 { m, v } => {
            let args = [&operands[..], &[m.into(), v.into(), (elements as u64).into()], &update].concat();
            launcher.launch(Family::Optimizer, &format!("adamw_{end}"), line(elements.div_ceil(4), 256)?, &args)
        }
        Moments::Bits8 { m, v, m_absmax, v_absmax, tables } => {
            let state = [m.into(), v.into(), m_absmax.into(), v_absmax.into(), small(elements)?.into()];
            let args = [&operands[..], &state, &tables.args(), &update].concat();
            // Every block brings the tables first, so there are no more of them than run at once.
            const WARPS: usize = 32;
            let most = launcher.multiprocessors() as usize;
            let blocks = elements.div_ceil(BLOCK).div_ceil(WARPS).min(most);
            let shared = small(tables.bytes())?;
            let grid = Grid { blocks: [small(blocks)?, 1, 1], threads: 32 * WARPS as u32, shared };
            launcher.launch(Family::Optimizer, &format!("adamw8_{end}"), grid, &args)
        }
    }
}

/// `codes` (bytes) and `absmax` (f32, one a block of 256) for `count` f32 at `values`, all of which are finite.
pub fn quantize(
    launcher: &dyn Launcher,
    tables: &Tables,
    signed: bool,
    values: Address,
    codes: Address,
    absmax: Address,
    count: usize,
) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let args = [&[values.into(), codes.into(), absmax.into(), small(count)?.into()][..], &tables.args()].concat();
    let grid = Grid { shared: small(tables.bytes())?, ..line(count.div_ceil(BLOCK) * 32, 256)? };
    let book = if signed { "signed" } else { "unsigned" };
    launcher.launch(Family::Optimizer, &format!("quantize_{book}"), grid, &args)
}

/// The f32 that `codes` and `absmax` stand for.
pub fn dequantize(
    launcher: &dyn Launcher,
    tables: &Tables,
    signed: bool,
    codes: Address,
    absmax: Address,
    values: Address,
    count: usize,
) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let args = [codes.into(), absmax.into(), values.into(), small(count)?.into(), tables.book(signed).into()];
    launcher.launch(Family::Optimizer, "dequantize_f32", line(count, 256)?, &args)
}

//! Attention without the score matrix on the device (`kernels/attention.cu`): launch configurations and launches. What
//! it computes is what `ops::attention` says; f16 and bf16 go over tensor cores, f32 is exact.
//!
//! Note: the backward computes the probabilities twice, once by queries and once by keys, so that every sum has one
//! place and one order: same bits every time.

use anyhow::{Result, bail, ensure};
use candle_core::DType;

use super::{Address, Arg, Family, Grid, Launcher, suffix};

/// Where the elements of (B, tokens, heads, D) lie: steps in elements. Within a head they follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strides {
    pub batch: usize,
    pub token: usize,
    pub head: usize,
}

/// Sizes and layout of one attention. q, y and their gradients lie alike, so do k, v and theirs.
#[derive(Clone, Debug)]
pub struct Attention {
    pub dtype: DType,
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub head_width: usize,
    /// Query i sees keys 0..=i.
    pub causal: bool,
    pub query_strides: Strides,
    pub key_strides: Strides,
}

/// What the backward starts from.
#[derive(Clone, Copy, Debug)]
pub struct Backward {
    pub q: Address,
    pub k: Address,
    pub v: Address,
    /// The forward's result and its [log sums](Attention::log_sums).
    pub y: Address,
    pub log_sums: Address,
    pub dy: Address,
    /// As for the forward.
    pub lengths: Option<Address>,
}

/// How the kernels for one width of head are launched; kernels/attention.cu has the same numbers.
struct Tiles {
    /// The kernel's name has this width; heads may be narrower.
    width: usize,
    /// Rows of a block and of the tiles that it goes over: forward, dq, and dk with dv.
    forward: (usize, usize),
    queries: (usize, usize),
    keys: (usize, usize),
    /// Tiles on the way at once in the backward.
    stages: usize,
    /// Whether dk and dv have blocks of their own.
    split: bool,
}

const fn halves(width: usize, forward: (usize, usize), back: (usize, usize), stages: usize) -> Tiles {
    Tiles { width, forward, queries: back, keys: back, stages, split: width > 160 }
}

const HALVES: [Tiles; 7] = [
    halves(48, (128, 64), (64, 64), 2),
    halves(64, (128, 64), (64, 64), 2),
    halves(80, (64, 64), (64, 32), 2),
    halves(96, (64, 64), (64, 32), 2),
    halves(128, (64, 64), (64, 32), 2),
    halves(160, (64, 32), (64, 32), 1),
    halves(256, (64, 32), (32, 32), 1),
];

const PLAIN: [Tiles; 4] = [
    Tiles { width: 64, forward: (32, 32), queries: (32, 32), keys: (32, 32), stages: 1, split: false },
    Tiles { width: 128, forward: (32, 32), queries: (32, 16), keys: (32, 16), stages: 1, split: false },
    Tiles { width: 256, forward: (32, 16), queries: (16, 8), keys: (16, 8), stages: 1, split: false },
    // Forward only.
    Tiles { width: 512, forward: (16, 8), queries: (0, 0), keys: (0, 0), stages: 1, split: false },
];

/// Threads of a block of the kernels in f32.
const PLAIN_THREADS: u32 = 128;
/// Warps of a block of sums of dy * y, one for each query.
const DELTA_WARPS: usize = 8;
/// The widest head of a backward.
pub const WIDEST: usize = 256;
/// The widest head of a forward.
pub const WIDEST_FORWARD: usize = 512;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kernel {
    Forward,
    Queries,
    Keys,
}

impl Attention {
    /// q (B, S, heads*D) and k, v (B, T, heads*D), contiguous, as `ops::attention` takes them.
    pub fn contiguous(
        dtype: DType,
        [batch, queries, keys]: [usize; 3],
        heads: usize,
        head_width: usize,
        causal: bool,
    ) -> Self {
        let token = heads * head_width;
        let strides = |tokens: usize| Strides { batch: tokens * token, token, head: head_width };
        Attention {
            dtype,
            batch,
            queries,
            keys,
            heads,
            head_width,
            causal,
            query_strides: strides(queries),
            key_strides: strides(keys),
        }
    }

    /// Elements of log2 of the softmax's denominators, (B, heads, S) in f32, that the forward leaves for the backward.
    pub fn log_sums(&self) -> usize {
        self.batch * self.heads * self.queries
    }

    /// y and the log sums. `lengths` are B numbers (i32): of row b only the first `lengths[b]` keys exist; without them
    /// all do. A query that may see no key gets zeros.
    ///
    /// Errors if heads are wider than [`WIDEST_FORWARD`] or the device has no such dtype.
    pub fn forward(
        &self,
        launcher: &dyn Launcher,
        [q, k, v]: [Address; 3],
        lengths: Option<Address>,
        y: Address,
        log_sums: Address,
    ) -> Result<()> {
        if self.nothing()? {
            return Ok(());
        }
        let arrays = [q, k, v, y, log_sums, lengths.unwrap_or(Address::NULL)];
        self.launch(launcher, Kernel::Forward, &arrays, &[q, k, v, y])
    }

    /// dq, dk and dv, which are overwritten.
    ///
    /// Errors if heads are wider than [`WIDEST`], the device has no such dtype, or there is no scratch for B * heads *
    /// S floats.
    pub fn backward(&self, launcher: &dyn Launcher, given: Backward, [dq, dk, dv]: [Address; 3]) -> Result<()> {
        if self.nothing()? {
            return Ok(());
        }
        let Backward { q, k, v, y, log_sums, dy, lengths } = given;
        let delta = launcher.scratch(self.log_sums() * size_of::<f32>())?;
        let grid = Grid {
            blocks: [self.queries.div_ceil(DELTA_WARPS) as u32, self.heads as u32, self.batch as u32],
            threads: DELTA_WARPS as u32 * 32,
            shared: 0,
        };
        let mut args: Vec<Arg> = [y, dy, delta.address()].map(Arg::Address).to_vec();
        self.push_sizes(&mut args, self.whole(&[y, dy]));
        launcher.launch(Family::Attention, &format!("attention_delta_{}", suffix(self.dtype)?), grid, &args)?;
        let lengths = lengths.unwrap_or(Address::NULL);
        let given = [q, k, v, dy, log_sums, delta.address(), lengths];
        let by = |results: &[Address]| [&given[..], results].concat();
        self.launch(launcher, Kernel::Queries, &by(&[dq]), &[q, k, v, dy, dq])?;
        self.launch(launcher, Kernel::Keys, &by(&[dk, dv]), &[q, k, v, dy, dk, dv])
    }

    /// Whether there is nothing to compute; errors for sizes that kernels do not take.
    fn nothing(&self) -> Result<bool> {
        let most = i32::MAX as usize;
        ensure!(
            self.queries <= most && self.keys <= most && self.heads <= 65535 && self.batch <= 65535,
            "attention of {} rows of {} queries, {} keys and {} heads is too large for a launch",
            self.batch,
            self.queries,
            self.keys,
            self.heads
        );
        Ok(self.batch == 0 || self.heads == 0 || self.head_width == 0 || self.queries == 0 || self.keys == 0)
    }

    fn launch(&self, launcher: &dyn Launcher, kernel: Kernel, arrays: &[Address], vectors: &[Address]) -> Result<()> {
        let (name, grid) = self.configuration(kernel, launcher.capability())?;
        let mut args: Vec<Arg> = arrays.iter().map(|&a| Arg::Address(a)).collect();
        self.push_sizes(&mut args, self.whole(vectors));
        launcher.launch(Family::Attention, &name, grid, &args)
    }

    /// Rows are whole numbers of 16 bytes at such addresses, so that they can be copied so.
    fn whole(&self, arrays: &[Address]) -> bool {
        let size = self.dtype.size_in_bytes();
        let (q, k) = (self.query_strides, self.key_strides);
        let steps = [self.head_width, q.batch, q.token, q.head, k.batch, k.token, k.head];
        steps.iter().all(|step| (step * size).is_multiple_of(16)) && arrays.iter().all(|a| a.aligned(16))
    }

    fn push_sizes(&self, args: &mut Vec<Arg>, whole: bool) {
        let (q, k) = (self.query_strides, self.key_strides);
        let scale = (std::f64::consts::LOG2_E / (self.head_width as f64).sqrt()) as f32;
        args.extend([self.queries, self.keys, self.head_width, q.token, q.head].map(|n| Arg::I32(n as i32)));
        args.push(Arg::I64(q.batch as i64));
        args.extend([k.token, k.head].map(|n| Arg::I32(n as i32)));
        args.extend([Arg::I64(k.batch as i64), Arg::F32(scale), Arg::I32(self.causal.into()), Arg::I32(whole.into())]);
    }

    /// The kernel's name and how it is launched.
    fn configuration(&self, kernel: Kernel, capability: u32) -> Result<(String, Grid)> {
        let dtype = suffix(self.dtype)?;
        if self.dtype == DType::BF16 && capability < 80 {
            bail!(
                "attention in bf16 needs a device of compute capability 8.0; this one has {}",
                capability as f32 / 10.0
            );
        }
        let half = self.dtype != DType::F32;
        let on_tensor_cores = half && self.head_width <= WIDEST;
        let tiles: &[Tiles] = if on_tensor_cores { &HALVES } else { &PLAIN };
        let widest = if kernel == Kernel::Forward { WIDEST_FORWARD } else { WIDEST };
        let tiles = match tiles.iter().find(|t| t.width >= self.head_width) {
            Some(tiles) if self.head_width <= widest => tiles,
            _ => bail!("attention: heads are at most {widest} wide, not {}", self.head_width),
        };
        let (name, (rows, other), tokens) = match kernel {
            Kernel::Forward => ("forward", tiles.forward, self.queries),
            Kernel::Queries => ("queries", tiles.queries, self.queries),
            Kernel::Keys => ("keys", tiles.keys, self.keys),
        };
        let (threads, shared) = if on_tensor_cores {
            // Warps have 16 rows each, or 32 in the forward's blocks of 128.
            let own = if kernel == Kernel::Forward { rows } else { 2 * rows };
            let stages = if kernel == Kernel::Forward { 1 } else { tiles.stages };
            (if rows == 32 { 64 } else { 128 }, (own + 2 * stages * other) * tiles.width * 2)
        } else {
            let products = rows * (other + 1);
            let (row, floats) = (
                tiles.width + 4,
                match kernel {
                    Kernel::Forward => (rows + other, products),
                    Kernel::Queries => (2 * (rows + other), products),
                    Kernel::Keys => (2 * (rows + other), 2 * other * (rows + 1)),
                },
            );
            (PLAIN_THREADS, (floats.0 * row + floats.1) * 4)
        };
        let split = if kernel == Kernel::Keys && on_tensor_cores && tiles.split { 2 } else { 1 };
        let blocks = [(tokens.div_ceil(rows) * split) as u32, self.heads as u32, self.batch as u32];
        let plain = if on_tensor_cores { "" } else { "plain_" };
        let name = format!("attention_{plain}{name}_{}_{dtype}", tiles.width);
        Ok((name, Grid { blocks, threads, shared: shared as u32 }))
    }
}

#[cfg(test)]
mod tests;

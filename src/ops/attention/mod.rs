//! Attention without the score matrix, forward or backward: blocks of queries against blocks of keys with a running
//! softmax (Dao et al. 2022, "FlashAttention"), everything in f32 between reading and writing the activations' dtype.
//!
//! Note: queries are the lanes. Scores are held transposed, keys by queries, so that maximum, exponential and sum run
//! down the keys in vectors of queries, and keys and values are read as they lie, one number broadcast at a time.

mod backward;
mod forward;
mod gpu;
mod lanes;
mod softmax;
#[cfg(test)]
mod tests;
mod tile;

use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Held, by_dtype, elements, result, tensor};
use super::gpu::{Gpu, cuda_forward, emulated3};
use super::record::apply3;
use super::vector::{PIECE, Real, simd};
use tile::Rows;

/// Which keys a query may see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mask {
    /// Query i sees keys 0..=i.
    pub causal: bool,
    /// Of batch row b only the first `key_lengths[b]` keys exist.
    pub key_lengths: Option<Vec<usize>>,
}

/// q (B, S, heads*D), k and v (B, T, heads*D) -> (B, S, heads*D); softmax(q k^T / sqrt(D)) v per head.
///
/// A query that may see no key at all gets zeros.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: &Mask) -> Result<Tensor> {
    let ((batch, queries, width), (_, keys, _)) = (q.dims3()?, k.dims3()?);
    if k.dims() != [batch, keys, width] || v.dims() != k.dims() || k.dtype() != q.dtype() || v.dtype() != q.dtype() {
        bail!("attention: {:?} of queries, {:?} of keys, {:?} of values", q.shape(), k.shape(), v.shape());
    }
    if heads == 0 || width % heads != 0 || width == 0 {
        bail!("attention: {heads} heads of a width of {width}");
    }
    if queries == 0 || keys == 0 {
        bail!("attention: {queries} queries and {keys} keys");
    }
    let lengths = match &mask.key_lengths {
        None => vec![keys; batch],
        Some(lengths) if lengths.len() == batch && lengths.iter().all(|&l| l <= keys) => lengths.clone(),
        Some(lengths) => bail!("attention: key lengths {lengths:?} for {batch} rows of {keys} keys"),
    };
    let plan = Plan { batch, queries, keys, heads, head_width: width / heads, lengths, causal: mask.causal };
    let op = Attention { plan, log_sums: OnceLock::new(), log_sums_there: OnceLock::new() };
    apply3([q, k, v], op)
}

/// Sizes and mask of one attention.
struct Plan {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    head_width: usize,
    /// Keys that exist, of each batch row.
    lengths: Vec<usize>,
    causal: bool,
}

/// Queries whose scores are worked on together: four vectors of 16.
const QUERY_BLOCK: usize = 64;
/// Keys between two corrections of the running maximum. Scores of a block then take 24 KiB.
const KEY_BLOCK: usize = 96;
/// Bytes of the blocks of queries that one read of the keys and values serves: they should stay in the second-level
/// cache.
const GROUP_BYTES: usize = 3 << 18;

impl Plan {
    /// Elements between one token and the next.
    fn stride(&self) -> usize {
        self.heads * self.head_width
    }

    /// Where head `head` of batch row `row` begins among `tokens` tokens a row.
    fn start(&self, row: usize, head: usize, tokens: usize) -> usize {
        row * tokens * self.stride() + head * self.head_width
    }

    /// Keys that some query in `first..first + count` may see.
    fn visible(&self, row: usize, first: usize, count: usize) -> usize {
        if self.causal { self.lengths[row].min(first + count) } else { self.lengths[row] }
    }

    /// Factor of the scores, for powers of two: log2(e) / sqrt(D).
    fn scale(&self) -> f32 {
        (std::f64::consts::LOG2_E / (self.head_width as f64).sqrt()) as f32
    }

    /// Blocks of queries that are worked on together, if each needs `vectors` numbers for each query and feature.
    fn group(&self, vectors: usize) -> usize {
        (GROUP_BYTES / (4 * vectors * QUERY_BLOCK * self.head_width)).clamp(1, 8)
    }

    /// Rough count of elementary operations.
    fn cost(&self) -> usize {
        self.batch * self.queries * self.keys * self.stride()
    }
}

struct Attention {
    plan: Plan,
    /// log2 of the softmax's denominator, (B, heads, S), from the forward.
    log_sums: OnceLock<Vec<f32>>,
    /// The same in a GPU's memory.
    log_sums_there: OnceLock<Tensor>,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if let Some(done) = emulated3([(q, lq), (k, lk), (v, lv)], |gpu, operands| self.forward_on(gpu, operands)) {
            return done;
        }
        by_dtype!(q.dtype(), self.name(), T => {
            let (y, log_sums) = forward::forward::<T>(&self.plan, elements(q, lq)?, elements(k, lk)?, elements(v, lv)?);
            // A second forward of the same op would give the same sums.
            let _ = self.log_sums.set(log_sums);
            Ok(result(y, lq.shape()))
        })
    }

    cuda_forward!(3);

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        if let Some(gpu) = Gpu::of(q)? {
            let [dq, dk, dv] = self.backward_on(&gpu, [q, k, v, y, &dy])?;
            return Ok((Some(dq), Some(dk), Some(dv)));
        }
        let Some(log_sums) = self.log_sums.get() else { bail!("attention: backward before forward") };
        let held = [q, k, v, y, &dy].map(Held::new);
        by_dtype!(q.dtype(), self.name(), T => {
            let [q_values, k_values, v_values, y_values, dy_values] = &held;
            let given = backward::Given::<T> {
                plan: &self.plan,
                q: q_values.elements()?,
                k: k_values.elements()?,
                v: v_values.elements()?,
                y: y_values.elements()?,
                dy: dy_values.elements()?,
                log_sums,
            };
            let [dq, dk, dv] = given.backward();
            Ok((Some(tensor(dq, q.shape())?), Some(tensor(dk, k.shape())?), Some(tensor(dv, v.shape())?)))
        })
    }
}

/// One head of `count` tokens as f32 in rows of D: where it lies, or copied to `scratch` (strides of a power of two, and
/// heads that share pages, would cost more in the caches than the copy, which several blocks of queries share).
fn head_rows<'a, T: Real>(plan: &Plan, from: &'a [T], count: usize, scratch: &'a mut [f32]) -> Rows<'a> {
    match T::direct(from) {
        Some(data) if plan.heads == 1 => Rows { data, stride: plan.stride() },
        _ => {
            gather(plan, from, count, scratch, plan.head_width);
            Rows { data: scratch, stride: plan.head_width }
        }
    }
}

/// Copies one head of `count` tokens as f32 into rows of `to_stride`; what lies between stays.
fn gather<T: Real>(plan: &Plan, from: &[T], count: usize, to: &mut [f32], to_stride: usize) {
    let d = plan.head_width;
    simd(
        #[inline(always)]
        || {
            for token in 0..count {
                let (from, to) = (&from[token * plan.stride()..][..d], &mut to[token * to_stride..][..d]);
                match T::direct(from) {
                    Some(from) => to.copy_from_slice(from),
                    None => _ = T::read(from, to),
                }
            }
        },
    );
}

/// Writes f32 rows of `from_stride` as rows of a result.
fn scatter<'a, T: Real>(from: &[f32], from_stride: usize, to: impl Iterator<Item = &'a mut [T]>) {
    simd(
        #[inline(always)]
        || {
            let mut scratch = [0f32; PIECE];
            for (i, to) in to.enumerate() {
                let from = &from[i * from_stride..][..to.len()];
                for (to, from) in to.chunks_mut(PIECE).zip(from.chunks(PIECE)) {
                    T::write(
                        to,
                        &mut scratch,
                        #[inline(always)]
                        |to| to.copy_from_slice(from),
                    );
                }
            }
        },
    );
}

/// The rows of a result (B, tokens, heads*D) by (batch row, head), so that each can be written by itself.
fn by_head<'a, T>(plan: &Plan, y: &'a mut [T], tokens: usize) -> Vec<Vec<&'a mut [T]>> {
    let mut parts: Vec<Vec<&mut [T]>> = (0..plan.batch * plan.heads).map(|_| Vec::with_capacity(tokens)).collect();
    for (i, piece) in y.chunks_mut(plan.head_width).enumerate() {
        let row = i / (tokens * plan.heads);
        parts[row * plan.heads + i % plan.heads].push(piece);
    }
    parts
}

/// Cuts each head's rows into blocks of `size`.
fn into_blocks<T>(heads: Vec<Vec<&mut [T]>>, size: usize) -> Vec<Vec<&mut [T]>> {
    let mut blocks = Vec::new();
    for head in heads {
        let mut rows = head.into_iter();
        loop {
            let block: Vec<_> = rows.by_ref().take(size).collect();
            if block.is_empty() {
                break;
            }
            blocks.push(block);
        }
    }
    blocks
}

//! How fast attention is, forward and backward, at the shapes of SD 1.5 and SDXL. `benches/gpu_torch.py` runs PyTorch's
//! beside it.

use anyhow::Result;
use candle_core::DType;
use serde_json::{Value, json};

use super::gpu::{ROUNDS, speed};
use super::numbers::halves;
use crate::device::cuda::Gpu;
use crate::kernels::attention::{Attention, Backward};

const HEADS: usize = 8;
/// Queries, keys and the width of a head: SD 1.5's levels on themselves and on 77 tokens, and SDXL's.
const SHAPES: [(usize, usize, usize); 7] = [
    (4096, 4096, 40),
    (1024, 1024, 80),
    (256, 256, 160),
    (4096, 77, 40),
    (1024, 77, 80),
    (4096, 4096, 64),
    (1024, 1024, 64),
];

/// A line for each shape and batch: microseconds of the forward and of the backward, and their 10^12 operations a second
/// (multiplications and additions of the products; the backward's five to the forward's two).
pub fn attention(gpu: &Gpu) -> Result<Vec<Value>> {
    let mut lines = Vec::new();
    for batch in [1, 4, 16] {
        for (queries, keys, width) in SHAPES {
            lines.push(measured(gpu, batch, queries, keys, width)?);
        }
    }
    Ok(lines)
}

fn measured(gpu: &Gpu, batch: usize, queries: usize, keys: usize, width: usize) -> Result<Value> {
    let of = Attention::contiguous(DType::BF16, [batch, queries, keys], HEADS, width, false);
    let [by_query, by_key] = [queries, keys].map(|tokens| batch * tokens * HEADS * width);
    let [q, k, v] = [halves(gpu, by_query)?, halves(gpu, by_key)?, halves(gpu, by_key)?];
    let dy = halves(gpu, by_query)?;
    let room = |elements: usize, size: usize| gpu.computing().alloc(elements * size, "attention's results");
    let (y, log_sums) = (room(by_query, 2)?, room(of.log_sums(), 4)?);
    let [dq, dk, dv] = [room(by_query, 2)?, room(by_key, 2)?, room(by_key, 2)?];
    let forward = || of.forward(gpu, [&q, &k, &v].map(|a| a.address()), None, y.address(), log_sums.address());
    let given = Backward {
        q: q.address(),
        k: k.address(),
        v: v.address(),
        y: y.address(),
        log_sums: log_sums.address(),
        dy: dy.address(),
        lengths: None,
    };
    let backward = || of.backward(gpu, given, [&dq, &dk, &dv].map(|a| a.address()));
    let operations = 4 * batch * HEADS * queries * keys * width;
    let [forward, backward] = [(operations, &forward as &dyn Fn() -> Result<()>), (operations / 2 * 5, &backward)].map(
        |(operations, launch)| {
            launch()?;
            let speed = speed(gpu.computing(), operations * ROUNDS, || (0..ROUNDS).try_for_each(|_| launch()))?;
            anyhow::Ok((operations as f64 / speed * 1e6, speed / 1e12))
        },
    );
    let (forward, backward) = (forward?, backward?);
    Ok(json!({
        "kernel": "attention", "shape": [batch, HEADS, queries, keys, width],
        "microseconds": {"forward": forward.0, "backward": backward.0},
        "tflops": {"forward": forward.1, "backward": backward.1},
    }))
}

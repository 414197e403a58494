//! The optimizer's update beside a loop that only streams the same numbers, in one process, taking turns.

use std::time::Instant;

use anyhow::Result;
use candle_core::DType;
use half::bf16;
use serde_json::json;

use super::fits::check_elements;
use crate::device::Buffer;
use crate::device::threads::{for_parts, threads};
use crate::optim::{AdamW, Grads, RecordLayout, Rounded, StateKind, StochasticRounding, Weights};
use crate::zero::PIECE;

/// What takes turns.
#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Stream,
    F32,
    Copied,
    Bf16Master,
    Coded,
}

impl Pass {
    const ALL: [Pass; 5] = [Pass::Stream, Pass::F32, Pass::Copied, Pass::Bf16Master, Pass::Coded];

    fn name(self) -> &'static str {
        match self {
            Pass::Stream => "plain loop",
            Pass::F32 => "fp32",
            Pass::Copied => "fp32, bf16 copy",
            Pass::Bf16Master => "bf16 master",
            Pass::Coded => "fp32, 8-bit moments",
        }
    }

    /// Bytes that it moves for an element: master, two moments and gradient are read and the first three written.
    fn bytes(self) -> f64 {
        match self {
            Pass::Stream | Pass::F32 => 28.0,
            Pass::Copied => 30.0,
            Pass::Bf16Master => 24.0,
            // Two codes each way, and a block's two scales.
            Pass::Coded => 16.0 + 16.0 / 256.0,
        }
    }
}

/// Times `repeats` updates of `elements` elements each, after one that is not counted. Prints a table and one JSON line,
/// in which times are medians in seconds.
pub fn adamw(elements: usize, repeats: usize) -> Result<()> {
    check_elements(elements)?;
    let mut arrays = Arrays::new(elements)?;
    let mut times = Pass::ALL.map(|_| Vec::new());
    for step in 0..=repeats {
        for (pass, times) in Pass::ALL.into_iter().zip(&mut times) {
            let started = Instant::now();
            arrays.run(pass, step as u64 + 1);
            if step > 0 {
                times.push(started.elapsed().as_secs_f64());
            }
        }
    }
    let medians = times.map(median);
    println!("{:20}  {:>8}  {:>13}  {:>6}  {:>14}", "", "ms", "bytes/element", "GB/s", "of the loop's");
    for (pass, seconds) in Pass::ALL.into_iter().zip(medians) {
        let speed = pass.bytes() * elements as f64 / seconds / 1e9;
        let share = pass.bytes() / seconds / (Pass::Stream.bytes() / medians[0]);
        println!("{:20}  {:8.2}  {:13.2}  {speed:6.2}  {share:14.3}", pass.name(), 1e3 * seconds, pass.bytes());
    }
    let rows =
        Pass::ALL.into_iter().zip(medians).map(|(pass, seconds)| json!({"name": pass.name(), "seconds": seconds}));
    println!("{}", json!({"elements": elements, "threads": threads(), "rows": rows.collect::<Vec<_>>()}));
    Ok(())
}

/// Of the fp32 update that writes a bf16 copy, on all threads.
#[cfg(feature = "cuda")]
pub(super) fn seconds_an_element() -> Result<f64> {
    const ELEMENTS: usize = 100_000_000;
    let mut arrays = Arrays::new(ELEMENTS)?;
    let times = (1..=4).map(|step| {
        let started = Instant::now();
        arrays.run(Pass::Copied, step);
        started.elapsed().as_secs_f64()
    });
    Ok(median(times.skip(1).collect()) / ELEMENTS as f64)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A bucket's optimizer state, cut into chunks as in training.
type State = Vec<(RecordLayout, Buffer)>;

fn state(kind: StateKind, elements: usize) -> Result<State> {
    let chunk = |start: usize| {
        let layout = RecordLayout::new(kind, start, PIECE.min(elements - start), elements);
        let mut record = Buffer::unbudgeted(DType::U8, layout.bytes())?;
        layout.initialise(record.bytes_mut());
        Ok((layout, record))
    };
    (0..elements).step_by(PIECE).map(chunk).collect()
}

struct Arrays {
    weights: Buffer,
    /// Copy or master.
    halves: Buffer,
    grads: Buffer,
    /// What the plain loop has for moments: it would leave nothing that is any.
    loose: [Buffer; 2],
    state: State,
    coded: State,
}

impl Arrays {
    fn new(elements: usize) -> Result<Self> {
        let mut halves = Buffer::unbudgeted(DType::BF16, elements)?;
        halves.as_mut_slice().fill(bf16::from_f32(0.01));
        Ok(Arrays {
            weights: made(elements, 0.02)?,
            halves,
            grads: made(elements, 0.01)?,
            loose: [made(elements, 0.02)?, made(elements, 0.02)?],
            state: state(StateKind::F32, elements)?,
            coded: state(StateKind::Bits8, elements)?,
        })
    }

    fn run(&mut self, pass: Pass, step: u64) {
        let (w, g) = (self.weights.as_mut_slice::<f32>(), self.grads.as_slice::<f32>());
        if pass == Pass::Stream {
            let [m, v] = &mut self.loose;
            return stream(w, m.as_mut_slice(), v.as_mut_slice(), g);
        }
        let settings = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
        let state = if pass == Pass::Coded { &mut self.coded } else { &mut self.state };
        let chunks = w.chunks_mut(PIECE).zip(self.halves.as_mut_slice::<bf16>().chunks_mut(PIECE)).zip(g.chunks(PIECE));
        for ((layout, record), ((w, halves), g)) in state.iter_mut().zip(chunks) {
            let (weights, rounded) = match pass {
                Pass::Copied => (Weights::F32(w), Rounded::Bf16(halves)),
                Pass::Bf16Master => {
                    let rounding = StochasticRounding { seed: 1, step, bucket: 0, start: layout.start() as u64 };
                    (Weights::Bf16 { values: halves, rounding }, Rounded::None)
                }
                _ => (Weights::F32(w), Rounded::None),
            };
            settings.update_chunk(step, 1e-5, 0.5, layout, record.bytes_mut(), weights, rounded, Grads::F32(g));
        }
    }
}

/// Reads four arrays and writes three of them, doing no more than it must to need them all.
fn stream(w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
    const PIECE: usize = 1 << 14;
    let cost = w.len();
    let parts = w.chunks_mut(PIECE).zip(m.chunks_mut(PIECE)).zip(v.chunks_mut(PIECE)).zip(g.chunks(PIECE)).collect();
    for_parts(parts, cost, |_, (((w, m), v), g)| {
        for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
            (*w, *m, *v) = (*w - g, *m + g, *v + g);
        }
    });
}

/// Numbers between -`size` and `size`, none of them zero, that cost nothing to make.
fn made(elements: usize, size: f32) -> Result<Buffer> {
    let mut buffer = Buffer::unbudgeted(DType::F32, elements)?;
    const PIECE: usize = 1 << 18;
    for_parts(buffer.as_mut_slice().chunks_mut(PIECE).collect(), elements, |_, piece: &mut [f32]| {
        for (i, x) in piece.iter_mut().enumerate() {
            *x = ((i * 37 % 1009) as f32 - 504.5) / 505.0 * size;
        }
    });
    Ok(buffer)
}

//! The optimizer's update beside a loop that only streams the same numbers, in one process, taking turns.

use std::time::Instant;

use anyhow::Result;
use candle_core::DType;
use half::bf16;
use serde_json::json;

use crate::device::Buffer;
use crate::device::threads::for_parts;
use crate::optim::{AdamW, CHUNK, Grads, RecordLayout, Rounded, StateKind, StochasticRounding, Weights};

/// Bytes that fp32 AdamW moves for an element: it reads master, two moments and gradient and writes the first three.
const BYTES: f64 = 28.0;

/// What takes turns: a name, the bytes it moves for an element, and one pass, which takes the running number of its step.
struct Contestant<'a> {
    name: &'static str,
    bytes: f64,
    pass: Box<dyn FnMut(u64) + 'a>,
}

/// Times `repeats` updates of `elements` elements each (after one that is not counted): fp32, with a bf16 copy, with a
/// bf16 master, with 8-bit moments, and the plain loop. Prints a table and one JSON line: medians in seconds.
pub fn adamw(elements: usize, repeats: usize) -> Result<()> {
    let mut contestants = [stream(elements)?, plain(elements, false)?, plain(elements, true)?]
        .into_iter()
        .chain([bf16_master(elements)?, coded(elements)?])
        .collect::<Vec<_>>();
    let mut times = vec![Vec::new(); contestants.len()];
    for step in 0..=repeats {
        for (contestant, times) in contestants.iter_mut().zip(&mut times) {
            let started = Instant::now();
            (contestant.pass)(step as u64 + 1);
            if step > 0 {
                times.push(started.elapsed().as_secs_f64());
            }
        }
    }
    let medians: Vec<f64> = times.into_iter().map(median).collect();
    println!("{:24}  {:>9}  {:>8}  {:>14}  {:>10}", "", "ms", "B/elem", "GB/s", "of stream");
    for (contestant, &seconds) in contestants.iter().zip(&medians) {
        println!(
            "{:24}  {:9.2}  {:8.2}  {:14.2}  {:10.3}",
            contestant.name,
            1e3 * seconds,
            contestant.bytes,
            contestant.bytes * elements as f64 / seconds / 1e9,
            medians[0] / seconds * contestant.bytes / BYTES,
        );
    }
    let rows: Vec<_> = contestants.iter().zip(&medians).map(|(c, s)| json!({"name": c.name, "seconds": s})).collect();
    println!("{}", json!({"elements": elements, "threads": crate::device::threads::threads(), "rows": rows}));
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

fn settings() -> AdamW {
    AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 }
}

const RATE: f64 = 1e-5;

/// Numbers between -`size` and `size`, none of them zero, that cost nothing to make.
fn made(dtype: DType, elements: usize, size: f32) -> Result<Buffer> {
    let mut buffer = Buffer::unbudgeted(dtype, elements)?;
    let number = |i: usize| ((i * 37 % 1009) as f32 - 504.5) / 505.0 * size;
    const PIECE: usize = 1 << 18;
    if dtype == DType::BF16 {
        for_parts(buffer.as_mut_slice().chunks_mut(PIECE).collect(), elements, |k, piece: &mut [bf16]| {
            piece.iter_mut().enumerate().for_each(|(i, x)| *x = bf16::from_f32(number(k * PIECE + i)));
        });
    } else {
        for_parts(buffer.as_mut_slice().chunks_mut(PIECE).collect(), elements, |k, piece: &mut [f32]| {
            piece.iter_mut().enumerate().for_each(|(i, x)| *x = number(k * PIECE + i));
        });
    }
    Ok(buffer)
}

/// Reads four arrays and writes three of them, doing no more than it must to need them all.
fn stream(elements: usize) -> Result<Contestant<'static>> {
    let mut arrays = [0, 1, 2].map(|_| made(DType::F32, elements, 0.02));
    let [w, m, v] = &mut arrays;
    let _ = (w, m, v);
    let [w, m, v] = arrays;
    let (mut w, mut m, mut v) = (w?, m?, v?);
    let grads = made(DType::F32, elements, 0.02)?;
    let pass = move |_| {
        const PIECE: usize = 1 << 14;
        let w = w.as_mut_slice::<f32>().chunks_mut(PIECE);
        let parts = w.zip(m.as_mut_slice::<f32>().chunks_mut(PIECE)).zip(v.as_mut_slice::<f32>().chunks_mut(PIECE));
        let parts = parts.zip(grads.as_slice::<f32>().chunks(PIECE)).collect();
        for_parts(parts, elements, |_, (((w, m), v), g)| {
            for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
                (*w, *m, *v) = (*w - g, *m + g, *v + g);
            }
        });
    };
    Ok(Contestant { name: "plain loop", bytes: BYTES, pass: Box::new(pass) })
}

/// A bucket's optimizer state, cut into chunks as in training.
struct State {
    records: Vec<(RecordLayout, Buffer)>,
}

impl State {
    fn new(kind: StateKind, elements: usize) -> Result<Self> {
        let chunk = |start: usize| {
            let layout = RecordLayout::new(kind, start, CHUNK.min(elements - start), elements);
            let mut record = Buffer::unbudgeted(DType::U8, layout.bytes())?;
            layout.initialise(record.bytes_mut());
            Ok((layout, record))
        };
        Ok(State { records: (0..elements).step_by(CHUNK).map(chunk).collect::<Result<_>>()? })
    }
}

fn plain(elements: usize, copied: bool) -> Result<Contestant<'static>> {
    let mut state = State::new(StateKind::F32, elements)?;
    let (mut w, g) = (made(DType::F32, elements, 0.02)?, made(DType::F32, elements, 0.01)?);
    let mut copy = Buffer::unbudgeted(DType::BF16, if copied { elements } else { 0 })?;
    let pass = move |step| {
        let (w, g) = (w.as_mut_slice::<f32>(), g.as_slice::<f32>());
        let mut copies = copy.as_mut_slice::<bf16>().chunks_mut(CHUNK);
        let chunks = state.records.iter_mut().zip(w.chunks_mut(CHUNK)).zip(g.chunks(CHUNK));
        for (((layout, record), w), g) in chunks {
            let rounded = copies.next().map_or(Rounded::None, Rounded::Bf16);
            let record = record.bytes_mut();
            settings().update_chunk(step, RATE, 0.5, layout, record, Weights::F32(w), rounded, Grads::F32(g));
        }
    };
    let (name, bytes) = if copied { ("fp32, bf16 copy", BYTES + 2.0) } else { ("fp32", BYTES) };
    Ok(Contestant { name, bytes, pass: Box::new(pass) })
}

fn bf16_master(elements: usize) -> Result<Contestant<'static>> {
    let mut state = State::new(StateKind::F32, elements)?;
    let (mut w, g) = (made(DType::BF16, elements, 0.02)?, made(DType::F32, elements, 0.01)?);
    let pass = move |step| {
        let (w, g) = (w.as_mut_slice::<bf16>(), g.as_slice::<f32>());
        for (((layout, record), values), g) in state.records.iter_mut().zip(w.chunks_mut(CHUNK)).zip(g.chunks(CHUNK)) {
            let rounding = StochasticRounding { seed: 1, step, bucket: 0, start: layout.start() as u64 };
            let weights = Weights::Bf16 { values, rounding };
            let record = record.bytes_mut();
            settings().update_chunk(step, RATE, 0.5, layout, record, weights, Rounded::None, Grads::F32(g));
        }
    };
    Ok(Contestant { name: "bf16 master, fp32 moments", bytes: BYTES - 4.0, pass: Box::new(pass) })
}

fn coded(elements: usize) -> Result<Contestant<'static>> {
    let mut state = State::new(StateKind::Bits8, elements)?;
    let (mut w, g) = (made(DType::F32, elements, 0.02)?, made(DType::F32, elements, 0.01)?);
    let pass = move |step| {
        let (w, g) = (w.as_mut_slice::<f32>(), g.as_slice::<f32>());
        for (((layout, record), w), g) in state.records.iter_mut().zip(w.chunks_mut(CHUNK)).zip(g.chunks(CHUNK)) {
            let (record, weights) = (record.bytes_mut(), Weights::F32(w));
            settings().update_chunk(step, RATE, 0.5, layout, record, weights, Rounded::None, Grads::F32(g));
        }
    };
    // Master and gradient as ever, two codes each way, and a block's two scales.
    Ok(Contestant { name: "fp32, 8-bit moments", bytes: 16.0 + 16.0 / 256.0, pass: Box::new(pass) })
}

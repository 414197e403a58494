//! The update as a whole: every instruction set, number of threads and cut into chunks gives the same bits, and those of
//! the formulas as they stand.

use half::{bf16, f16};

use super::adamw::update_chunk;
use super::blockwise::{dequantize, quantize};
use super::code_book::{Book, ZERO_OF_M};
use super::level::Level;
use super::testing::{SETTINGS, bits, coefficients, hard_numbers, numbers};
use super::{Grads, RecordLayout, Rounded, StateKind, StochasticRounding, Weights};
use crate::device::BLOCK;
use crate::device::threads::with_threads;

/// What is updated and how: elements, of which those from `small_from` on belong to small tensors, and the numbers' types.
#[derive(Clone, Copy, Debug)]
struct Case {
    kind: StateKind,
    elements: usize,
    small_from: usize,
    bf16_master: bool,
    bf16_grads: bool,
    copied: Copied,
    infinities: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Copied {
    Not,
    Bf16,
    F16,
}

/// Everything that three steps leave behind, as bits.
#[derive(PartialEq)]
struct Left {
    weights: Vec<u32>,
    copy: Vec<u32>,
    records: Vec<Vec<u8>>,
}

/// Three steps, the bucket cut into chunks of `chunk` elements.
fn run(case: Case, level: Level, chunk: usize) -> Left {
    let n = case.elements;
    let mut w = hard_numbers(n, 1, 0.1, case.infinities);
    let mut w16: Vec<bf16> = w.iter().map(|&x| bf16::from_f32(x)).collect();
    let (mut copy_bf16, mut copy_f16) = (vec![bf16::ZERO; n], vec![f16::ZERO; n]);
    let mut state: Vec<_> = (0..n)
        .step_by(chunk)
        .map(|start| {
            let layout = RecordLayout::new(case.kind, start, chunk.min(n - start), case.small_from);
            // Records are aligned.
            let mut record = vec![0u64; layout.bytes() / 8];
            layout.initialise(bytemuck::cast_slice_mut(&mut record));
            (layout, record)
        })
        .collect();
    for step in 1..=3 {
        let grads = hard_numbers(n, 3 + step as u32, 1e-2, case.infinities && step == 2);
        let grads16: Vec<bf16> = grads.iter().map(|&g| bf16::from_f32(g)).collect();
        let is_finite = |i: usize| if case.bf16_grads { grads16[i].is_finite() } else { grads[i].is_finite() };
        for (layout, record) in &mut state {
            let range = layout.start()..layout.start() + layout.elements();
            let rounding = StochasticRounding { seed: 5, step, bucket: 6, start: layout.start() as u64 };
            let weights = match case.bf16_master {
                true => Weights::Bf16 { values: &mut w16[range.clone()], rounding },
                false => Weights::F32(&mut w[range.clone()]),
            };
            let rounded = match case.copied {
                Copied::Not => Rounded::None,
                Copied::Bf16 => Rounded::Bf16(&mut copy_bf16[range.clone()]),
                Copied::F16 => Rounded::F16(&mut copy_f16[range.clone()]),
            };
            let expected = range.clone().all(is_finite);
            let grads = if case.bf16_grads { Grads::Bf16(&grads16[range]) } else { Grads::F32(&grads[range]) };
            let record = bytemuck::cast_slice_mut(record);
            let finite = update_chunk(level, &coefficients(step), layout, record, weights, rounded, grads);
            assert_eq!(finite, expected, "{level:?} {case:?}");
        }
    }
    w.extend(w16.iter().map(|x| x.to_f32()));
    let halves = copy_bf16.iter().map(|x| x.to_f32()).chain(copy_f16.iter().map(|x| x.to_f32()));
    let copy = bits(&halves.collect::<Vec<_>>());
    let records = state.into_iter().map(|(layout, record)| moments(&layout, bytemuck::cast_slice(&record))).collect();
    Left { weights: bits(&w), copy, records }
}

/// A record's bytes; what is not a number is one and the same.
fn moments(layout: &RecordLayout, record: &[u8]) -> Vec<u8> {
    let mut record = record.to_vec();
    for part in layout.parts().into_iter().filter(|part| part.dtype == candle_core::DType::F32) {
        let numbers: Vec<f32> = bytemuck::pod_collect_to_vec(&record[part.bytes.clone()]);
        record[part.bytes].copy_from_slice(bytemuck::cast_slice(&bits(&numbers)));
    }
    record
}

fn cases(elements: usize, infinities: bool) -> Vec<Case> {
    let mut cases = Vec::new();
    for (kind, small_from) in
        [(StateKind::F32, 0), (StateKind::Bits8, elements / 2 / BLOCK * BLOCK), (StateKind::Bits8, elements)]
    {
        for (bf16_master, bf16_grads, copied) in [
            (false, false, Copied::Not),
            (false, false, Copied::Bf16),
            (false, true, Copied::F16),
            (true, true, Copied::Not),
            (true, false, Copied::F16),
        ] {
            cases.push(Case { kind, elements, small_from, bf16_master, bf16_grads, copied, infinities });
        }
    }
    cases
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    for elements in [1, 7, 16, 33, 255, 256, 1003, 2907] {
        for case in cases(elements, true).into_iter().chain(cases(elements, false)) {
            let expected = run(case, Level::Portable, elements.next_multiple_of(BLOCK));
            for level in Level::available() {
                assert!(run(case, level, elements.next_multiple_of(BLOCK)) == expected, "{level:?} {case:?}");
            }
        }
    }
}

#[test]
fn neither_threads_nor_chunks_show() {
    // Several of the pieces that threads share, and copies that are written past the caches.
    for case in cases(300_000, false).into_iter().step_by(2) {
        let whole = with_threads(1, || run(case, Level::best(), 300_032));
        for (threads, chunk) in [(2, 300_032), (3, 300_032), (2, 256), (2, 70_144)] {
            let cut = with_threads(threads, || run(case, Level::best(), chunk));
            assert!(cut.weights == whole.weights && cut.copy == whole.copy, "{threads} threads, {chunk}: {case:?}");
            assert!(chunk < case.elements || cut.records == whole.records, "{threads} threads: {case:?}");
        }
    }
}

/// PyTorch's formula as it stands, and halves rounded on their own afterwards.
#[test]
fn one_pass_is_the_formula_and_then_rounding() {
    const N: usize = 1003;
    let layout = RecordLayout::new(StateKind::F32, 0, N, 0);
    let c = coefficients(3);
    let m_start = hard_numbers(N, 2, 1e-3, true);
    let v_start: Vec<f32> = hard_numbers(N, 3, 1e-6, true).iter().map(|x| x.abs()).collect();
    let grads = hard_numbers(N, 4, 1e-2, true);
    for level in Level::available() {
        let mut record = vec![0u64; layout.bytes() / 8];
        let record = bytemuck::cast_slice_mut(&mut record);
        let (mut m, mut v) = (m_start.clone(), v_start.clone());
        layout.write_moments_f32(record, &m, &v);
        let mut weights = hard_numbers(N, 1, 0.1, true);
        let mut expected = weights.clone();
        let mut copy = vec![bf16::ZERO; N];
        let rounded = Rounded::Bf16(&mut copy);
        update_chunk(level, &c, &layout, record, Weights::F32(&mut weights), rounded, Grads::F32(&grads));
        for (((w, m), v), g) in expected.iter_mut().zip(&mut m).zip(&mut v).zip(&grads) {
            let g = g * c.grad_scale;
            *m += (g - *m) * c.one_minus_beta1;
            *v = *v * c.beta2 + c.one_minus_beta2 * g * g;
            let denominator = v.sqrt() / c.correction2_root.value + c.epsilon;
            *w = *w * c.decay - c.step_size * (*m / denominator);
        }
        let (mut m_found, mut v_found) = (vec![0.0; N], vec![0.0; N]);
        layout.read_moments_f32(record, &mut m_found, &mut v_found);
        assert!(bits(&m_found) == bits(&m) && bits(&v_found) == bits(&v), "{level:?}");
        assert!(bits(&weights) == bits(&expected), "{level:?}");
        let widened = |x: Vec<bf16>| bits(&x.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
        assert!(widened(copy) == widened(expected.iter().map(|&x| bf16::from_f32(x)).collect()), "{level:?}");
    }
}

#[test]
fn one_gradient_that_is_not_finite_is_found_wherever_it_is() {
    let c = &SETTINGS.coefficients(1, 0.1, 1.0);
    for (kind, level) in
        [StateKind::F32, StateKind::Bits8].into_iter().flat_map(|k| Level::available().into_iter().map(move |l| (k, l)))
    {
        let layout = &RecordLayout::new(kind, 0, 337, 256);
        for (at, what) in [(0, f32::NAN), (17, f32::INFINITY), (255, f32::NAN), (336, f32::NEG_INFINITY), (337, 1.0)] {
            let mut grads = numbers(337, 5, f32::MAX);
            if let Some(g) = grads.get_mut(at) {
                *g = what;
            }
            let mut record = vec![0u64; layout.bytes() / 8];
            let record = bytemuck::cast_slice_mut(&mut record);
            let (weights, grads) = (Weights::F32(&mut [0.0; 337]), Grads::F32(&grads));
            let finite = update_chunk(level, c, layout, record, weights, Rounded::None, grads);
            assert_eq!(finite, at == 337, "{kind:?} {level:?} {at}");
        }
    }
}

/// With 8-bit moments: widen, update, round to the nearest, and mind the sign; on whole tensors.
#[test]
fn one_pass_with_8_bits_is_widening_updating_and_rounding() {
    const N: usize = 1024;
    let layout = RecordLayout::new(StateKind::Bits8, 0, N, N);
    let mut record = vec![0u64; layout.bytes() / 8];
    let record: &mut [u8] = bytemuck::cast_slice_mut(&mut record);
    let mut m = numbers(N, 1, 1e-3);
    m.iter_mut().step_by(5).for_each(|m| *m = 0.0);
    let mut v: Vec<f32> = numbers(N, 2, 1e-3).iter().map(|x| x * x).collect();
    layout.write_moments_f32(record, &m, &v);
    layout.read_moments_f32(record, &mut m, &mut v);
    let c = coefficients(5);
    let mut grads = numbers(N, 3, 1e-2);
    grads.iter_mut().step_by(5).for_each(|g| *g *= 1e-7);
    let mut weights = numbers(N, 4, 0.1);
    let mut expected = weights.clone();
    for (((w, m), v), g) in expected.iter_mut().zip(&mut m).zip(&mut v).zip(&grads) {
        let g = g * c.grad_scale;
        *m = *m * c.beta1 + c.one_minus_beta1 * g;
        *v = *v * c.beta2 + c.one_minus_beta2 * g * g;
        let denominator = v.sqrt() / c.correction2_root.value + c.epsilon;
        *w = *w * c.decay - c.step_size * (*m / denominator);
    }
    let (mut m8, mut v8, mut m_absmax, mut v_absmax) = ([0; N], [0; N], [0.0; N / BLOCK], [0.0; N / BLOCK]);
    quantize(Book::Signed, &m, &mut m8, &mut m_absmax);
    quantize(Book::Unsigned, &v, &mut v8, &mut v_absmax);
    let lost = m8.iter_mut().zip(&m).filter(|(code, m)| **code == ZERO_OF_M && **m < 0.0);
    assert!(lost.map(|(code, _)| *code -= 1).count() > 10);
    let (weights_out, grads) = (Weights::F32(&mut weights), Grads::F32(&grads));
    update_chunk(Level::best(), &c, &layout, record, weights_out, Rounded::None, grads);
    assert!(bits(&weights) == bits(&expected));
    let of = |name: &str| record[layout.parts().into_iter().find(|part| part.name == name).unwrap().bytes].to_vec();
    assert!(of("m8") == m8 && of("v8") == v8);
    assert!(of("m_absmax") == bytemuck::bytes_of(&m_absmax) && of("v_absmax") == bytemuck::bytes_of(&v_absmax));
    dequantize(Book::Signed, &m8, &m_absmax, &mut m);
    assert!(m.iter().zip(numbers(N, 3, 1e-2)).step_by(5).all(|(m, g)| g > 0.0 || *m < 0.0));
}

/// bitsandbytes' own test of its 8-bit Adam against PyTorch's, `test_optimizer8bit`: weights of deviation 0.1, gradients
/// of 0.01, rate 1e-3; after each of 50 steps the weights are near in the mean, and then both go on from the same.
#[test]
fn fifty_steps_are_near_those_of_32_bits() {
    const N: usize = 1024 * 32;
    let normal = |seed: u32, size: f32| -> Vec<f32> {
        let uniform = numbers(N, 2 * seed, 1.0).into_iter().zip(numbers(N, 2 * seed + 1, 0.5));
        // Box and Muller (1958).
        let one = |(a, b): (f32, f32)| (-2.0 * a.abs().max(1e-7).ln()).sqrt() * (std::f32::consts::TAU * b).cos();
        uniform.map(|pair| size * one(pair)).collect()
    };
    let adam = super::AdamW { weight_decay: 0.0, ..SETTINGS };
    let (layout, layout8) = (RecordLayout::new(StateKind::F32, 0, N, N), RecordLayout::new(StateKind::Bits8, 0, N, N));
    let (mut record, mut record8) = (vec![0u64; layout.bytes() / 8], vec![0u64; layout8.bytes() / 8]);
    let record: &mut [u8] = bytemuck::cast_slice_mut(&mut record);
    let record8: &mut [u8] = bytemuck::cast_slice_mut(&mut record8);
    layout8.initialise(record8);
    let mut weights = normal(1000, 0.1);
    let mut weights8 = weights.clone();
    let (mut m, mut v, mut m8, mut v8) = (vec![0.0; N], vec![0.0; N], vec![0.0; N], vec![0.0; N]);
    for step in 1..=50 {
        let grads = normal(step as u32, 0.01);
        for (layout, record, weights) in
            [(&layout, &mut *record, &mut weights), (&layout8, &mut *record8, &mut weights8)]
        {
            let (weights, grads) = (Weights::F32(weights), Grads::F32(&grads));
            adam.update_chunk(step, 1e-3, 1.0, layout, record, weights, Rounded::None, grads);
        }
        let pairs = || weights.iter().zip(&weights8);
        let mean = |errors: &mut dyn Iterator<Item = f32>| errors.map(f64::from).sum::<f64>() / N as f64;
        let error = mean(&mut pairs().map(|(a, b)| (a - b).abs()));
        let relative = mean(&mut pairs().map(|(a, b)| (a - b).abs() / (a.abs() + 1e-9)));
        assert!(error < 6e-5 && relative < 6e-4, "step {step}: {error:e} {relative:e}");
        layout.read_moments_f32(record, &mut m, &mut v);
        layout8.read_moments_f32(record8, &mut m8, &mut v8);
        let far =
            |a: &[f32], b: &[f32]| a.iter().zip(b).filter(|(a, b)| (**a - **b).abs() > 3e-3 + 1e-3 * b.abs()).count();
        assert!(far(&m, &m8) < 20 && far(&v, &v8) < 20, "step {step}");
        layout.write_moments_f32(record, &m8, &v8);
        weights8.copy_from_slice(&weights);
    }
}

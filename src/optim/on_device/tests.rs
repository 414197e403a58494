//! Three steps of everything there is, against the update on the CPU: to the bit.

use half::{bf16, f16};

use super::super::adamw::update_chunk;
use super::super::blockwise;
use super::super::level::Level;
use super::super::testing::{SETTINGS, bits, hard_numbers, numbers};
use super::super::{Grads as CpuGrads, Rounded as CpuRounded, StateKind, Weights as CpuWeights};
use super::*;
use crate::device::BLOCK;
use crate::kernels::optimizer::{dequantize, quantize};
use crate::kernels::testing::{Values, devices};

#[derive(Clone, Copy, Debug)]
struct Case {
    kind: StateKind,
    elements: usize,
    small_from: usize,
    bf16_master: bool,
    bf16_grads: bool,
    copied: Copied,
    infinities: bool,
    /// Elements before the first one, so that nothing but the record is aligned.
    skip: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Copied {
    Not,
    Bf16,
    F16,
}

/// What is updated, on one side or the other.
#[derive(Clone)]
struct State {
    w: Vec<f32>,
    w16: Vec<bf16>,
    copy_bf16: Vec<bf16>,
    copy_f16: Vec<f16>,
    record: Vec<u64>,
    finite: bool,
}

const RATE: f64 = 1e-3;
const SCALE: f32 = 0.5;

fn rounding(step: u64) -> StochasticRounding {
    StochasticRounding { seed: 5, step, bucket: 6, start: 512 }
}

impl Case {
    fn on_the_cpu(&self, layout: &RecordLayout, state: &mut State, step: u64, grads: &[f32], grads16: &[bf16]) {
        let weights = match self.bf16_master {
            true => CpuWeights::Bf16 { values: &mut state.w16, rounding: rounding(step) },
            false => CpuWeights::F32(&mut state.w),
        };
        let rounded = match self.copied {
            Copied::Not => CpuRounded::None,
            Copied::Bf16 => CpuRounded::Bf16(&mut state.copy_bf16),
            Copied::F16 => CpuRounded::F16(&mut state.copy_f16),
        };
        let grads = if self.bf16_grads { CpuGrads::Bf16(grads16) } else { CpuGrads::F32(grads) };
        let record = bytemuck::cast_slice_mut(&mut state.record);
        let c = SETTINGS.coefficients(step, RATE, SCALE);
        state.finite = update_chunk(Level::best(), &c, layout, record, weights, rounded, grads);
    }

    #[allow(clippy::too_many_arguments, reason = "what a step is made of")]
    fn on_the_device(
        &self,
        device: &dyn Launcher,
        tables: &Tables,
        layout: &RecordLayout,
        state: &mut State,
        step: u64,
        grads: &[f32],
        grads16: &[bf16],
    ) {
        let skip = self.skip;
        let w = Values::new(&after_skipping(skip, &state.w));
        let w16 = Values::new(&after_skipping(skip, &words(&state.w16)));
        let halves = [words(&state.copy_bf16), state.copy_f16.iter().map(|x| x.to_bits()).collect::<Vec<u16>>()];
        let copies = halves.map(|words| Values::new(&after_skipping(skip, &words)));
        let g = Values::new(&after_skipping(skip, grads));
        let g16 = Values::new(&after_skipping(skip, &words(grads16)));
        let record = Values::new(&state.record);
        let overflow = Values::new(&[0u32]);
        let weights = match self.bf16_master {
            true => DeviceWeights::Bf16 { values: w16.address().at(2 * skip), rounding: rounding(step) },
            false => DeviceWeights::F32(w.address().at(4 * skip)),
        };
        let rounded = match self.copied {
            Copied::Not => Rounded::None,
            Copied::Bf16 => Rounded::Bf16(copies[0].address().at(2 * skip)),
            Copied::F16 => Rounded::F16(copies[1].address().at(2 * skip)),
        };
        let grads = match self.bf16_grads {
            true => Grads::Bf16(g16.address().at(2 * skip)),
            false => Grads::F32(g.address().at(4 * skip)),
        };
        let (at, flag) = (record.address(), overflow.address());
        SETTINGS.launch_chunk(device, tables, step, RATE, SCALE, layout, at, weights, rounded, grads, flag).unwrap();
        let back = |words: &Values<u16>| words.get()[skip..].to_vec();
        state.w = w.get()[skip..].to_vec();
        state.w16 = back(&w16).into_iter().map(bf16::from_bits).collect();
        state.copy_bf16 = back(&copies[0]).into_iter().map(bf16::from_bits).collect();
        state.copy_f16 = back(&copies[1]).into_iter().map(f16::from_bits).collect();
        state.record = record.get();
        state.finite = overflow.get() == [0];
    }
}

fn after_skipping<T: Copy + Default>(skip: usize, values: &[T]) -> Vec<T> {
    vec![T::default(); skip].into_iter().chain(values.iter().copied()).collect()
}

fn words(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The bits of everything; what is not a number is one and the same.
fn all(layout: &RecordLayout, state: &State) -> Vec<Vec<u32>> {
    let halves = state.copy_bf16.iter().map(|x| x.to_f32()).chain(state.copy_f16.iter().map(|x| x.to_f32()));
    let wide: Vec<f32> = halves.chain(state.w16.iter().map(|x| x.to_f32())).chain(state.w.iter().copied()).collect();
    let bytes: &[u8] = bytemuck::cast_slice(&state.record);
    let part = |part: Part| match part.dtype {
        candle_core::DType::F32 => bits(&bytemuck::pod_collect_to_vec(&bytes[part.bytes])),
        _ => bytes[part.bytes].iter().map(|&byte| byte.into()).collect(),
    };
    layout.parts().into_iter().map(part).chain([bits(&wide), vec![state.finite.into()]]).collect()
}

fn compare(device: &dyn Launcher, tables: &Tables, case: Case) {
    let n = case.elements;
    let layout = RecordLayout::new(case.kind, 512, n, 512 + case.small_from);
    let w = hard_numbers(n, 1, 0.1, case.infinities);
    let mut record = vec![0u64; layout.bytes() / 8];
    layout.initialise(bytemuck::cast_slice_mut(&mut record));
    let mut cpu = State {
        w16: w.iter().map(|&x| bf16::from_f32(x)).collect(),
        w,
        copy_bf16: vec![bf16::ZERO; n],
        copy_f16: vec![f16::ZERO; n],
        record,
        finite: true,
    };
    let mut gpu = cpu.clone();
    for step in 1..=3 {
        let grads = hard_numbers(n, 3 + step as u32, 1e-2, case.infinities && step == 2);
        let grads16: Vec<bf16> = grads.iter().map(|&g| bf16::from_f32(g)).collect();
        case.on_the_cpu(&layout, &mut cpu, step, &grads, &grads16);
        case.on_the_device(device, tables, &layout, &mut gpu, step, &grads, &grads16);
        assert!(all(&layout, &cpu) == all(&layout, &gpu), "step {step}: {case:?}");
    }
}

#[test]
fn three_steps_are_the_cpus_to_the_bit() {
    let words = Values::new(&table_words());
    let tables = tables_at(words.address());
    for device in devices() {
        for elements in [1, 7, 256, 1003, 9 * 1024 + 3] {
            for (kind, small_from) in
                [(StateKind::F32, 0), (StateKind::Bits8, elements / 2 / BLOCK * BLOCK), (StateKind::Bits8, elements)]
            {
                for (bf16_master, bf16_grads, copied) in [
                    (false, false, Copied::Not),
                    (false, true, Copied::Not),
                    (false, false, Copied::Bf16),
                    (false, true, Copied::Bf16),
                    (false, false, Copied::F16),
                    (false, true, Copied::F16),
                    (true, false, Copied::Not),
                    (true, true, Copied::Not),
                    (true, false, Copied::Bf16),
                    (true, true, Copied::Bf16),
                    (true, false, Copied::F16),
                    (true, true, Copied::F16),
                ] {
                    for (infinities, skip) in [(false, 0), (true, 1)] {
                        let case =
                            Case { kind, elements, small_from, bf16_master, bf16_grads, copied, infinities, skip };
                        compare(device, &tables, case);
                    }
                }
            }
        }
    }
}

#[test]
fn codes_and_numbers_are_the_cpus() {
    let words = Values::new(&table_words());
    let tables = tables_at(words.address());
    for device in devices() {
        for (book, signed) in [(Book::Signed, true), (Book::Unsigned, false)] {
            let mut x = numbers(3 * BLOCK + 77, 9, 1.0);
            x.iter_mut().enumerate().for_each(|(i, x)| *x *= (-(i as f32 * 0.03)).exp2());
            // Every number of the book, and the borders between them.
            let values = &book.codes().values;
            x.extend(values);
            x.extend(values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0));
            if !signed {
                x.iter_mut().for_each(|x| *x = x.abs());
            }
            let n = x.len();
            let (mut want, mut want_most, mut want_back) = (vec![0; n], vec![0.0; n.div_ceil(BLOCK)], vec![0.0; n]);
            blockwise::quantize(book, &x, &mut want, &mut want_most);
            blockwise::dequantize(book, &want, &want_most, &mut want_back);
            let (from, codes) = (Values::new(&x), Values::<u8>::unwritten(n));
            let (most, back) = (Values::<f32>::unwritten(want_most.len()), Values::<f32>::unwritten(n));
            quantize(device, &tables, signed, from.address(), codes.address(), most.address(), n).unwrap();
            dequantize(device, &tables, signed, codes.address(), most.address(), back.address(), n).unwrap();
            assert!(codes.get() == want && bits(&most.get()) == bits(&want_most), "{book:?}");
            assert!(bits(&back.get()) == bits(&want_back), "{book:?}");
        }
    }
}

//! What the ops' tests share: numbers, and the comparison of an op with its f64 reference.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};

use super::cpu::by_dtype;
use crate::device::threads::with_threads;
use crate::device::{Element, WeightRef};

/// Numbers in -1..1 that depend on `seed` alone.
pub fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// A leaf of these numbers in `dtype`.
pub fn var(seed: u64, shape: impl Into<Shape>, dtype: DType) -> Var {
    let shape = shape.into();
    let tensor = Tensor::from_vec(numbers(seed, shape.elem_count()), shape, &Device::Cpu).unwrap();
    Var::from_tensor(&tensor.to_dtype(dtype).unwrap()).unwrap()
}

/// A trainable weight of these numbers in `dtype`, `offset` added.
pub fn weight(seed: u64, shape: &[usize], dtype: DType, offset: f32) -> Result<WeightRef> {
    let values: Vec<f32> = numbers(seed, shape.iter().product()).iter().map(|x| x + offset).collect();
    by_dtype!(dtype, "weight", T => {
        let values: Vec<T> = values.iter().map(|&x| T::from_f32(x)).collect();
        WeightRef::alone("w", shape, &values, true)
    })
}

/// A weight's values.
fn values(weight: &WeightRef, dtype: DType) -> Result<Vec<f64>> {
    by_dtype!(dtype, "weight", T => Ok(weight.view::<T>()?.iter().map(|x| x.to_f32() as f64).collect()))
}

pub fn f64s(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

type Op<'a> = dyn Fn(&[Tensor], &[WeightRef]) -> Result<Tensor> + Sync + 'a;
type Reference<'a> = dyn Fn(&[Vec<f64>]) -> Vec<f64> + Sync + 'a;

/// An op under test: its inputs' and weights' shapes, itself, and the same in f64 from (inputs..., weights...).
pub struct Case<'a> {
    pub inputs: &'a [&'a [usize]],
    pub weights: &'a [&'a [usize]],
    pub op: &'a Op<'a>,
    pub reference: &'a Reference<'a>,
}

/// What an op gave: y, and the gradients of sum(y * dy) by inputs and weights, with what they were computed from.
struct Run {
    values: Vec<Vec<f64>>,
    dy: Vec<f64>,
    y: Tensor,
    gradients: Vec<Vec<f64>>,
}

impl Case<'_> {
    /// The op is applied twice to the same inputs and the results added, so that gradients must add up.
    fn run(&self, dtype: DType) -> Run {
        let vars: Vec<Var> = (1..).zip(self.inputs).map(|(seed, &shape)| var(seed, shape, dtype)).collect();
        let weights: Vec<WeightRef> =
            (11..).zip(self.weights).map(|(seed, shape)| weight(seed, shape, dtype, 0.5).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let y = ((self.op)(&tensors, &weights).unwrap() + (self.op)(&tensors, &weights).unwrap()).unwrap();
        let dy = var(21, y.shape(), dtype);
        let grads = (&y * dy.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        Run {
            values: tensors.iter().map(f64s).chain(weights.iter().map(|w| values(w, dtype).unwrap())).collect(),
            dy: f64s(&dy),
            y,
            gradients: vars
                .iter()
                .map(|v| f64s(grads.get(v).expect("a gradient for every input")))
                .chain(weights.iter().map(|w| w.grad().iter().map(|&g| g as f64).collect()))
                .collect(),
        }
    }
}

/// Results against the f64 reference, gradients against its central differences, in all three dtypes.
#[track_caller]
pub fn check(case: &Case) {
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 2.5e-2), (DType::F16, 4e-3)] {
        let run = case.run(dtype);
        assert_eq!(run.y.dtype(), dtype);
        let twice = |values: &[Vec<f64>]| -> Vec<f64> { (case.reference)(values).iter().map(|y| 2.0 * y).collect() };
        close(&f64s(&run.y), &twice(&run.values), tolerance, &format!("{dtype:?} y"));
        for (i, got) in run.gradients.iter().enumerate() {
            let mut values = run.values.clone();
            let want = differences(&run.values[i], |at| {
                values[i].copy_from_slice(at);
                twice(&values).iter().zip(&run.dy).map(|(y, dy)| y * dy).sum()
            });
            close(got, &want, tolerance, &format!("{dtype:?} gradient of input {i}"));
        }
        #[cfg(feature = "emulate")]
        check_on_kernels(case, dtype, &run, tolerance);
    }
}

/// The kernels give what the processor gives, on every kind of device.
#[cfg(feature = "emulate")]
#[track_caller]
fn check_on_kernels(case: &Case, dtype: DType, on_processor: &Run, tolerance: f64) {
    use super::gpu::compute_on;
    use crate::kernels::Launcher;
    use crate::kernels::emulated::Emulated;
    for device in Emulated::each().unwrap() {
        let capability = device.capability();
        if dtype == DType::BF16 && capability < 80 {
            continue;
        }
        let run = compute_on(std::sync::Arc::new(device), || case.run(dtype));
        let what = |part: &str| format!("{dtype:?} {part} on a device of capability {capability}");
        close(&f64s(&run.y), &f64s(&on_processor.y), tolerance, &what("y"));
        for (i, (got, want)) in run.gradients.iter().zip(&on_processor.gradients).enumerate() {
            close(got, want, tolerance, &what(&format!("gradient {i}")));
        }
    }
}

/// The same bits with 1, 2 and 3 threads, results and gradients.
#[track_caller]
pub fn check_threads(case: &Case) {
    let run = |threads| {
        let run = with_threads(threads, || case.run(DType::F32));
        let all = f64s(&run.y).into_iter().chain(run.gradients.into_iter().flatten());
        all.map(|x| x.to_bits()).collect::<Vec<_>>()
    };
    let one = run(1);
    assert!(one == run(2) && one == run(3), "the bits depend on the number of threads");
}

/// Fails unless |got - want| <= tolerance * (1 + |want|) everywhere.
#[track_caller]
pub fn close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * (1.0 + w.abs()), "{what}[{i}]: {g}, not {w}");
    }
}

/// The gradient of `loss` at `x` by central differences.
pub fn differences(x: &[f64], mut loss: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut at = x.to_vec();
    (0..x.len())
        .map(|i| {
            at[i] = x[i] + STEP;
            let above = loss(&at);
            at[i] = x[i] - STEP;
            let below = loss(&at);
            at[i] = x[i];
            (above - below) / (2.0 * STEP)
        })
        .collect()
}

//! Fully connected layer.

mod gpu;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Held, by_dtype, elements, result, tensor};
use super::gemm::{Bias, FEW, Matrix, Out, Product, Scalar, add_column_sums, few_rows};
use super::gpu::{Gpu, cuda_forward, emulated1};
use super::record::apply1_with_weights;
use crate::device::WeightRef;

/// x (..., I), weight (O, I) (or (O, I, 1, 1)), bias (O) -> (..., O): x W^T + b.
///
/// Backward: the gradient of x is dy W; dy^T x is added to the weight's gradient and dy's column sums to the bias's.
pub fn linear(x: &Tensor, weight: &WeightRef, bias: Option<&WeightRef>) -> Result<Tensor> {
    let op = Linear::new(x, weight, bias)?;
    let trains = weight.trainable() || bias.is_some_and(WeightRef::trainable);
    apply1_with_weights(x, op, trains, Linear::back)
}

/// The op that [`linear`] applies to `x`, by itself: its two directions can be called, and measured, without a graph.
pub fn linear_op(x: &Tensor, weight: &WeightRef, bias: Option<&WeightRef>) -> Result<impl CustomOp1 + use<>> {
    Linear::new(x, weight, bias)
}

/// Sums are cut into blocks of multiples of this.
const UNIT: usize = 16;

struct Linear {
    weight: WeightRef,
    bias: Option<WeightRef>,
    outputs: usize,
    inputs: usize,
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if let Some(done) = emulated1(storage, layout, |gpu, x| self.forward_on(gpu, x)) {
            return done;
        }
        let mut shape = layout.dims().to_vec();
        *shape.last_mut().expect("checked in `linear`") = self.outputs;
        by_dtype!(storage.dtype(), self.name(), T => Ok(result(self.forward(elements::<T>(storage, layout)?)?, shape)))
    }

    cuda_forward!(1);

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        self.back(x, dy, true)
    }
}

impl Linear {
    fn new(x: &Tensor, weight: &WeightRef, bias: Option<&WeightRef>) -> Result<Linear> {
        let (outputs, inputs) = match *weight.shape() {
            [o, i] | [o, i, 1, 1] => (o, i),
            ref other => bail!("{}: a linear layer's weight has two dimensions, not {other:?}", weight.name()),
        };
        if x.dims().last() != Some(&inputs) {
            bail!("{}: takes (..., {inputs}), was given {:?}", weight.name(), x.dims());
        }
        if let Some(bias) = bias
            && bias.shape() != [outputs]
        {
            bail!("{}: its bias has shape {:?}, not [{outputs}]", weight.name(), bias.shape());
        }
        Ok(Linear { weight: weight.clone(), bias: bias.cloned(), outputs, inputs })
    }

    /// Adds to the weights' gradients; gives x's if that is wanted.
    fn back(&self, x: &Tensor, dy: &Tensor, wanted: bool) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        if let Some(gpu) = Gpu::of(x)? {
            let (x, dy) = (gpu.operand(x)?, gpu.operand(&dy)?);
            let dx = if wanted { Some(self.input_gradient_on(&gpu, &x, &dy)?) } else { None };
            self.add_weight_gradients_on(&gpu, &x, &dy)?;
            return Ok(dx);
        }
        let (held_x, held_dy) = (Held::new(x), Held::new(&dy));
        by_dtype!(x.dtype(), self.name(), T => {
            let dy = held_dy.elements::<T>()?;
            self.add_weight_gradients(held_x.elements()?, dy)?;
            if wanted { tensor(self.input_gradient(dy)?, x.shape()).map(Some) } else { Ok(None) }
        })
    }

    fn forward<T: Scalar>(&self, x: &[T]) -> Result<Vec<T>> {
        let (rows, inputs, outputs) = (x.len() / self.inputs, self.inputs, self.outputs);
        let weight = self.weight.view::<T>()?;
        let bias: Option<Vec<f32>> = match &self.bias {
            Some(bias) => Some(bias.view::<T>()?.iter().map(|b| b.to_f32()).collect()),
            None => None,
        };
        if (1..=FEW).contains(&rows) {
            return Ok(few_rows(x, rows, &weight, bias.as_deref(), UNIT));
        }
        let (x, weight) = (Matrix::new(x, rows, inputs, inputs, 1), Matrix::new(&weight, inputs, outputs, 1, inputs));
        let product = Product::new(&x, &weight, UNIT);
        Ok(product.to_vec(bias.as_deref().map_or(Bias::None, Bias::Column)))
    }

    fn input_gradient<T: Scalar>(&self, dy: &[T]) -> Result<Vec<T>> {
        let (rows, inputs, outputs) = (dy.len() / self.outputs, self.inputs, self.outputs);
        let weight = self.weight.view::<T>()?;
        let (dy, weight) =
            (Matrix::new(dy, rows, outputs, outputs, 1), Matrix::new(&weight, outputs, inputs, inputs, 1));
        let product = Product::new(&dy, &weight, UNIT);
        Ok(product.to_vec(Bias::None))
    }

    fn add_weight_gradients<T: Scalar>(&self, x: &[T], dy: &[T]) -> Result<()> {
        let (rows, inputs, outputs) = (x.len() / self.inputs, self.inputs, self.outputs);
        let (turned, x) = (Matrix::new(dy, outputs, rows, 1, outputs), Matrix::new(x, rows, inputs, inputs, 1));
        let product = Product::new(&turned, &x, UNIT);
        self.weight.add_grad(|gradient| product.run(Out::adding(gradient, inputs, 0)))?;
        match &self.bias {
            Some(bias) => bias.add_grad(|gradient| add_column_sums(dy, gradient)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Element;
    use crate::device::threads::with_threads;
    use crate::ops::gemm::numbers;
    use candle_core::{DType, Device, Var};
    use half::{bf16, f16};

    fn flat(t: &Tensor) -> Vec<f32> {
        t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn close(got: &[f32], want: impl Fn(usize) -> f64, tolerance: f64, what: &str) {
        for (i, &g) in got.iter().enumerate() {
            let w = want(i);
            assert!((g as f64 - w).abs() <= tolerance * (1.0 + w.abs()), "{what} {i}: {g} for {w}");
        }
    }

    fn check<T: Element>(rows: usize, inputs: usize, outputs: usize, tolerance: f64) {
        let typed = |count, seed| numbers(count, seed).iter().map(|&x| T::from_f32(x)).collect::<Vec<T>>();
        let wide = |v: &[T]| v.iter().map(|x| x.to_f32() as f64).collect::<Vec<f64>>();
        let (x, w, b, dy) =
            (typed(rows * inputs, 1), typed(outputs * inputs, 2), typed(outputs, 3), typed(rows * outputs, 4));
        let weight = WeightRef::alone("w", &[outputs, inputs], &w, true).unwrap();
        let bias = WeightRef::alone("b", &[outputs], &b, true).unwrap();
        let xt = Var::from_tensor(&Tensor::from_slice(&x, (1, rows, inputs), &Device::Cpu).unwrap()).unwrap();
        let y = linear(&xt, &weight, Some(&bias)).unwrap();
        assert_eq!(y.dims(), [1, rows, outputs]);
        let seed = Tensor::from_slice(&dy, (1, rows, outputs), &Device::Cpu).unwrap();
        let pull = || (&y * &seed).unwrap().backward().unwrap();
        let dx = flat(pull().get(&xt).unwrap());
        let (x, w, b, dy) = (wide(&x), wide(&w), wide(&b), wide(&dy));
        let what = format!("{:?} {rows} {inputs} {outputs}", T::DTYPE);
        let sum = |count: usize, term: &dyn Fn(usize) -> f64| (0..count).map(term).sum::<f64>();
        close(
            &flat(&y),
            |at| b[at % outputs] + sum(inputs, &|k| x[at / outputs * inputs + k] * w[at % outputs * inputs + k]),
            tolerance,
            &format!("{what} y"),
        );
        close(
            &dx,
            |at| sum(outputs, &|o| dy[at / inputs * outputs + o] * w[o * inputs + at % inputs]),
            tolerance,
            &format!("{what} dx"),
        );
        let dw = |at: usize| sum(rows, &|r| dy[r * outputs + at / inputs] * x[r * inputs + at % inputs]);
        let db = |at: usize| sum(rows, &|r| dy[r * outputs + at]);
        close(&weight.grad(), dw, 1e-5, &format!("{what} dw"));
        close(&bias.grad(), db, 1e-5, &format!("{what} db"));
        pull();
        close(&weight.grad(), |at| 2.0 * dw(at), 1e-5, &format!("{what} dw twice"));
        close(&bias.grad(), |at| 2.0 * db(at), 1e-5, &format!("{what} db twice"));
    }

    #[test]
    fn rows_times_weights_with_and_without_a_bias() {
        use crate::ops::testing::{Case, check};
        let reference = |v: &[Vec<f64>]| -> Vec<f64> {
            let one = |row: &[f64], o: usize| {
                let sum: f64 = row.iter().zip(&v[1][5 * o..]).map(|(x, w)| x * w).sum();
                sum + v.get(2).map_or(0.0, |bias| bias[o])
            };
            v[0].chunks(5).flat_map(|row| (0..4).map(move |o| one(row, o))).collect()
        };
        let (x, w): (&[usize], &[usize]) = (&[2, 3, 5], &[4, 5]);
        check(&Case {
            inputs: &[x],
            weights: &[w, &[4]],
            op: &|x, w| linear(&x[0], &w[0], Some(&w[1])),
            reference: &reference,
        });
        check(&Case { inputs: &[x], weights: &[w], op: &|x, w| linear(&x[0], &w[0], None), reference: &reference });
    }

    #[test]
    fn forward_and_gradients_equal_the_definition() {
        for (rows, inputs, outputs) in
            [(1, 1, 1), (2, 3, 7), (13, 17, 33), (65, 100, 13), (100, 7, 65), (33, 400, 2), (3, 33, 1000)]
        {
            check::<f32>(rows, inputs, outputs, 1e-5);
            check::<bf16>(rows, inputs, outputs, 1.0 / 250.0);
            check::<f16>(rows, inputs, outputs, 1.0 / 2000.0);
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let (rows, inputs, outputs) = (300, 170, 610);
        let run = || {
            let weight = WeightRef::alone("w", &[outputs, inputs], &numbers(outputs * inputs, 5), true).unwrap();
            let bias = WeightRef::alone("b", &[outputs], &numbers(outputs, 7), true).unwrap();
            let x = Tensor::from_vec(numbers(rows * inputs, 6), (rows, inputs), &Device::Cpu).unwrap();
            let x = Var::from_tensor(&x).unwrap();
            let y = linear(&x, &weight, Some(&bias)).unwrap();
            let dx = flat(y.sqr().unwrap().backward().unwrap().get(&x).unwrap());
            let all = [flat(&y), dx, weight.grad(), bias.grad()].concat();
            all.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
        };
        let alone = with_threads(1, run);
        assert_eq!(alone, with_threads(2, run));
        assert_eq!(alone, with_threads(3, run));
    }

    #[test]
    fn frozen_weights_collect_nothing_and_shapes_are_checked() {
        let weight = WeightRef::alone("w", &[2, 3, 1, 1], &[1f32; 6], false).unwrap();
        let x = Var::from_tensor(&Tensor::ones((4, 3), DType::F32, &Device::Cpu).unwrap()).unwrap();
        let y = linear(&x, &weight, None).unwrap();
        let dx = y.backward().unwrap().get(&x).unwrap().clone();
        assert_eq!(flat(&dx), [2f32; 12]);
        assert!(weight.grad().is_empty());
        let wrong = linear(&Tensor::ones((4, 2), DType::F32, &Device::Cpu).unwrap(), &weight, None);
        assert!(wrong.unwrap_err().to_string().contains("w: takes (..., 3)"));
    }
}

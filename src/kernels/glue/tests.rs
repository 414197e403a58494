//! Against the ops on the CPU; what only moves numbers, and what adds them in the same order, to the bit.

use candle_core::{DType, Device, Tensor, Var};

use super::moves::{Resample, join_rows, split_rows, transpose};
use super::sums::{Embedding, Planes, add_bias, add_column_sums};
use super::*;
use crate::diffusion::{RowShape, loss_and_gradient};
use crate::kernels::testing::{DTYPES, Memory, Values, devices, expected};
use crate::ops;
use crate::ops::testing::{close, f64s, numbers, weight};

const F32: DType = DType::F32;
/// Each with whole packs and without.
const SKIPS: [usize; 2] = [0, 1];

fn values(seed: u64, len: usize) -> Vec<f64> {
    numbers(seed, len).iter().map(|&x| x.into()).collect()
}

/// As many numbers as there are to come.
fn room(dtype: DType, len: usize, skip: usize) -> Memory {
    Memory::unwritten(dtype, len, skip)
}

#[test]
fn activations_and_gates_are_the_cpus() {
    for device in devices() {
        for ((dtype, tolerance), skip) in DTYPES.into_iter().flat_map(|d| SKIPS.map(|skip| (d, skip))) {
            for (function, kind) in [
                (Function::Silu, ops::Activation::Silu),
                (Function::Gelu, ops::Activation::Gelu),
                (Function::QuickGelu, ops::Activation::QuickGelu),
            ] {
                // Into both tails.
                let op = |x: &[Tensor]| ops::activation(&(&x[0] * 9.0).unwrap(), kind).unwrap();
                let (inputs, want) = expected(dtype, &[&[7, 301]], &op);
                let n = want.y.len();
                let nine = |x: &Vec<f64>| Memory::new(dtype, &x.iter().map(|x| x * 9.0).collect::<Vec<_>>(), skip);
                let (x, dy) = (nine(&inputs[0]), Memory::new(dtype, &want.dy, skip));
                let (y, dx) = (room(dtype, n, skip), room(dtype, n, skip));
                activation(device, function, dtype, x.address(), y.address(), n).unwrap();
                activation_backward(device, function, dtype, x.address(), dy.address(), dx.address(), n).unwrap();
                close(&y.get(), &want.y, tolerance, &format!("{kind:?} {dtype:?}"));
                let nine_dx: Vec<f64> = dx.get().iter().map(|dx| dx * 9.0).collect();
                close(&nine_dx, &want.gradients[0], 2.0 * tolerance, &format!("{kind:?} {dtype:?} dx"));
            }
            for (rows, width) in [(5, 64), (3, 37), (1, 1), (2, 2056)] {
                let (inputs, want) = expected(dtype, &[&[rows, 2 * width]], &|x| ops::geglu(&x[0]).unwrap());
                let (x, dy) = (Memory::new(dtype, &inputs[0], skip), Memory::new(dtype, &want.dy, skip));
                let (y, dx) = (room(dtype, rows * width, skip), room(dtype, 2 * rows * width, skip));
                geglu(device, dtype, x.address(), y.address(), rows, width).unwrap();
                geglu_backward(device, dtype, x.address(), dy.address(), dx.address(), rows, width).unwrap();
                close(&y.get(), &want.y, tolerance, "geglu");
                close(&dx.get(), &want.gradients[0], tolerance, "geglu dx");
            }
        }
    }
}

#[test]
fn numbers_far_out_stay_numbers() {
    let x = [-1e30, -200.0, -100.0, -88.5, -0.0, 0.0, 88.5, 100.0, 1e20, 1e30];
    let Some(&device) = devices().first() else { return };
    for function in [Function::Silu, Function::Gelu, Function::QuickGelu] {
        let one = Memory::new(F32, &[1.0; 10], 0);
        let (from, y, dx) = (Memory::new(F32, &x, 0), room(F32, 10, 0), room(F32, 10, 0));
        activation(device, function, F32, from.address(), y.address(), 10).unwrap();
        activation_backward(device, function, F32, from.address(), one.address(), dx.address(), 10).unwrap();
        for (i, &x) in x.iter().enumerate() {
            let (y, dx) = (y.get()[i], dx.get()[i]);
            let want = if x > 50.0 { (f64::from(x as f32), 1.0) } else { (0.0, if x == 0.0 { 0.5 } else { 0.0 }) };
            assert!(
                (y - want.0).abs() <= 1e-6 * want.0 + 1e-30 && (dx - want.1).abs() < 1e-6,
                "{function:?}({x}): {y} {dx}"
            );
        }
    }
}

#[test]
fn sums_conversions_and_constants_are_exact() {
    for device in devices() {
        for (dtype, skip) in DTYPES.into_iter().flat_map(|(d, _)| SKIPS.map(|skip| (d, skip))) {
            const N: usize = 1003;
            let (a, b) = (Memory::new(dtype, &values(1, N), skip), Memory::new(dtype, &values(2, N), skip));
            let rounded = |x: Vec<f64>, dtype| Memory::new(dtype, &x, 0).get();
            let pairs = |f: &dyn Fn(f32, f32) -> f32| -> Vec<f64> {
                a.get().iter().zip(b.get()).map(|(&a, b)| f(a as f32, b as f32).into()).collect()
            };
            let y = room(dtype, N, skip);
            add(device, dtype, a.address(), b.address(), y.address(), N).unwrap();
            assert_eq!(y.get(), rounded(pairs(&|a, b| a + b), dtype));
            affine(device, dtype, a.address(), y.address(), N, 2.3, -1.1).unwrap();
            assert_eq!(y.get(), rounded(pairs(&|a, _| a * 2.3 - 1.1), dtype));
            fill(device, dtype, y.address(), N, 0.3).unwrap();
            assert_eq!(y.get(), rounded(vec![f64::from(0.3f32); N], dtype));
            for (to, _) in DTYPES {
                let y = Memory::new(to, &values(3, N), skip);
                let before = y.get();
                accumulate(device, (dtype, a.address()), (to, y.address()), N, 0.7).unwrap();
                let sum = before.iter().zip(a.get()).map(|(&y, a)| f64::from(y as f32 + a as f32 * 0.7));
                assert_eq!(y.get(), rounded(sum.collect(), to), "{dtype:?} to {to:?}");
                cast(device, (dtype, a.address()), (to, y.address()), N, 1.0).unwrap();
                assert_eq!(y.get(), rounded(a.get(), to), "{dtype:?} to {to:?}");
            }
        }
    }
}

#[test]
fn channels_are_joined_parted_and_turned() {
    for device in devices() {
        for (dtype, skip) in DTYPES.into_iter().flat_map(|(d, _)| SKIPS.map(|skip| (d, skip))) {
            for (rows, a_width, b_width) in [(3, 64, 24), (2, 5, 7), (1, 320, 8)] {
                let (a, b) = (values(1, rows * a_width), values(2, rows * b_width));
                let (a, b) = (Memory::new(dtype, &a, skip), Memory::new(dtype, &b, skip));
                let y = room(dtype, rows * (a_width + b_width), skip);
                join_rows(device, dtype, (a.address(), a_width), (b.address(), b_width), y.address(), rows).unwrap();
                let (in_a, in_b) = (a.get(), b.get());
                let row = |i: usize| [&in_a[i * a_width..][..a_width], &in_b[i * b_width..][..b_width]].concat();
                assert_eq!(y.get(), (0..rows).flat_map(row).collect::<Vec<_>>());
                let (a, b) = (room(dtype, in_a.len(), skip), room(dtype, in_b.len(), skip));
                split_rows(device, dtype, y.address(), (a.address(), a_width), (b.address(), b_width), rows).unwrap();
                assert!(a.get() == in_a && b.get() == in_b);
            }
            for (batch, rows, columns) in [(2, 64, 96), (1, 7, 33), (3, 2, 66), (1, 130, 70), (2, 1, 5)] {
                let x = Memory::new(dtype, &values(3, batch * rows * columns), skip);
                let y = room(dtype, batch * rows * columns, skip);
                transpose(device, dtype, x.address(), y.address(), batch, rows, columns).unwrap();
                let (x, size) = (x.get(), rows * columns);
                let from = |i: usize| x[i / size * size + i % size % rows * columns + i % size / rows];
                assert_eq!(y.get(), (0..x.len()).map(from).collect::<Vec<_>>(), "{batch} {rows} {columns}");
            }
        }
    }
}

#[test]
fn pixels_are_repeated_and_their_gradients_summed() {
    for device in devices() {
        for ((dtype, tolerance), skip) in DTYPES.into_iter().flat_map(|d| SKIPS.map(|skip| (d, skip))) {
            for (from, to) in
                [([4, 16], [8, 32]), ([3, 5], [6, 10]), ([5, 5], [9, 9]), ([4, 6], [3, 3]), ([2, 3], [82, 123])]
            {
                let ([h, w], [height, width]) = (from, to);
                let shape = [2, 3, h, w];
                let op = |x: &[Tensor]| ops::upsample_nearest(&x[0], height, width).unwrap();
                let (inputs, want) = expected(dtype, &[&shape], &op);
                let resample = Resample { dtype, planes: 6, from, to };
                let (x, dy) = (Memory::new(dtype, &inputs[0], skip), Memory::new(dtype, &want.dy, skip));
                let (y, dx) = (room(dtype, 6 * height * width, skip), room(dtype, 6 * h * w, skip));
                resample.forward(device, x.address(), y.address()).unwrap();
                resample.backward(device, dy.address(), dx.address()).unwrap();
                assert_eq!(y.get(), want.y, "{resample:?}");
                // The same order of the sums; but one of the CPU's loops adds pairs first.
                close(&dx.get(), &want.gradients[0], tolerance, &format!("{resample:?}"));
            }
        }
    }
}

#[test]
fn biases_are_added_and_their_gradients_summed() {
    for device in devices() {
        for ((dtype, tolerance), skip) in DTYPES.into_iter().flat_map(|d| SKIPS.map(|skip| (d, skip))) {
            for (batch, channels, h, w) in [(2, 3, 4, 16), (2, 5, 3, 5), (1, 2, 48, 48)] {
                let (shape, plane) = ([batch, channels, h, w], h * w);
                let op = |x: &[Tensor]| ops::add_channels(&x[0], &x[1]).unwrap();
                let (inputs, want) = expected(dtype, &[&shape, &shape[..2]], &op);
                let planes = Planes { dtype, planes: batch * channels, pixels: plane, channels: batch * channels };
                let [x, t, dy] = [&inputs[0], &inputs[1], &want.dy].map(|x| Memory::new(dtype, x, skip));
                let (y, dt) = (room(dtype, want.y.len(), skip), room(dtype, batch * channels, 0));
                planes.add(device, x.address(), t.address(), y.address()).unwrap();
                planes.sum(device, dy.address(), dt.address()).unwrap();
                assert_eq!(y.get(), want.y);
                close(&dt.get(), &want.gradients[1], tolerance, "dt");
                // The same number for every batch row.
                let planes = Planes { channels, ..planes };
                planes.add(device, x.address(), t.address(), y.address()).unwrap();
                let (x, t, dy) = (x.get(), t.get(), dy.get());
                let channel = |i: usize| i / plane % channels;
                let sum = (0..x.len()).map(|i| f64::from(x[i] as f32 + t[channel(i)] as f32));
                assert_eq!(y.get(), Memory::new(dtype, &sum.collect::<Vec<_>>(), 0).get());
                let mut sums = vec![0.25; channels];
                let grad = Memory::new(F32, &sums, 1);
                let dy_memory = Memory::new(dtype, &dy, skip);
                planes.add_sums(device, dy_memory.address(), grad.address()).unwrap();
                dy.iter().enumerate().for_each(|(i, dy)| sums[channel(i)] += dy);
                close(&grad.get(), &sums, 1e-5, "bias");
            }
            for (rows, width) in [(5, 64), (300, 33), (1, 520), (129, 40)] {
                let [x, residual] = [1, 2].map(|seed| Memory::new(dtype, &values(seed, rows * width), skip));
                let bias = Memory::new(dtype, &values(3, width), skip);
                let y = room(dtype, rows * width, skip);
                let rounded = |x: f64| Memory::new(dtype, &[x], 0).get()[0];
                let at = [x.address(), bias.address(), residual.address(), y.address()];
                add_bias(device, dtype, at[0], at[1], at[2], at[3], rows, width).unwrap();
                let (x, residual, bias) = (x.get(), residual.get(), bias.get());
                let first = |i: usize| rounded(f64::from(x[i] as f32 + bias[i % width] as f32));
                let both = |i: usize| rounded(f64::from(first(i) as f32 + residual[i] as f32));
                assert_eq!(y.get(), (0..x.len()).map(both).collect::<Vec<_>>());
                add_bias(device, dtype, Address::NULL, at[1], Address::NULL, at[3], rows, width).unwrap();
                assert_eq!(y.get(), (0..x.len()).map(|i| bias[i % width]).collect::<Vec<_>>());
                let mut sums = vec![0.25; width];
                let grad = Memory::new(F32, &sums, 0);
                add_column_sums(device, dtype, at[0], grad.address(), rows, width).unwrap();
                x.iter().enumerate().for_each(|(i, x)| sums[i % width] += x);
                close(&grad.get(), &sums, 1e-5, "columns");
            }
        }
    }
}

#[test]
fn embeddings_are_looked_up_and_their_gradients_added_in_order() {
    const IDS: [u32; 8] = [1, 4, 1, 0, 1, 2, 2, 1];
    let leaf = Var::from_tensor(&Tensor::from_slice(&IDS, (2, 4), &Device::Cpu).unwrap()).unwrap();
    for device in devices() {
        for ((dtype, skip), width) in
            DTYPES.into_iter().flat_map(|(d, _)| SKIPS.map(|s| (d, s))).flat_map(|c| [40, 7, 300].map(|w| (c, w)))
        {
            let (table, places) =
                (weight(1, &[5, width], dtype, 0.0).unwrap(), weight(2, &[4, width], dtype, 0.0).unwrap());
            let y = ops::embedding(&leaf, &table, Some(&places), dtype).unwrap();
            let dy = crate::ops::testing::var(3, y.shape(), dtype);
            (&y * dy.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
            let embedding = Embedding { dtype, batch: 2, length: 4, rows: 5, width };
            let [t, p] = [(1, 5), (2, 4)].map(|(seed, rows)| Memory::new(dtype, &values(seed, rows * width), skip));
            let (ids, wrong) = (Values::new(&IDS), Values::new(&[0u32]));
            let out = room(dtype, 8 * width, skip);
            let (t, p, i) = (t.address(), p.address(), ids.address());
            embedding.forward(device, i, t, p, out.address(), wrong.address()).unwrap();
            assert!(out.get() == f64s(&y) && wrong.get() == [0]);
            let dy = Memory::new(dtype, &f64s(&dy), skip);
            let grads = [5, 4].map(|rows| Memory::new(F32, &vec![0.0; rows * width], skip));
            embedding.backward(device, i, dy.address(), grads[0].address(), grads[1].address()).unwrap();
            for (grad, weight) in grads.iter().zip([&table, &places]) {
                assert_eq!(grad.get(), weight.grad().iter().map(|&g| f64::from(g)).collect::<Vec<_>>());
            }
            embedding.backward(device, i, dy.address(), Address::NULL, Address::NULL).unwrap();
            // A token that is no row of the table.
            let embedding = Embedding { rows: 4, ..embedding };
            embedding.forward(device, i, t, Address::NULL, out.address(), wrong.address()).unwrap();
            assert!(out.get()[width..2 * width].iter().all(|&x| x == 0.0) && wrong.get() == [1]);
        }
    }
}

#[test]
fn the_objectives_gradient_is_the_cpus_to_the_bit() {
    let weights = [0.25, 0.5, 0.35];
    for device in devices() {
        for (dtype, _) in DTYPES {
            for (used, predicted) in [(1000, 1000), (77, 154)] {
                let prediction = Memory::new(dtype, &values(1, 3 * predicted), 1);
                let target: Vec<f32> = numbers(2, 3 * used);
                let wide: Vec<f32> = prediction.get().iter().map(|&x| x as f32).collect();
                let shape = RowShape { target_channels: 1, prediction_channels: predicted / used, plane: used };
                let mut want = vec![0f32; 3 * predicted];
                let loss = loss_and_gradient(&wide, &target, shape, &weights, 2, &mut want);
                let objective = Objective { dtype, rows: 3, used, predicted };
                let factors = Values::new(&weights.map(|weight| objective.factor(weight, 2)));
                let target = Values::new(&target);
                let (gradient, mse) = (room(dtype, 3 * predicted, 0), Values::<f64>::unwritten(3));
                let (p, t, f) = (prediction.address(), target.address(), factors.address());
                objective.gradient(device, p, t, f, 1024.0, gradient.address(), mse.address()).unwrap();
                let want: Vec<f64> = want.iter().map(|g| f64::from(g * 1024.0)).collect();
                assert_eq!(gradient.get(), Memory::new(dtype, &want, 0).get());
                let off = mse.get().iter().zip(&loss.row_mse).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(off < 1e-14, "{off}");
            }
        }
    }
}

use super::*;
use crate::device::threads::with_threads;
use crate::ops::gemm::{Isa, numbers, with_isa};
use candle_core::{DType, Device, Var};
use half::bf16;

#[derive(Clone, Copy, Debug)]
struct Case {
    images: usize,
    inputs: usize,
    outputs: usize,
    input: (usize, usize),
    kernel: (usize, usize),
    conv: Conv2d,
}

fn cases() -> Vec<Case> {
    let uneven = Conv2d { stride: 2, top: 0, bottom: 1, left: 0, right: 1 };
    let odd = Conv2d { stride: 3, top: 2, bottom: 0, left: 1, right: 3 };
    let case = |images, inputs, outputs, input, kernel, conv| Case { images, inputs, outputs, input, kernel, conv };
    vec![
        case(2, 5, 7, (9, 9), (3, 3), Conv2d::new(1, 1)),
        case(1, 4, 17, (16, 16), (3, 3), Conv2d::new(1, 1)),
        case(3, 17, 4, (8, 8), (3, 3), Conv2d::new(2, 1)),
        case(2, 3, 5, (9, 7), (3, 3), uneven),
        case(2, 2, 3, (10, 11), (3, 2), odd),
        // Enough channels that the data gradient is not folded.
        case(2, 19, 5, (9, 7), (3, 3), uneven),
        case(2, 30, 3, (10, 11), (3, 2), odd),
        case(1, 9, 17, (16, 16), (3, 3), Conv2d::new(1, 1)),
        case(1, 15, 4, (5, 6), (1, 1), Conv2d::new(2, 0)),
        case(2, 20, 2, (3, 3), (3, 3), Conv2d::new(1, 0)),
        case(1, 11, 2, (9, 20), (5, 3), Conv2d::new(1, 2)),
        case(2, 33, 20, (7, 5), (1, 1), Conv2d::new(1, 0)),
        case(1, 3, 4, (5, 6), (1, 1), Conv2d::new(2, 0)),
        case(1, 2, 2, (3, 3), (3, 3), Conv2d::new(1, 0)),
        case(2, 50, 3, (33, 17), (3, 3), Conv2d::new(1, 1)),
        case(1, 3, 2, (64, 64), (5, 3), Conv2d::new(1, 2)),
        case(5, 3, 40, (1, 1), (3, 3), Conv2d::new(1, 1)),
    ]
}

/// The definition, in f64: y, and with dy given, dx, dw and db.
struct Plain {
    y: Vec<f64>,
    dx: Vec<f64>,
    dw: Vec<f64>,
    db: Vec<f64>,
    output: (usize, usize),
}

fn plain_loop(case: Case, x: &[f32], w: &[f32], b: &[f32], dy: impl Fn(usize) -> f32) -> Plain {
    let Case { images, inputs, outputs, input: (h, wd), kernel: (kh, kw), conv } = case;
    let oh = (h + conv.top + conv.bottom - kh) / conv.stride + 1;
    let ow = (wd + conv.left + conv.right - kw) / conv.stride + 1;
    let mut p = Plain {
        y: vec![0.0; images * outputs * oh * ow],
        dx: vec![0.0; x.len()],
        dw: vec![0.0; w.len()],
        db: vec![0.0; b.len()],
        output: (oh, ow),
    };
    for at in 0..p.y.len() {
        let (ox, oy, o, i) = (at % ow, at / ow % oh, at / (ow * oh) % outputs, at / (ow * oh * outputs));
        let d = dy(at) as f64;
        p.y[at] = b[o] as f64;
        p.db[o] += d;
        for c in 0..inputs {
            for ky in 0..kh {
                for kx in 0..kw {
                    let (iy, ix) = (oy * conv.stride + ky, ox * conv.stride + kx);
                    if iy < conv.top || ix < conv.left || iy - conv.top >= h || ix - conv.left >= wd {
                        continue;
                    }
                    let from = ((i * inputs + c) * h + iy - conv.top) * wd + ix - conv.left;
                    let weight = ((o * inputs + c) * kh + ky) * kw + kx;
                    p.y[at] += x[from] as f64 * w[weight] as f64;
                    p.dx[from] += d * w[weight] as f64;
                    p.dw[weight] += d * x[from] as f64;
                }
            }
        }
    }
    p
}

fn close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!((g as f64 - w).abs() <= tolerance * (1.0 + w.abs()), "{what} {i}: {g} for {w}");
    }
}

fn check<T: crate::device::Element>(case: Case, round: impl Fn(f32) -> f32, tolerance: f64) {
    let Case { images, inputs, outputs, input: (h, w), kernel: (kh, kw), conv } = case;
    let rounded = |count, seed| numbers(count, seed).into_iter().map(&round).collect::<Vec<f32>>();
    let (x, wv, bv) =
        (rounded(images * inputs * h * w, 1), rounded(outputs * inputs * kh * kw, 2), rounded(outputs, 3));
    let typed = |v: &[f32]| v.iter().map(|&x| T::from_f32(x)).collect::<Vec<T>>();
    let weight = WeightRef::alone("w", &[outputs, inputs, kh, kw], &typed(&wv), true).unwrap();
    let bias = WeightRef::alone("b", &[outputs], &typed(&bv), true).unwrap();
    let xt = Tensor::from_vec(typed(&x), (images, inputs, h, w), &Device::Cpu).unwrap();
    let xt = Var::from_tensor(&xt).unwrap();
    let y = conv2d(&xt, &weight, Some(&bias), conv).unwrap();
    let seed = rounded(y.elem_count(), 4);
    let plain = plain_loop(case, &x, &wv, &bv, |at| seed[at]);
    assert_eq!(y.dims(), [images, outputs, plain.output.0, plain.output.1], "{case:?}");
    let seed = Tensor::from_vec(typed(&seed), y.dims(), &Device::Cpu).unwrap();
    let grads = (&y * seed).unwrap().backward().unwrap();
    let flat = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    close(&flat(&y), &plain.y, tolerance, &format!("{case:?} y"));
    close(&flat(grads.get(&xt).unwrap()), &plain.dx, tolerance, &format!("{case:?} dx"));
    let depth = (images * plain.output.0 * plain.output.1) as f64;
    close(&weight.grad(), &plain.dw, 1e-6 * depth.sqrt(), &format!("{case:?} dw"));
    close(&bias.grad(), &plain.db, 1e-6 * depth.sqrt(), &format!("{case:?} db"));
    // A second backward adds.
    (&y * seed_of(&y, T::from_f32)).unwrap().backward().unwrap();
    let more = plain_loop(case, &x, &wv, &bv, |_| 0.5);
    let sum: Vec<f64> = plain.dw.iter().zip(&more.dw).map(|(a, b)| a + b).collect();
    close(&weight.grad(), &sum, 3e-6 * depth.sqrt(), &format!("{case:?} dw twice"));
}

fn seed_of<T: crate::device::Element>(y: &Tensor, typed: impl Fn(f32) -> T) -> Tensor {
    Tensor::from_vec(vec![typed(0.5); y.elem_count()], y.dims(), &Device::Cpu).unwrap()
}

#[test]
fn forward_and_gradients_equal_the_definition() {
    for isa in Isa::available() {
        for case in cases() {
            with_isa(isa, || check::<f32>(case, |x| x, 1e-5));
        }
    }
}

#[test]
fn half_precision_rounds_only_the_results() {
    for isa in Isa::available() {
        for case in cases() {
            with_isa(isa, || {
                check::<bf16>(case, |x| bf16::from_f32(x).to_f32(), 1.0 / 250.0);
                check::<half::f16>(case, |x| half::f16::from_f32(x).to_f32(), 1.0 / 2000.0);
            });
        }
    }
}

/// The kernels give the definition, too, on every kind of device.
#[cfg(feature = "emulate")]
#[test]
fn kernels_equal_the_definition() {
    use crate::kernels::Launcher;
    use crate::kernels::emulated::Emulated;
    use crate::ops::gpu::compute_on;
    let small = |case: &Case| case.images * case.inputs * case.outputs * case.input.0 * case.input.1 < 20_000;
    for device in Emulated::each().unwrap() {
        let bf16s = device.capability() >= 80;
        compute_on(std::sync::Arc::new(device), || {
            for case in cases().into_iter().filter(small) {
                check::<f32>(case, |x| x, 1e-5);
                check::<half::f16>(case, |x| half::f16::from_f32(x).to_f32(), 1.0 / 2000.0);
                if bf16s {
                    check::<bf16>(case, |x| bf16::from_f32(x).to_f32(), 1.0 / 250.0);
                }
            }
        });
    }
}

#[test]
fn an_image_has_the_same_bits_alone_and_in_a_batch() {
    for case in cases().into_iter().filter(|c| c.images > 1) {
        let Case { images, inputs, outputs, input: (h, w), kernel: (kh, kw), conv } = case;
        let weight = numbers(outputs * inputs * kh * kw, 5);
        let run = |x: Tensor| {
            let weight = WeightRef::alone("w", &[outputs, inputs, kh, kw], &weight, true).unwrap();
            let x = Var::from_tensor(&x).unwrap();
            let y = conv2d(&x, &weight, None, conv).unwrap();
            let dx = y.sqr().unwrap().backward().unwrap().get(&x).unwrap().clone();
            let bits = |t: &Tensor| t.to_vec_bits();
            (bits(&y), bits(&dx))
        };
        let x = Tensor::from_vec(numbers(images * inputs * h * w, 6), (images, inputs, h, w), &Device::Cpu).unwrap();
        let (y, dx) = run(x.clone());
        for i in 0..images {
            let (one, one_dx) = run(x.narrow(0, i, 1).unwrap().contiguous().unwrap());
            assert_eq!(one, y[i * one.len()..][..one.len()], "{case:?}");
            assert_eq!(one_dx, dx[i * one_dx.len()..][..one_dx.len()], "{case:?}");
        }
    }
}

#[test]
fn neither_threads_nor_instruction_sets_change_a_bit() {
    let case = Case { images: 2, inputs: 70, outputs: 100, input: (32, 32), kernel: (3, 3), conv: Conv2d::new(1, 1) };
    let Case { images, inputs, outputs, input: (h, w), kernel: (kh, kw), conv } = case;
    let run = || {
        let weight =
            WeightRef::alone("w", &[outputs, inputs, kh, kw], &numbers(outputs * inputs * 9, 5), true).unwrap();
        let bias = WeightRef::alone("b", &[outputs], &numbers(outputs, 7), true).unwrap();
        let x = Tensor::from_vec(numbers(images * inputs * h * w, 6), (images, inputs, h, w), &Device::Cpu).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        let y = conv2d(&x, &weight, Some(&bias), conv).unwrap();
        let dx = y.sqr().unwrap().backward().unwrap().get(&x).unwrap().clone();
        let mut bits = [y.to_vec_bits(), dx.to_vec_bits()].concat();
        bits.extend(weight.grad().iter().chain(&bias.grad()).map(|v| v.to_bits()));
        bits
    };
    let alone = with_threads(1, run);
    for isa in Isa::available() {
        assert_eq!(alone, with_threads(2, || with_isa(isa, run)), "{isa:?}");
        assert_eq!(alone, with_threads(3, || with_isa(isa, run)), "{isa:?}");
    }
}

trait Bits {
    fn to_vec_bits(&self) -> Vec<u32>;
}

impl Bits for Tensor {
    fn to_vec_bits(&self) -> Vec<u32> {
        self.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|v| v.to_bits()).collect()
    }
}

//! Launch configurations for every capability; under the emulator the kernels against `ops::conv2d` in f32.

use super::*;

fn convolution(dtype: DType, images: usize, channels: (usize, usize), input: (usize, usize)) -> Convolution {
    let (inputs, outputs) = channels;
    let (top, bottom, left, right) = (1, 1, 1, 1);
    Convolution { dtype, images, inputs, outputs, input, kernel: (3, 3), stride: 1, top, bottom, left, right }
}

#[test]
fn every_shape_can_be_launched_everywhere() {
    let shapes =
        [(4, 320, 64), (320, 320, 64), (960, 640, 32), (2560, 1280, 8), (1280, 1280, 16), (320, 4, 64), (3, 128, 512)];
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (inputs, outputs, side) in shapes {
            for images in [1, 4, 16] {
                for kernel in [(3, 3), (1, 1), (8, 8), (5, 5)] {
                    let conv = Convolution { kernel, ..convolution(dtype, images, (inputs, outputs), (side, side)) };
                    for multiprocessors in [16, 46, 132] {
                        for product in [conv.forward_product(), conv.input_product(), conv.weight_product()] {
                            let cut = product.cut(dtype, multiprocessors);
                            assert!(
                                cut.parts * cut.part >= product.depth && (cut.parts - 1) * cut.part < product.depth
                            );
                            assert!(cut.part % DEPTH == 0 && product.parts(cut) <= MOST_PARTS_BYTES);
                            let table = conv.taps() * cut.tile * 4;
                            let (name, grid) = conv.configuration("pixels", product, cut, table).unwrap();
                            // And f32's tiles, which are static.
                            let grid =
                                Grid { shared: grid.shared + if dtype == DType::F32 { 8704 } else { 0 }, ..grid };
                            grid.check(75).unwrap_or_else(|e| panic!("{name} for {conv:?}: {e}"));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn few_tiles_have_their_sums_cut() {
    let deep = convolution(DType::BF16, 1, (1280, 1280), (8, 8));
    let cut = deep.forward_product().cut(DType::BF16, 46);
    assert_eq!((cut.tile, cut.parts), (64, 4));
    let wide = convolution(DType::BF16, 4, (320, 320), (64, 64));
    assert_eq!(wide.forward_product().cut(DType::BF16, 46), Cut { tile: 128, parts: 1, part: 2880 });
}

#[cfg(feature = "emulate")]
mod emulated {
    use candle_core::{Device, Tensor, Var};
    use half::{bf16, f16};

    use super::*;
    use crate::device::WeightRef;
    use crate::kernels::emulated::{Emulated, Order, Values};
    use crate::ops;

    /// Numbers in -1..1 that depend on `seed` alone, as this dtype has them.
    fn numbers(dtype: DType, seed: u64, len: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let round = |x: f32| match dtype {
            DType::F16 => f16::from_f32(x).to_f32(),
            DType::BF16 => bf16::from_f32(x).to_f32(),
            _ => x,
        };
        (0..len).map(|_| round(next())).collect()
    }

    fn bytes(dtype: DType, values: &[f32]) -> Vec<u8> {
        let bytes = values.iter().flat_map(|&x| match dtype {
            DType::F16 => f16::from_f32(x).to_bits().to_le_bytes().to_vec(),
            DType::BF16 => bf16::from_f32(x).to_bits().to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        });
        bytes.collect()
    }

    fn floats(dtype: DType, bytes: &[u8]) -> Vec<f32> {
        let each = bytes.chunks(dtype.size_in_bytes());
        each.map(|b| match dtype {
            DType::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
            DType::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            _ => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        })
        .collect()
    }

    /// |got - want| <= tolerance * (|want| + what numbers are usually like).
    fn close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        let usual = (want.iter().map(|w| w * w).sum::<f32>() / want.len().max(1) as f32).sqrt();
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((g - w).abs() <= tolerance * (w.abs() + usual), "{what}[{i}]: {g}, not {w} (usually {usual})");
        }
    }

    /// An emulated device that counts as one of so many multiprocessors, so that sums are cut.
    struct Larger(Emulated, u32);

    impl Launcher for Larger {
        fn launch(&self, family: Family, kernel: &str, grid: Grid, args: &[Arg]) -> Result<()> {
            self.0.launch(family, kernel, grid, args)
        }
        fn capability(&self) -> u32 {
            self.0.capability()
        }
        fn multiprocessors(&self) -> u32 {
            self.1
        }
        fn scratch(&self, bytes: usize) -> Result<Scratch> {
            self.0.scratch(bytes)
        }
    }

    /// y, dx, dw and db by the CPU in f32.
    fn wanted(conv: &Convolution, x: &[f32], w: &[f32], b: &[f32], dy: &[f32]) -> [Vec<f32>; 4] {
        let weight =
            WeightRef::alone("w", &[conv.outputs, conv.inputs, conv.kernel.0, conv.kernel.1], w, true).unwrap();
        let bias = WeightRef::alone("b", &[conv.outputs], b, true).unwrap();
        let shape = (conv.images, conv.inputs, conv.input.0, conv.input.1);
        let x = Var::from_tensor(&Tensor::from_slice(x, shape, &Device::Cpu).unwrap()).unwrap();
        let Convolution { stride, top, bottom, left, right, .. } = *conv;
        let y = ops::conv2d(&x, &weight, Some(&bias), ops::Conv2d { stride, top, bottom, left, right }).unwrap();
        assert_eq!((y.dims()[2], y.dims()[3]), conv.output());
        let dy = Tensor::from_slice(dy, y.dims(), &Device::Cpu).unwrap();
        let grads = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        [flat(&y), flat(grads.get(&x).unwrap()), weight.grad().to_vec(), bias.grad().to_vec()]
    }

    /// With `shift` no vectors are aligned.
    fn check_on(conv: &Convolution, launcher: &Larger, shift: usize) {
        let dtype = conv.dtype;
        let size = dtype.size_in_bytes();
        let (height, width) = conv.output();
        let lengths = [
            conv.images * conv.inputs * conv.input.0 * conv.input.1,
            conv.outputs * conv.inputs * conv.taps(),
            conv.outputs,
            conv.images * conv.outputs * height * width,
        ];
        let values = [0, 1, 2, 3].map(|i| numbers(dtype, i as u64 + 1, lengths[i]));
        let want = wanted(conv, &values[0], &values[1], &values[2], &values[3]);
        let held = [0, 1, 2, 3].map(|i| {
            let all: Vec<f32> = std::iter::repeat_n(0.0, shift).chain(values[i].iter().copied()).collect();
            Values::new(&bytes(dtype, &all)).unwrap()
        });
        let [x, w, b, dy] = [0, 1, 2, 3].map(|i| held[i].address().at(shift * size));
        let [y, dx] = [3, 0].map(|i| Values::<u8>::unwritten((lengths[i] + shift) * size).unwrap());
        // Gradients are added to what is there.
        let before = numbers(DType::F32, 9, lengths[1]);
        let (dw, db) = (Values::new(&before).unwrap(), Values::new(&before[..conv.outputs.min(lengths[1])]).unwrap());
        conv.forward(launcher, x, w, Some(b), y.address().at(shift * size)).unwrap();
        conv.input_gradient(launcher, dy, w, dx.address().at(shift * size)).unwrap();
        conv.add_weight_gradients(launcher, x, dy, dw.address(), Some(db.address())).unwrap();
        let rounding = match dtype {
            DType::F16 => 1.0 / 2000.0,
            DType::BF16 => 1.0 / 250.0,
            _ => 1e-5,
        };
        let what = format!("{conv:?} on {}", launcher.capability());
        let read = |values: &Values<u8>| floats(dtype, &values.get()[shift * size..]);
        close(&read(&y), &want[0], rounding, &format!("{what}: y"));
        close(&read(&dx), &want[1], rounding, &format!("{what}: dx"));
        let sum = |before: &[f32], added: &[f32]| before.iter().zip(added).map(|(a, b)| a + b).collect::<Vec<f32>>();
        close(&dw.get(), &sum(&before, &want[2]), 1e-5, &format!("{what}: dw"));
        close(&db.get(), &sum(&before, &want[3]), 1e-5, &format!("{what}: db"));
        // Without a bias.
        conv.forward(launcher, x, w, None, y.address().at(shift * size)).unwrap();
        let plane = height * width;
        let plain: Vec<f32> = (0..lengths[3]).map(|i| want[0][i] - values[2][i / plane % conv.outputs]).collect();
        close(&read(&y), &plain, rounding + 1e-6, &format!("{what}: y without bias"));
        assert_eq!(launcher.0.bank_conflicts(), 1.0, "{what}");
    }

    /// In every dtype, by both generations of code, on a device of few and one of many multiprocessors.
    fn check(conv: Convolution) {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let conv = Convolution { dtype, ..conv };
            for (capability, order, multiprocessors, shift) in [
                (75, Order::Descending, 1, 0),
                (80, Order::Ascending, 1, 0),
                (90, Order::Shuffled(5), 100, 1),
                (75, Order::Shuffled(6), 100, 0),
            ] {
                if dtype != DType::BF16 || capability >= 80 {
                    let launcher = Larger(Emulated::new(capability, order).unwrap(), multiprocessors);
                    check_on(&conv, &launcher, shift);
                }
            }
        }
    }

    #[test]
    fn three_by_three_follows_the_cpu() {
        check(convolution(DType::F32, 2, (5, 7), (9, 9)));
        check(convolution(DType::F32, 1, (16, 24), (8, 8)));
        check(convolution(DType::F32, 5, (3, 40), (1, 1)));
        check(Convolution { stride: 2, ..convolution(DType::F32, 3, (17, 4), (8, 8)) });
    }

    #[test]
    fn many_channels_and_pixels_follow_the_cpu() {
        // Large tiles, and tails of them; sums in parts.
        check(convolution(DType::F32, 1, (72, 136), (16, 12)));
        check(convolution(DType::F32, 2, (130, 66), (9, 8)));
        // So many pixels that the weight is turned for the forward, for which channels are a multiple of eight.
        check(convolution(DType::F32, 1, (8, 9), (32, 33)));
        check(Convolution { stride: 2, ..convolution(DType::F32, 1, (16, 8), (66, 64)) });
    }

    #[test]
    fn ends_of_a_model_follow_the_cpu() {
        check(convolution(DType::F32, 1, (4, 72), (16, 16)));
        check(convolution(DType::F32, 2, (40, 4), (8, 8)));
    }

    #[test]
    fn other_kernels_follow_the_cpu() {
        let of = |kernel, stride, [top, bottom, left, right]: [usize; 4], channels, input| Convolution {
            kernel,
            stride,
            top,
            bottom,
            left,
            right,
            ..convolution(DType::F32, 2, channels, input)
        };
        check(of((1, 1), 1, [0; 4], (33, 20), (7, 5)));
        check(of((1, 1), 1, [0; 4], (64, 72), (8, 8)));
        check(of((1, 1), 2, [0; 4], (15, 4), (5, 6)));
        check(of((3, 3), 2, [0, 1, 0, 1], (19, 5), (9, 7)));
        check(of((3, 2), 3, [2, 0, 1, 3], (6, 3), (10, 11)));
        check(of((5, 3), 1, [2; 4], (11, 2), (9, 12)));
        check(of((3, 3), 1, [0; 4], (20, 2), (3, 3)));
    }

    #[test]
    fn a_convolution_without_images_does_nothing() {
        let launcher = Emulated::new(80, Order::Ascending).unwrap();
        let conv = convolution(DType::F32, 0, (3, 4), (5, 5));
        let (nothing, w) = (Address::NULL, Values::new(&vec![0f32; 108]).unwrap());
        conv.forward(&launcher, nothing, w.address(), None, nothing).unwrap();
        conv.input_gradient(&launcher, nothing, w.address(), nothing).unwrap();
        conv.add_weight_gradients(&launcher, nothing, nothing, nothing, None).unwrap();
    }
}

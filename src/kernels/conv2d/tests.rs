//! Launch configurations for every capability; on a device, be it emulated, the kernels against `ops::conv2d` in f32.

use super::*;

fn convolution(dtype: DType, images: usize, channels: (usize, usize), input: (usize, usize)) -> Convolution {
    let (inputs, outputs) = channels;
    let (top, bottom, left, right) = (1, 1, 1, 1);
    Convolution { dtype, images, inputs, outputs, input, kernel: (3, 3), stride: 1, top, bottom, left, right }
}

/// A device that launches nothing, but looks at grids.
struct Looks {
    capability: u32,
    multiprocessors: u32,
}

impl Launcher for Looks {
    fn launch(&self, _: Family, kernel: &str, grid: Grid, _: &[Arg]) -> Result<()> {
        // f32's tiles are static.
        let fixed = if kernel.contains("pixels_small_f32") || kernel.contains("weights_small_f32") { 8704 } else { 0 };
        Grid { shared: grid.shared + fixed, ..grid }.check(self.capability)
    }
    fn multiply(&self, _: &crate::kernels::product::Product) -> Result<()> {
        bail!("a convolution multiplies by itself")
    }
    fn capability(&self) -> u32 {
        self.capability
    }
    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }
    fn allows_tf32(&self) -> bool {
        false
    }
    fn scratch(&self, _: usize) -> Result<Scratch> {
        Ok(Scratch::new(Address::NULL, None))
    }
}

#[test]
fn every_shape_can_be_launched_everywhere() {
    let shapes =
        [(4, 320, 64), (320, 320, 64), (960, 640, 32), (2560, 1280, 8), (1280, 1280, 16), (320, 4, 64), (3, 128, 512)];
    let kernels = [(3, 3), (1, 1), (8, 8), (5, 5)];
    let devices =
        [(75, 16), (86, 46), (90, 132)].map(|(capability, multiprocessors)| Looks { capability, multiprocessors });
    for device in devices {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (inputs, outputs, side) in shapes {
                for (images, kernel) in [1, 4, 16].into_iter().flat_map(|images| kernels.map(|kernel| (images, kernel)))
                {
                    let conv = Convolution { kernel, ..convolution(dtype, images, (inputs, outputs), (side, side)) };
                    if dtype == DType::BF16 && device.capability < 80 {
                        continue;
                    }
                    let at = Address(256);
                    let all = || {
                        conv.forward(&device, at, at, None, at)?;
                        conv.input_gradient(&device, at, at, at)?;
                        conv.add_weight_gradients(&device, at, at, at, None)
                    };
                    all().unwrap_or_else(|error| panic!("{conv:?} on {}: {error:#}", device.capability));
                }
            }
        }
    }
}

#[test]
fn cuts_cover_the_depth_and_fit_into_scratch() {
    let sizes = [(320, 4096, 2880), (1280, 64, 11520), (4, 65536, 2880), (1280, 11520, 64), (1, 1, 1), (64, 64, 40000)];
    for (rows, columns, depth) in sizes {
        let product = Product { rows, columns, depth };
        for multiprocessors in [1, 16, 46, 132] {
            let copied = [&cut::PIXELS[..], &cut::COLUMNS, &cut::TAPS].map(|tiles| product.cut(tiles, multiprocessors));
            let gathered = [DType::F32, DType::BF16].map(|dtype| product.cut_gathered(dtype, multiprocessors));
            for cut in copied.into_iter().chain(gathered) {
                assert!(cut.parts * cut.part >= depth && (cut.parts - 1) * cut.part < depth, "{cut:?} of {product:?}");
                assert!(cut.part % cut::DEPTH == 0 && product.parts_bytes(cut) <= cut::MOST_PARTS_BYTES);
            }
        }
    }
}

#[test]
fn few_tiles_have_their_sums_cut() {
    let deep = convolution(DType::BF16, 1, (1280, 1280), (8, 8));
    let cut = deep.forward_pixels().product.cut_gathered(DType::BF16, 46);
    assert_eq!((cut.tile.rows, cut.parts), (64, 4));
    let wide = convolution(DType::BF16, 4, (320, 320), (64, 64)).forward_pixels().product;
    let cut = wide.cut_gathered(DType::BF16, 46);
    assert_eq!((cut.tile.rows, cut.parts, cut.part), (128, 1, 2880));
    // Copied: 320 rows are five tiles of 64; a small result on a large device is cut in its depth.
    assert_eq!(wide.cut(&cut::PIXELS, 46).tile.name, "wide");
    let cut = deep.input_pixels().product.cut(&cut::PIXELS, 132);
    assert!(cut.parts > 1, "{cut:?}");
    let most = convolution(DType::BF16, 16, (1280, 1280), (16, 16)).forward_pixels().product.cut(&cut::PIXELS, 132);
    assert_eq!(most.tile.name, "large");
}

#[cfg(any(feature = "cuda", feature = "emulate"))]
mod on_device {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use candle_core::{Device, Tensor, Var};

    use super::*;
    use crate::device::WeightRef;
    use crate::kernels::testing::{DTYPES, Memory, devices};
    use crate::ops;
    use crate::ops::testing::{f64s, numbers};

    /// Numbers in -1..1 that depend on `seed` alone, as this dtype has them.
    fn rounded(dtype: DType, seed: u64, len: usize) -> Vec<f64> {
        let numbers = Tensor::from_vec(numbers(seed, len), len, &Device::Cpu).unwrap();
        f64s(&numbers.to_dtype(dtype).unwrap())
    }

    /// With ten bits after the point.
    fn as_tf32(x: f64) -> f64 {
        f64::from(f32::from_bits((x as f32).to_bits() & !0x1fff))
    }

    /// |got - want| <= tolerance * (|want| + what numbers are usually like).
    #[track_caller]
    fn close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        let usual = (want.iter().map(|w| w * w).sum::<f64>() / want.len().max(1) as f64).sqrt();
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((g - w).abs() <= tolerance * (w.abs() + usual), "{what}[{i}]: {g}, not {w} (usually {usual})");
        }
    }

    /// A device that counts as one of so many multiprocessors, where sums are cut on large ones, and whether it may use tf32.
    struct Counted(&'static dyn Launcher, u32, bool);

    impl Launcher for Counted {
        fn launch(&self, family: Family, kernel: &str, grid: Grid, args: &[Arg]) -> Result<()> {
            self.0.launch(family, kernel, grid, args)
        }
        fn multiply(&self, product: &crate::kernels::product::Product) -> Result<()> {
            self.0.multiply(product)
        }
        fn capability(&self) -> u32 {
            self.0.capability()
        }
        fn multiprocessors(&self) -> u32 {
            self.1
        }
        fn allows_tf32(&self) -> bool {
            self.2
        }
        fn scratch(&self, bytes: usize) -> Result<Scratch> {
            self.0.scratch(bytes)
        }
    }

    /// A device that notes which kernels are launched.
    struct Noting(&'static dyn Launcher, Mutex<BTreeSet<String>>);

    impl Launcher for Noting {
        fn launch(&self, family: Family, kernel: &str, grid: Grid, args: &[Arg]) -> Result<()> {
            self.1.lock().unwrap().insert(kernel.to_string());
            self.0.launch(family, kernel, grid, args)
        }
        fn multiply(&self, product: &crate::kernels::product::Product) -> Result<()> {
            self.0.multiply(product)
        }
        fn capability(&self) -> u32 {
            self.0.capability()
        }
        fn multiprocessors(&self) -> u32 {
            self.0.multiprocessors()
        }
        fn allows_tf32(&self) -> bool {
            false
        }
        fn scratch(&self, bytes: usize) -> Result<Scratch> {
            self.0.scratch(bytes)
        }
    }

    /// y, dx, dw and db by the CPU in f32.
    fn wanted(conv: &Convolution, values: &[Vec<f64>; 4]) -> [Vec<f64>; 4] {
        let floats = |values: &[f64]| values.iter().map(|&x| x as f32).collect::<Vec<f32>>();
        let [x, w, b, dy] = [0, 1, 2, 3].map(|i| floats(&values[i]));
        let shape = [conv.outputs, conv.inputs, conv.kernel.0, conv.kernel.1];
        let weight = WeightRef::alone("w", &shape, &w, true).unwrap();
        let bias = WeightRef::alone("b", &[conv.outputs], &b, true).unwrap();
        let shape = (conv.images, conv.inputs, conv.input.0, conv.input.1);
        let x = Var::from_tensor(&Tensor::from_vec(x, shape, &Device::Cpu).unwrap()).unwrap();
        let Convolution { stride, top, bottom, left, right, .. } = *conv;
        let y = ops::conv2d(&x, &weight, Some(&bias), ops::Conv2d { stride, top, bottom, left, right }).unwrap();
        assert_eq!((y.dims()[2], y.dims()[3]), conv.output());
        let dy = Tensor::from_vec(dy, y.dims(), &Device::Cpu).unwrap();
        let grads = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
        let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        [f64s(&y), f64s(grads.get(&x).unwrap()), wide(&weight.grad()), wide(&bias.grad())]
    }

    /// With `shift` no vectors are aligned.
    fn check_on(conv: &Convolution, launcher: &Counted, shift: usize, rounding: f64) {
        let (dtype, (height, width)) = (conv.dtype, conv.output());
        let lengths = [
            conv.images * conv.inputs * conv.input.0 * conv.input.1,
            conv.outputs * conv.inputs * conv.taps(),
            conv.outputs,
            conv.images * conv.outputs * height * width,
        ];
        let mut values = [0, 1, 2, 3].map(|i| rounded(dtype, i as u64 + 1, lengths[i]));
        if launcher.2 {
            // Then products are exact, so that nothing but a wrong place shows.
            for i in [0, 1, 3] {
                values[i].iter_mut().for_each(|x| *x = as_tf32(*x));
            }
        }
        let want = wanted(conv, &values);
        let held = [0, 1, 2, 3].map(|i| Memory::new(dtype, &values[i], shift));
        let [x, w, b, dy] = [0, 1, 2, 3].map(|i| held[i].address());
        let [y, dx] = [3, 0].map(|i| Memory::unwritten(dtype, lengths[i], shift));
        // Gradients are added to what is there.
        let before = [1, 2].map(|i| rounded(DType::F32, 9, lengths[i]));
        let [dw, db] = [0, 1].map(|i| Memory::new(DType::F32, &before[i], shift));
        conv.forward(launcher, x, w, Some(b), y.address()).unwrap();
        conv.input_gradient(launcher, dy, w, dx.address()).unwrap();
        conv.add_weight_gradients(launcher, x, dy, dw.address(), Some(db.address())).unwrap();
        let what = format!("{conv:?} on {}", launcher.capability());
        close(&y.get(), &want[0], rounding, &format!("{what}: y"));
        close(&dx.get(), &want[1], rounding, &format!("{what}: dx"));
        let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<f64>>();
        close(&dw.get(), &sum(&before[0], &want[2]), 1e-5, &format!("{what}: dw"));
        close(&db.get(), &sum(&before[1], &want[3]), 1e-5, &format!("{what}: db"));
        // Without a bias.
        conv.forward(launcher, x, w, None, y.address()).unwrap();
        let plain: Vec<f64> =
            (0..lengths[3]).map(|i| want[0][i] - values[2][i / (height * width) % conv.outputs]).collect();
        close(&y.get(), &plain, rounding, &format!("{what}: y without bias"));
    }

    /// In every dtype, on a device of few multiprocessors and on one of many.
    fn check(conv: Convolution) {
        for device in devices() {
            for (dtype, rounding) in DTYPES {
                if dtype == DType::BF16 && device.capability() < 80 {
                    continue;
                }
                for (multiprocessors, shift) in [(1, 0), (100, usize::from(device.capability() > 80))] {
                    let conv = Convolution { dtype, ..conv };
                    check_on(&conv, &Counted(device, multiprocessors, false), shift, rounding);
                    if dtype == DType::F32 && device.capability() >= 80 {
                        check_on(&conv, &Counted(device, multiprocessors, true), shift, rounding);
                    }
                }
            }
        }
    }

    #[test]
    fn copied_tiles_follow_the_cpu() {
        let of = |kernel, stride, [top, bottom, left, right]: [usize; 4], images, channels, input| Convolution {
            kernel,
            stride,
            top,
            bottom,
            left,
            right,
            ..convolution(DType::F32, images, channels, input)
        };
        // Fewer channels than a step is deep, several times over; half of sixteen; sizes that are no multiples of tiles.
        check(of((3, 3), 1, [1; 4], 3, (8, 72), (16, 8)));
        check(of((3, 3), 1, [1; 4], 2, (24, 40), (12, 14)));
        check(of((3, 3), 1, [1; 4], 1, (72, 136), (16, 24)));
        check(of((3, 3), 1, [1; 4], 1, (40, 16), (4, 72)));
        // Strides, forwards and back; uneven padding; other kernels, whose weights' gradients are gathered.
        check(of((3, 3), 2, [1; 4], 2, (40, 24), (32, 16)));
        check(of((3, 3), 2, [0, 1, 0, 1], 2, (16, 24), (32, 32)));
        check(of((3, 3), 3, [2, 0, 1, 3], 1, (16, 8), (34, 26)));
        check(of((5, 3), 1, [2, 2, 1, 1], 2, (16, 24), (12, 16)));
        check(of((2, 2), 2, [0; 4], 2, (32, 16), (32, 32)));
        // One tap: planes, and channels last where a plane is odd or steps are larger.
        check(of((1, 1), 1, [0; 4], 3, (40, 72), (8, 9)));
        check(of((1, 1), 1, [0; 4], 1, (136, 24), (24, 16)));
        check(of((1, 1), 1, [0; 4], 2, (16, 8), (17, 17)));
        check(of((1, 1), 2, [0; 4], 1, (16, 24), (33, 17)));
    }

    #[test]
    fn every_copied_tile_follows_the_cpu() {
        let names = || {
            let kinds = ["pixels_large", "pixels_wide", "pixels_small", "planes_large", "planes_wide", "planes_small"];
            let weights = ["taps_large", "taps_small", "columns_large", "columns_small"];
            kinds.into_iter().chain(weights).map(|name| format!("conv2d_copied_{name}_f16"))
        };
        for device in devices().into_iter().filter(|device| device.capability() >= 80) {
            let seen = Noting(device, Default::default());
            let seen: &'static Noting = Box::leak(Box::new(seen));
            for kernel in [(3, 3), (1, 1)] {
                let pad = kernel.0 / 2;
                for (channels, input) in [((136, 130), (16, 16)), ((160, 72), (16, 16)), ((40, 40), (8, 16))] {
                    let conv = convolution(DType::F16, 1, channels, input);
                    let conv = Convolution { kernel, top: pad, bottom: pad, left: pad, right: pad, ..conv };
                    for multiprocessors in [1, 2, 40] {
                        check_on(&conv, &Counted(seen, multiprocessors, false), 0, 1e-3);
                    }
                }
            }
            let seen = seen.1.lock().unwrap();
            let missing: Vec<_> = names().filter(|name| !seen.contains(name)).collect();
            assert!(missing.is_empty(), "{missing:?} were not launched");
        }
    }

    #[test]
    fn tf32_rounds_factors_and_nothing_else() {
        let conv = convolution(DType::F32, 1, (16, 24), (8, 8));
        for device in devices().into_iter().filter(|device| device.capability() >= 80) {
            // Ten bits after the point in x, whole numbers in w, and what rounds away on top (a seventh of x is a tie): then all
            // sums of rounded factors are exact, and it does not matter that tensor cores cut sums off.
            let x: Vec<f64> = (0..16 * 64)
                .map(|i| {
                    let tie = if i % 7 == 0 { 2.0 } else { (i % 4) as f64 / 2.0 };
                    1.0 + ((i * 619) % 1024) as f64 / 1024.0 + tie / 4096.0
                })
                .collect();
            let w: Vec<f64> = (0..24 * 16 * 9).map(|i| ((i * 5) % 7) as f64 - 3.0).map(|w| w + w / 8192.0).collect();
            let y = |allowed: bool, x: &[f64], w: &[f64]| {
                let [x, w] = [x, w].map(|values| Memory::new(DType::F32, values, 0));
                let y = Memory::unwritten(DType::F32, 24 * 64, 0);
                conv.forward(&Counted(device, 1, allowed), x.address(), w.address(), None, y.address()).unwrap();
                y.get()
            };
            // To the nearest, ties away from zero.
            let nearest = |x: &f64| f64::from(f32::from_bits(((*x as f32).to_bits() + 0x1000) & !0x1fff));
            let [near_x, near_w] = [&x, &w].map(|values| values.iter().map(nearest).collect::<Vec<_>>());
            let rounded = y(true, &x, &w);
            close(&rounded, &y(false, &near_x, &near_w), 1e-6, "rounded factors");
            assert_ne!(rounded, y(false, &x, &w));
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
        check(convolution(DType::F32, 1, (72, 136), (12, 12)));
        check(convolution(DType::F32, 2, (130, 66), (9, 8)));
        // So many pixels that the weight is turned for the forward, for which channels are a multiple of eight.
        check(convolution(DType::F32, 1, (8, 9), (32, 33)));
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
        let conv = convolution(DType::F32, 0, (3, 4), (5, 5));
        for launcher in devices() {
            let (nothing, w) = (Address::NULL, Memory::new(DType::F32, &[0.0; 108], 0));
            conv.forward(launcher, nothing, w.address(), None, nothing).unwrap();
            conv.input_gradient(launcher, nothing, w.address(), nothing).unwrap();
            conv.add_weight_gradients(launcher, nothing, nothing, nothing, None).unwrap();
        }
    }

    #[cfg(feature = "emulate")]
    #[test]
    fn tiles_lie_on_all_banks() {
        use crate::kernels::emulated::{Emulated, Order};
        for multiprocessors in [1, 100] {
            let launcher: &'static Emulated = Box::leak(Box::new(Emulated::new(86, Order::Shuffled(3)).unwrap()));
            if cfg!(not(feature = "cuda")) {
                // Gathered, copied with channels last, and planes.
                let plain = Convolution {
                    kernel: (1, 1),
                    top: 0,
                    bottom: 0,
                    left: 0,
                    right: 0,
                    ..convolution(DType::F16, 1, (80, 72), (16, 16))
                };
                for conv in [
                    convolution(DType::F16, 1, (72, 80), (12, 8)),
                    convolution(DType::F16, 1, (80, 72), (16, 16)),
                    plain,
                ] {
                    check_on(&conv, &Counted(launcher, multiprocessors, false), 0, 1e-3);
                }
                assert_eq!(launcher.bank_conflicts(), 1.0);
            }
        }
    }
}

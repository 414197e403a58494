//! Launch configurations for every capability; on a device, be it emulated, the kernels against `ops::attention` in
//! f32.

use super::*;

#[test]
fn every_width_can_be_launched_everywhere() {
    for capability in [75, 80, 86, 89, 90] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for width in 1..=WIDEST_FORWARD {
                let attention = Attention::contiguous(dtype, [2, 100, 77], 3, width, false);
                let kernels = if width <= WIDEST {
                    &[Kernel::Forward, Kernel::Queries, Kernel::Keys][..]
                } else {
                    &[Kernel::Forward][..]
                };
                for &kernel in kernels {
                    let found = attention.configuration(kernel, capability);
                    if dtype == DType::BF16 && capability < 80 {
                        assert!(found.is_err());
                        continue;
                    }
                    let (name, grid) = found.unwrap();
                    grid.check(capability).unwrap_or_else(|e| panic!("{name} on {capability}: {e}"));
                }
            }
            let wide = Attention::contiguous(dtype, [1, 1, 1], 1, WIDEST + 1, false);
            assert!(wide.configuration(Kernel::Keys, capability).is_err());
        }
    }
}

#[cfg(any(feature = "cuda", feature = "emulate"))]
mod on_device {
    use candle_core::{Device, Tensor, Var};

    use super::*;
    use crate::kernels::testing::{DTYPES, Memory, Values, devices};
    use crate::ops::testing::{f64s, numbers};
    use crate::ops::{Mask, attention};

    /// Numbers in -1..1 that depend on `seed` alone, as this dtype has them.
    fn rounded(dtype: DType, seed: u64, len: usize) -> Vec<f64> {
        let numbers = Tensor::from_vec(numbers(seed, len), len, &Device::Cpu).unwrap();
        f64s(&numbers.to_dtype(dtype).unwrap())
    }

    struct Case {
        sizes: [usize; 3],
        heads: usize,
        width: usize,
        causal: bool,
        lengths: Option<Vec<i32>>,
        /// Elements before the first, which keep vectors from being aligned.
        shift: usize,
    }

    fn case(sizes: [usize; 3], heads: usize, width: usize) -> Case {
        Case { sizes, heads, width, causal: false, lengths: None, shift: 0 }
    }

    /// |got - want| <= tolerance * (|want| + what numbers are usually like, 1/4 at least: that much cancels in them).
    #[track_caller]
    fn close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        let usual = (want.iter().map(|w| w * w).sum::<f64>() / want.len().max(1) as f64).sqrt().max(0.25);
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((g - w).abs() <= tolerance * (w.abs() + usual), "{what}[{i}]: {g}, not {w} (usually {usual})");
        }
    }

    impl Case {
        /// y, dq, dk, dv by the CPU in f32.
        fn wanted(&self, values: [&[f64]; 4]) -> [Vec<f64>; 4] {
            let [batch, queries, keys] = self.sizes;
            let token = self.heads * self.width;
            let var = |values: &[f64], tokens| {
                let tensor = Tensor::from_slice(values, (batch, tokens, token), &Device::Cpu).unwrap();
                Var::from_tensor(&tensor.to_dtype(DType::F32).unwrap()).unwrap()
            };
            let (q, k, v, dy) =
                (var(values[0], queries), var(values[1], keys), var(values[2], keys), var(values[3], queries));
            let lengths = self.lengths.as_ref().map(|l| l.iter().map(|&l| l as usize).collect());
            let y = attention(&q, &k, &v, self.heads, &Mask { causal: self.causal, key_lengths: lengths }).unwrap();
            let grads = (&y * dy.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
            [f64s(&y), f64s(grads.get(&q).unwrap()), f64s(grads.get(&k).unwrap()), f64s(grads.get(&v).unwrap())]
        }

        fn check(&self, launcher: &dyn Launcher, dtype: DType, rounding: f64) {
            let [batch, queries, keys] = self.sizes;
            let sizes = Attention::contiguous(dtype, self.sizes, self.heads, self.width, self.causal);
            let (q_len, k_len) = (batch * queries * sizes.query_strides.token, batch * keys * sizes.key_strides.token);
            let values = [(1, q_len), (2, k_len), (3, k_len), (4, q_len)].map(|(seed, len)| rounded(dtype, seed, len));
            let want = self.wanted([0, 1, 2, 3].map(|i| &values[i][..]));
            let [q, k, v, dy] = [0, 1, 2, 3].map(|i| Memory::new(dtype, &values[i], self.shift));
            let [y, dq] = [0, 1].map(|_| Memory::unwritten(dtype, q_len, self.shift));
            let [dk, dv] = [0, 1].map(|_| Memory::unwritten(dtype, k_len, self.shift));
            let log_sums = Memory::unwritten(DType::F32, sizes.log_sums(), 0);
            let held = self.lengths.as_ref().map(|l| Values::new(l));
            let lengths = held.as_ref().map(Values::address);
            let [q, k, v, dy] = [&q, &k, &v, &dy].map(Memory::address);
            sizes.forward(launcher, [q, k, v], lengths, y.address(), log_sums.address()).unwrap();
            // Of the forward's result and its probabilities; and the slopes in between.
            let inner = if dtype == DType::F32 { rounding } else { 2.0 * rounding };
            let what =
                format!("{dtype:?} {:?} x {} x {} on {}", self.sizes, self.heads, self.width, launcher.capability());
            close(&y.get(), &want[0], rounding, &format!("{what}: y"));
            if self.width > WIDEST {
                return;
            }
            let given = Backward { q, k, v, y: y.address(), log_sums: log_sums.address(), dy, lengths };
            sizes.backward(launcher, given, [&dq, &dk, &dv].map(Memory::address)).unwrap();
            for ((got, want), name) in [&dq, &dk, &dv].into_iter().zip(&want[1..]).zip(["dq", "dk", "dv"]) {
                close(&got.get(), want, inner, &format!("{what}: {name}"));
            }
        }
    }

    fn check(case: &Case) {
        for launcher in devices() {
            for (dtype, rounding) in DTYPES {
                if dtype != DType::BF16 || launcher.capability() >= 80 {
                    case.check(launcher, dtype, rounding);
                }
            }
        }
    }

    #[test]
    fn every_width_of_head_follows_the_cpu() {
        for width in [40, 64, 80, 88, 104, 160, 200] {
            check(&case([1, 70, 67], 2, width));
        }
        check(&case([1, 33, 35], 1, 256));
    }

    #[test]
    fn several_blocks_rows_and_heads_follow_the_cpu() {
        check(&case([2, 150, 77], 3, 40));
        check(&case([1, 20, 140], 1, 80));
        check(&case([2, 1, 1], 2, 16));
    }

    #[test]
    fn masks_hide_keys() {
        for width in [40, 80, 160] {
            let lengths = Some(vec![70, 0, 33]);
            check(&Case { causal: true, ..case([1, 140, 140], 1, width) });
            check(&Case { lengths: lengths.clone(), ..case([3, 20, 70], 1, width) });
            check(&Case { causal: true, lengths, ..case([3, 75, 70], 1, width) });
        }
    }

    #[test]
    fn rows_that_are_not_aligned_follow_the_cpu() {
        check(&case([2, 9, 5], 2, 5));
        check(&case([1, 70, 40], 1, 17));
        check(&Case { shift: 1, ..case([2, 20, 30], 2, 40) });
    }

    /// Tokens by heads to heads by tokens.
    fn by_head(values: &[f64], [batch, tokens]: [usize; 2], [heads, d]: [usize; 2]) -> Vec<f64> {
        let at = |i: usize| {
            let (c, t, h, b) = (i % d, i / d % tokens, i / d / tokens % heads, i / d / tokens / heads);
            ((b * tokens + t) * heads + h) * d + c
        };
        (0..batch * tokens * heads * d).map(|i| values[at(i)]).collect()
    }

    #[test]
    fn heads_may_lie_elsewhere() {
        let (sizes, heads, d) = ([2, 70, 37], 3, 40);
        let Some(&launcher) = devices().last() else { return };
        for dtype in [DType::F32, DType::F16] {
            let plain = Attention::contiguous(dtype, sizes, heads, d, false);
            let strides = |tokens: usize| Strides { batch: heads * tokens * d, token: d, head: tokens * d };
            let apart = Attention { query_strides: strides(70), key_strides: strides(37), ..plain.clone() };
            let tokens = [70, 37, 37, 70];
            let values = [0, 1, 2, 3].map(|i| rounded(dtype, i as u64, 2 * tokens[i] * heads * d));
            let run = |attention: &Attention, turned: bool| {
                let turn = |i: usize| match turned {
                    true => by_head(&values[i], [2, tokens[i]], [heads, d]),
                    false => values[i].clone(),
                };
                let [q, k, v, dy] = [0, 1, 2, 3].map(|i| Memory::new(dtype, &turn(i), 0));
                let [y, dq, dk, dv] = [0, 0, 1, 2].map(|i| Memory::unwritten(dtype, values[i].len(), 0));
                let log_sums = Memory::unwritten(DType::F32, attention.log_sums(), 0);
                let [q, k, v, dy] = [&q, &k, &v, &dy].map(Memory::address);
                let log_sums = log_sums.address();
                attention.forward(launcher, [q, k, v], None, y.address(), log_sums).unwrap();
                let given = Backward { q, k, v, y: y.address(), log_sums, dy, lengths: None };
                attention.backward(launcher, given, [&dq, &dk, &dv].map(Memory::address)).unwrap();
                [y, dq, dk, dv].map(|held| held.get())
            };
            let (want, got) = (run(&plain, false), run(&apart, true));
            for (i, (want, got)) in want.iter().zip(&got).enumerate() {
                let tokens = if i < 2 { 70 } else { 37 };
                assert_eq!(&by_head(want, [2, tokens], [heads, d]), got, "{dtype:?} {i}");
            }
        }
    }

    #[test]
    fn wide_heads_have_a_forward() {
        check(&case([1, 20, 19], 1, 512));
    }

    #[cfg(feature = "emulate")]
    #[test]
    fn tiles_lie_on_all_banks() {
        use crate::kernels::emulated::{Emulated, Order};
        for width in [40, 64, 80, 96, 128, 160, 256] {
            let launcher = Emulated::new(86, Order::Shuffled(3)).unwrap();
            if cfg!(not(feature = "cuda")) {
                case([1, 40, 70], 1, width).check(&launcher, DType::F16, 1e-3);
                assert_eq!(launcher.bank_conflicts(), 1.0, "{width}");
            }
        }
    }
}

//! Launch configurations for every capability; under the emulator the kernels against `ops::attention` in f32.

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

#[cfg(feature = "emulate")]
mod emulated {
    use candle_core::{Device, Tensor, Var};
    use half::{bf16, f16};

    use super::*;
    use crate::kernels::emulated::{Emulated, Order, Values};
    use crate::ops::{Mask, attention};

    /// Numbers in -1..1 that depend on `seed` alone, as this dtype has them.
    fn numbers(dtype: DType, seed: u64, len: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..len).map(|_| rounded(dtype, next())).collect()
    }

    fn rounded(dtype: DType, x: f32) -> f32 {
        match dtype {
            DType::F16 => f16::from_f32(x).to_f32(),
            DType::BF16 => bf16::from_f32(x).to_f32(),
            _ => x,
        }
    }

    /// Numbers on the device in a dtype, `shift` elements into their memory.
    struct Held {
        dtype: DType,
        values: Values<u8>,
        shift: usize,
    }

    impl Held {
        fn new(dtype: DType, values: &[f32], shift: usize) -> Held {
            let zeros = std::iter::repeat_n(0f32, shift);
            let bytes = zeros.chain(values.iter().copied()).flat_map(|x| match dtype {
                DType::F16 => f16::from_f32(x).to_bits().to_le_bytes().to_vec(),
                DType::BF16 => bf16::from_f32(x).to_bits().to_le_bytes().to_vec(),
                _ => x.to_le_bytes().to_vec(),
            });
            Held { dtype, values: Values::new(&bytes.collect::<Vec<u8>>()).unwrap(), shift }
        }

        fn unwritten(dtype: DType, len: usize, shift: usize) -> Held {
            Held { dtype, values: Values::unwritten((len + shift) * dtype.size_in_bytes()).unwrap(), shift }
        }

        fn address(&self) -> Address {
            self.values.address().at(self.shift * self.dtype.size_in_bytes())
        }

        fn get(&self) -> Vec<f32> {
            let bytes = self.values.get();
            let each = bytes.chunks(self.dtype.size_in_bytes()).skip(self.shift);
            each.map(|b| match self.dtype {
                DType::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
                DType::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
                _ => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            })
            .collect()
        }
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
    fn close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        let usual = (want.iter().map(|w| w * w).sum::<f32>() / want.len().max(1) as f32).sqrt().max(0.25);
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((g - w).abs() <= tolerance * (w.abs() + usual), "{what}[{i}]: {g}, not {w} (usually {usual})");
        }
    }

    impl Case {
        /// y, dq, dk, dv by the CPU in f32.
        fn wanted(&self, values: [&[f32]; 4]) -> [Vec<f32>; 4] {
            let [batch, queries, keys] = self.sizes;
            let token = self.heads * self.width;
            let var = |values: &[f32], tokens| {
                Var::from_tensor(&Tensor::from_slice(values, (batch, tokens, token), &Device::Cpu).unwrap()).unwrap()
            };
            let (q, k, v, dy) =
                (var(values[0], queries), var(values[1], keys), var(values[2], keys), var(values[3], queries));
            let lengths = self.lengths.as_ref().map(|l| l.iter().map(|&l| l as usize).collect());
            let y = attention(&q, &k, &v, self.heads, &Mask { causal: self.causal, key_lengths: lengths }).unwrap();
            let grads = (&y * dy.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            [flat(&y), flat(grads.get(&q).unwrap()), flat(grads.get(&k).unwrap()), flat(grads.get(&v).unwrap())]
        }

        fn check(&self, launcher: &Emulated, dtype: DType) {
            let [batch, queries, keys] = self.sizes;
            let sizes = Attention::contiguous(dtype, self.sizes, self.heads, self.width, self.causal);
            let (q_len, k_len) = (batch * queries * sizes.query_strides.token, batch * keys * sizes.key_strides.token);
            let values = [(1, q_len), (2, k_len), (3, k_len), (4, q_len)].map(|(seed, len)| numbers(dtype, seed, len));
            let want = self.wanted([0, 1, 2, 3].map(|i| &values[i][..]));
            let [q, k, v, dy] = [0, 1, 2, 3].map(|i| Held::new(dtype, &values[i], self.shift));
            let [y, dq] = [0, 1].map(|_| Held::unwritten(dtype, q_len, self.shift));
            let [dk, dv] = [0, 1].map(|_| Held::unwritten(dtype, k_len, self.shift));
            let log_sums = Values::<f32>::unwritten(sizes.log_sums()).unwrap();
            let lengths = self.lengths.as_ref().map(|l| Values::new(l).unwrap());
            let lengths_at = lengths.as_ref().map(Values::address);
            let [qa, ka, va] = [&q, &k, &v].map(Held::address);
            sizes.forward(launcher, [qa, ka, va], lengths_at, y.address(), log_sums.address()).unwrap();
            // Of the forward's result and probabilities: two roundings; and the gradients' inner ones.
            let (tolerance, inner) = match dtype {
                DType::F16 => (1.0 / 1024.0, 2.0 / 1024.0),
                DType::BF16 => (1.0 / 128.0, 2.0 / 128.0),
                _ => (1e-5, 1e-5),
            };
            let what =
                format!("{dtype:?} {:?} x {} x {} on {}", self.sizes, self.heads, self.width, launcher.capability());
            close(&y.get(), &want[0], tolerance, &format!("{what}: y"));
            if self.width > WIDEST {
                return;
            }
            let given = Backward {
                q: qa,
                k: ka,
                v: va,
                y: y.address(),
                log_sums: log_sums.address(),
                dy: dy.address(),
                lengths: lengths_at,
            };
            sizes.backward(launcher, given, [&dq, &dk, &dv].map(Held::address)).unwrap();
            for ((got, want), name) in [&dq, &dk, &dv].into_iter().zip(&want[1..]).zip(["dq", "dk", "dv"]) {
                close(&got.get(), want, inner, &format!("{what}: {name}"));
            }
            assert_eq!(launcher.bank_conflicts(), 1.0, "{what}");
        }
    }

    /// One launcher of each kind of code for a dtype, in differing orders.
    fn launchers(dtype: DType) -> Vec<Emulated> {
        let old = (dtype != DType::BF16).then_some((75, Order::Descending));
        let new = [(80, Order::Ascending), (90, Order::Shuffled(3))];
        old.into_iter().chain(new).map(|(capability, order)| Emulated::new(capability, order).unwrap()).collect()
    }

    fn check(case: &Case) {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for launcher in launchers(dtype) {
                case.check(&launcher, dtype);
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
    fn by_head(values: &[f32], [batch, tokens]: [usize; 2], [heads, d]: [usize; 2]) -> Vec<f32> {
        let at = |i: usize| {
            let (c, t, h, b) = (i % d, i / d % tokens, i / d / tokens % heads, i / d / tokens / heads);
            ((b * tokens + t) * heads + h) * d + c
        };
        (0..batch * tokens * heads * d).map(|i| values[at(i)]).collect()
    }

    #[test]
    fn heads_may_lie_elsewhere() {
        let (sizes, heads, d) = ([2, 70, 37], 3, 40);
        for dtype in [DType::F32, DType::F16] {
            let launcher = Emulated::new(80, Order::Ascending).unwrap();
            let plain = Attention::contiguous(dtype, sizes, heads, d, false);
            let strides = |tokens: usize| Strides { batch: heads * tokens * d, token: d, head: tokens * d };
            let apart = Attention { query_strides: strides(70), key_strides: strides(37), ..plain.clone() };
            let tokens = [70, 37, 37, 70];
            let values = [0, 1, 2, 3].map(|i| numbers(dtype, i as u64, 2 * tokens[i] * heads * d));
            let run = |attention: &Attention, turned: bool| {
                let turn = |i: usize| match turned {
                    true => by_head(&values[i], [2, tokens[i]], [heads, d]),
                    false => values[i].clone(),
                };
                let [q, k, v, dy] = [0, 1, 2, 3].map(|i| Held::new(dtype, &turn(i), 0));
                let [y, dq, dk, dv] = [0, 0, 1, 2].map(|i| Held::unwritten(dtype, values[i].len(), 0));
                let log_sums = Values::<f32>::unwritten(attention.log_sums()).unwrap();
                let [q, k, v, dy] = [&q, &k, &v, &dy].map(Held::address);
                let log_sums = log_sums.address();
                attention.forward(&launcher, [q, k, v], None, y.address(), log_sums).unwrap();
                let given = Backward { q, k, v, y: y.address(), log_sums, dy, lengths: None };
                attention.backward(&launcher, given, [&dq, &dk, &dv].map(Held::address)).unwrap();
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
        for dtype in [DType::F32, DType::BF16] {
            case([1, 20, 19], 1, 512).check(&launchers(dtype)[0], dtype);
        }
    }
}

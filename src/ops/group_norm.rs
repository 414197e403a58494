//! Group normalisation, with the SiLU that follows it in every ResNet layer.

mod gpu;

use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::activation::silu_slope;
use super::cpu::{Held, by_dtype, elements, for_parts, result, tensor};
use super::gpu::{Gpu, cuda_forward, emulated1};
use super::record::apply1_with_weights;
use super::vector::{PIECE, Real, sigmoid, simd, sums, unwritten};
use crate::device::WeightRef;

/// x (B, C, ...) normalised over C/groups channels and all pixels, times gamma (C) plus beta (C); then SiLU if `silu`.
///
/// Statistics in f32 with f64 totals, variance without Bessel's correction, as torch's `GroupNorm` (Wu and He 2018).
pub fn group_norm(
    x: &Tensor,
    gamma: &WeightRef,
    beta: &WeightRef,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let &[batch, channels, ref rest @ ..] = x.dims() else { bail!("group_norm: {:?} has no channels", x.shape()) };
    let pixels: usize = rest.iter().product();
    if groups == 0 || channels % groups != 0 || batch * channels * pixels == 0 {
        bail!("{}: {groups} groups in {:?}", gamma.name(), x.shape());
    }
    for weight in [gamma, beta] {
        if weight.shape() != [channels] {
            bail!("{}: {:?} does not fit {channels} channels", weight.name(), weight.shape());
        }
    }
    let (gamma, beta) = (gamma.clone(), beta.clone());
    let (moments, moments_there) = (OnceLock::new(), OnceLock::new());
    let trains = gamma.trainable() || beta.trainable();
    let op = GroupNorm { gamma, beta, groups, channels, pixels, eps, silu, moments, moments_there };
    apply1_with_weights(x, op, trains, |op, x, dy, _| op.bwd(x, dy, dy))
}

struct GroupNorm {
    gamma: WeightRef,
    beta: WeightRef,
    groups: usize,
    channels: usize,
    pixels: usize,
    eps: f64,
    silu: bool,
    /// Of each (batch row, group), from the forward.
    moments: OnceLock<Vec<Moments>>,
    /// The same in a GPU's memory.
    moments_there: OnceLock<Tensor>,
}

/// Mean and 1/sqrt(variance + eps).
#[derive(Clone, Copy, Default)]
struct Moments {
    mean: f32,
    scale: f32,
}

impl CustomOp1 for GroupNorm {
    fn name(&self) -> &'static str {
        "group_norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if let Some(done) = emulated1(storage, layout, |gpu, x| self.forward_on(gpu, x)) {
            return done;
        }
        by_dtype!(storage.dtype(), self.name(), T => {
            Ok(result(self.forward::<T>(elements(storage, layout)?)?, layout.shape()))
        })
    }

    cuda_forward!(1);

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        if let Some(gpu) = Gpu::of(x)? {
            return self.backward_on(&gpu, gpu.operand(x)?, gpu.operand(&dy)?).map(Some);
        }
        let (held_x, held_dy) = (Held::new(x), Held::new(&dy));
        by_dtype!(x.dtype(), self.name(), T => {
            Ok(Some(tensor(self.backward::<T>(held_x.elements()?, held_dy.elements()?)?, x.shape())?))
        })
    }
}

/// A weight as f32.
pub(super) fn as_f32<T: Real>(weight: &WeightRef) -> Result<Vec<f32>> {
    Ok(weight.view::<T>()?.iter().map(|w| w.to_f32()).collect())
}

impl GroupNorm {
    fn group_channels(&self) -> usize {
        self.channels / self.groups
    }

    fn forward<T: Real>(&self, x: &[T]) -> Result<Vec<T>> {
        let (gamma, beta) = (as_f32::<T>(&self.gamma)?, as_f32::<T>(&self.beta)?);
        let group = self.group_channels() * self.pixels;
        let mut y = unwritten::<T>(x.len());
        let mut moments = vec![Moments::default(); x.len() / group];
        let parts: Vec<_> = y.chunks_mut(group).zip(x.chunks(group)).zip(&mut moments).collect();
        for_parts(parts, x.len(), |i, ((y, x), moments)| {
            simd(
                #[inline(always)]
                || {
                    *moments = measure(x, self.eps);
                    let first = i % self.groups * self.group_channels();
                    let channels = y.chunks_mut(self.pixels).zip(x.chunks(self.pixels));
                    for (c, (y, x)) in channels.enumerate() {
                        let a = moments.scale * gamma[first + c];
                        normalise(y, x, a, (-moments.mean).mul_add(a, beta[first + c]), self.silu);
                    }
                },
            );
        });
        // A second forward of the same op would give the same moments.
        let _ = self.moments.set(moments);
        Ok(y)
    }

    /// With u the value before SiLU, h = (x - mean) * scale and du the gradient of u: dbeta = sum(du),
    /// dgamma = sum(du h), dx = scale * (gamma du - mean(gamma du) - h mean(gamma du h)), means over the group.
    fn backward<T: Real>(&self, x: &[T], dy: &[T]) -> Result<Vec<T>> {
        let (gamma, beta) = (as_f32::<T>(&self.gamma)?, as_f32::<T>(&self.beta)?);
        let Some(moments) = self.moments.get() else { bail!("group_norm: backward before forward") };
        let group = self.group_channels() * self.pixels;
        let mut dx = unwritten::<T>(x.len());
        // Of each (batch row, channel): sum(du), sum(du h).
        let mut sums = vec![[0f64; 2]; x.len() / self.pixels];
        let parts: Vec<_> = dx
            .chunks_mut(group)
            .zip(sums.chunks_mut(self.group_channels()))
            .zip(x.chunks(group).zip(dy.chunks(group)))
            .collect();
        for_parts(parts, 2 * x.len(), |i, ((dx, sums), (x, dy))| {
            let first = i % self.groups * self.group_channels();
            let weights = (&gamma[first..], &beta[first..]);
            if self.silu {
                self.group_backward::<T, true>(moments[i], weights, sums, dx, x, dy);
            } else {
                self.group_backward::<T, false>(moments[i], weights, sums, dx, x, dy);
            }
        });
        let over_batch = |which: usize, grad: &mut [f32]| {
            for (c, grad) in grad.iter_mut().enumerate() {
                *grad += sums.iter().skip(c).step_by(self.channels).map(|s| s[which]).sum::<f64>() as f32;
            }
        };
        self.beta.add_grad(|grad| over_batch(0, grad))?;
        self.gamma.add_grad(|grad| over_batch(1, grad))?;
        Ok(dx)
    }

    fn group_backward<T: Real, const SILU: bool>(
        &self,
        Moments { mean, scale }: Moments,
        (gamma, beta): (&[f32], &[f32]),
        sums: &mut [[f64; 2]],
        dx: &mut [T],
        x: &[T],
        dy: &[T],
    ) {
        let count = x.len() as f64;
        simd(
            #[inline(always)]
            || {
                let (mut du_mean, mut duh_mean) = (0.0, 0.0);
                let channels = x.chunks(self.pixels).zip(dy.chunks(self.pixels));
                for (c, (x, dy)) in channels.clone().enumerate() {
                    let slope = Slope { mean, scale, gamma: gamma[c], beta: beta[c] };
                    sums[c] = slope.sums::<T, SILU>(x, dy);
                    du_mean += gamma[c] as f64 * sums[c][0] / count;
                    duh_mean += gamma[c] as f64 * sums[c][1] / count;
                }
                for (c, (dx, (x, dy))) in dx.chunks_mut(self.pixels).zip(channels).enumerate() {
                    let slope = Slope { mean, scale, gamma: gamma[c], beta: beta[c] };
                    slope.dx::<T, SILU>(du_mean as f32, duh_mean as f32, dx, x, dy);
                }
            },
        );
    }
}

#[inline(always)]
fn measure<T: Real>(x: &[T], eps: f64) -> Moments {
    let mut scratch = [0f32; PIECE];
    let (mut sum, mut squares) = (0.0, 0.0);
    for piece in x.chunks(PIECE) {
        let x = T::read(piece, &mut scratch);
        sum += sums(
            [x],
            #[inline(always)]
            |x| x,
        )[0];
    }
    let mean = (sum / x.len() as f64) as f32;
    for piece in x.chunks(PIECE) {
        let x = T::read(piece, &mut scratch);
        squares += sums(
            [x],
            #[inline(always)]
            |[x]| [(x - mean) * (x - mean)],
        )[0];
    }
    Moments { mean, scale: (1.0 / (squares / x.len() as f64 + eps).sqrt()) as f32 }
}

/// y = silu?(a x + b).
#[inline(always)]
fn normalise<T: Real>(y: &mut [T], x: &[T], a: f32, b: f32, silu: bool) {
    let (mut s, mut t) = ([0f32; PIECE], [0f32; PIECE]);
    for (y, x) in y.chunks_mut(PIECE).zip(x.chunks(PIECE)) {
        let x = T::read(x, &mut s);
        T::write(
            y,
            &mut t,
            #[inline(always)]
            |y| {
                if silu {
                    for (y, x) in y.iter_mut().zip(x) {
                        let u = x.mul_add(a, b);
                        *y = u * sigmoid(u);
                    }
                } else {
                    y.iter_mut().zip(x).for_each(|(y, x)| *y = x.mul_add(a, b));
                }
            },
        );
    }
}

/// The backward of one channel of one batch row.
#[derive(Clone, Copy)]
struct Slope {
    mean: f32,
    scale: f32,
    gamma: f32,
    beta: f32,
}

impl Slope {
    /// (h, du).
    #[inline(always)]
    fn at<const SILU: bool>(self, x: f32, dy: f32) -> (f32, f32) {
        let h = (x - self.mean) * self.scale;
        (h, if SILU { dy * silu_slope(h.mul_add(self.gamma, self.beta)) } else { dy })
    }

    /// sum(du), sum(du h).
    #[inline(always)]
    fn sums<T: Real, const SILU: bool>(self, x: &[T], dy: &[T]) -> [f64; 2] {
        let (mut s, mut t) = ([0f32; PIECE], [0f32; PIECE]);
        let mut totals = [0f64; 2];
        for (x, dy) in x.chunks(PIECE).zip(dy.chunks(PIECE)) {
            let [du, duh] = sums(
                [T::read(x, &mut s), T::read(dy, &mut t)],
                #[inline(always)]
                |[x, dy]| {
                    let (h, du) = self.at::<SILU>(x, dy);
                    [du, du * h]
                },
            );
            totals = [totals[0] + du, totals[1] + duh];
        }
        totals
    }

    #[inline(always)]
    fn dx<T: Real, const SILU: bool>(self, du_mean: f32, duh_mean: f32, dx: &mut [T], x: &[T], dy: &[T]) {
        let (mut s, mut t, mut u) = ([0f32; PIECE], [0f32; PIECE], [0f32; PIECE]);
        for (dx, (x, dy)) in dx.chunks_mut(PIECE).zip(x.chunks(PIECE).zip(dy.chunks(PIECE))) {
            let (x, dy) = (T::read(x, &mut s), T::read(dy, &mut t));
            T::write(
                dx,
                &mut u,
                #[inline(always)]
                |dx| {
                    for (dx, (&x, &dy)) in dx.iter_mut().zip(x.iter().zip(dy)) {
                        let (h, du) = self.at::<SILU>(x, dy);
                        *dx = self.scale * h.mul_add(-duh_mean, du.mul_add(self.gamma, -du_mean));
                    }
                },
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check, check_threads};

    fn reference(v: &[Vec<f64>], shape: &[usize], groups: usize, silu: bool) -> Vec<f64> {
        let pixels: usize = shape[2..].iter().product();
        let group = shape[1] / groups * pixels;
        let mut y = Vec::new();
        for (g, x) in v[0].chunks(group).enumerate() {
            let mean = x.iter().sum::<f64>() / group as f64;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / group as f64;
            for (i, x) in x.iter().enumerate() {
                let c = (g * group + i) / pixels % shape[1];
                let u = (x - mean) / (variance + 1e-5).sqrt() * v[1][c] + v[2][c];
                y.push(if silu { u / (1.0 + (-u).exp()) } else { u });
            }
        }
        y
    }

    fn normed(shape: &[usize], groups: usize, silu: bool, test: fn(&Case)) {
        let channels = shape[1];
        test(&Case {
            inputs: &[shape],
            weights: &[&[channels], &[channels]],
            op: &|x, w| group_norm(&x[0], &w[0], &w[1], groups, 1e-5, silu),
            reference: &|v| reference(v, shape, groups, silu),
        });
    }

    #[test]
    fn groups_are_normalised_and_gradients_follow() {
        for silu in [false, true] {
            normed(&[2, 6, 3, 3], 3, silu, check);
            normed(&[1, 4, 7], 2, silu, check);
            normed(&[3, 4, 5], 4, silu, check);
            normed(&[2, 12, 41, 37], 3, silu, check_threads);
        }
    }

    #[test]
    fn a_large_mean_costs_no_precision() {
        let values: Vec<f32> = crate::ops::testing::numbers(5, 40_000).iter().map(|x| 1000.0 + x).collect();
        let x = Tensor::from_vec(values, (1, 4, 100, 100), &candle_core::Device::Cpu).unwrap();
        let one = WeightRef::alone("gamma", &[4], &[1f32; 4], false).unwrap();
        let zero = WeightRef::alone("beta", &[4], &[0f32; 4], false).unwrap();
        let y = group_norm(&x, &one, &zero, 1, 1e-5, false).unwrap();
        let v = [crate::ops::testing::f64s(&x), vec![1.0; 4], vec![0.0; 4]];
        let want = reference(&v, x.dims(), 1, false);
        crate::ops::testing::close(&crate::ops::testing::f64s(&y), &want, 2e-4, "y");
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let x = Tensor::zeros((1, 4, 3), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        let of = |n: usize| WeightRef::alone("w", &[n], &vec![0f32; n], false).unwrap();
        assert!(group_norm(&x, &of(4), &of(4), 3, 1e-5, false).is_err());
        assert!(group_norm(&x, &of(4), &of(5), 2, 1e-5, false).is_err());
    }
}

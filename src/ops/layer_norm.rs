//! Layer normalisation.

mod gpu;

use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Held, by_dtype, elements, for_parts, result, rows_per_part, tensor};
use super::gpu::{Gpu, cuda_forward, emulated1};
use super::group_norm::as_f32;
use super::record::apply1_with_weights;
use super::vector::{Real, simd, sums, unwritten};
use crate::device::WeightRef;

/// x (..., D) normalised over D, times gamma (D) plus beta (D), as torch's `LayerNorm`.
pub fn layer_norm(x: &Tensor, gamma: &WeightRef, beta: &WeightRef, eps: f64) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(0);
    for weight in [gamma, beta] {
        if width == 0 || weight.shape() != [width] {
            bail!("{}: {:?} does not fit the last dimension of {:?}", weight.name(), weight.shape(), x.shape());
        }
    }
    let (gamma, beta) = (gamma.clone(), beta.clone());
    let trains = gamma.trainable() || beta.trainable();
    let op = LayerNorm { gamma, beta, width, eps, moments: OnceLock::new(), moments_there: OnceLock::new() };
    apply1_with_weights(x, op, trains, |op, x, dy, _| op.bwd(x, dy, dy))
}

struct LayerNorm {
    gamma: WeightRef,
    beta: WeightRef,
    width: usize,
    eps: f64,
    /// Mean and 1/sqrt(variance + eps) of each row, from the forward.
    moments: OnceLock<Vec<(f32, f32)>>,
    /// The same in a GPU's memory.
    moments_there: OnceLock<Tensor>,
}

impl CustomOp1 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
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

impl LayerNorm {
    fn forward<T: Real>(&self, x: &[T]) -> Result<Vec<T>> {
        let (gamma, beta) = (as_f32::<T>(&self.gamma)?, as_f32::<T>(&self.beta)?);
        let (width, rows) = (self.width, rows_per_part(self.width));
        let mut y = unwritten::<T>(x.len());
        let mut moments = vec![(0f32, 0f32); x.len() / width];
        let parts: Vec<_> =
            y.chunks_mut(rows * width).zip(x.chunks(rows * width)).zip(moments.chunks_mut(rows)).collect();
        for_parts(parts, x.len(), |_, ((y, x), moments)| {
            let (mut s, mut t) = (vec![0f32; width], vec![0f32; width]);
            simd(
                #[inline(always)]
                || {
                    for ((y, x), moments) in y.chunks_mut(width).zip(x.chunks(width)).zip(moments) {
                        let x = T::read(x, &mut s);
                        *moments = measure(x, self.eps);
                        let (mean, scale) = *moments;
                        T::write(
                            y,
                            &mut t,
                            #[inline(always)]
                            |y| {
                                for (y, (x, (g, b))) in y.iter_mut().zip(x.iter().zip(gamma.iter().zip(&beta))) {
                                    *y = ((x - mean) * scale).mul_add(*g, *b);
                                }
                            },
                        );
                    }
                },
            );
        });
        // A second forward of the same op would give the same moments.
        let _ = self.moments.set(moments);
        Ok(y)
    }

    /// With h = (x - mean) * scale: dbeta = sum(dy), dgamma = sum(dy h) over rows, and
    /// dx = scale * (gamma dy - mean(gamma dy) - h mean(gamma dy h)), means over the row.
    fn backward<T: Real>(&self, x: &[T], dy: &[T]) -> Result<Vec<T>> {
        let gamma = as_f32::<T>(&self.gamma)?;
        let Some(moments) = self.moments.get() else { bail!("layer_norm: backward before forward") };
        let (width, rows) = (self.width, rows_per_part(self.width));
        let mut dx = unwritten::<T>(x.len());
        // Of each part of the rows: sum(dy) and sum(dy h).
        let mut sums = vec![0f32; moments.len().div_ceil(rows) * 2 * width];
        let parts: Vec<_> = dx
            .chunks_mut(rows * width)
            .zip(sums.chunks_mut(2 * width))
            .zip(x.chunks(rows * width).zip(dy.chunks(rows * width)).zip(moments.chunks(rows)))
            .collect();
        for_parts(parts, 2 * x.len(), |_, ((dx, sums), ((x, dy), moments))| {
            let (mut s, mut t, mut u) = (vec![0f32; width], vec![0f32; width], vec![0f32; width]);
            let (dbeta, dgamma) = sums.split_at_mut(width);
            simd(
                #[inline(always)]
                || {
                    let rows = dx.chunks_mut(width).zip(x.chunks(width).zip(dy.chunks(width))).zip(moments);
                    for ((dx, (x, dy)), &moments) in rows {
                        let (x, dy) = (T::read(x, &mut s), T::read(dy, &mut t));
                        T::write(
                            dx,
                            &mut u,
                            #[inline(always)]
                            |dx| row_backward(moments, &gamma, x, dy, dx, dbeta, dgamma),
                        );
                    }
                },
            );
        });
        let over_parts = |from: usize, grad: &mut [f32]| {
            for (c, grad) in grad.iter_mut().enumerate() {
                *grad += sums[from + c..].iter().step_by(2 * width).map(|&s| s as f64).sum::<f64>() as f32;
            }
        };
        self.beta.add_grad(|grad| over_parts(0, grad))?;
        self.gamma.add_grad(|grad| over_parts(width, grad))?;
        Ok(dx)
    }
}

#[inline(always)]
fn measure(x: &[f32], eps: f64) -> (f32, f32) {
    let count = x.len() as f64;
    let [sum] = sums(
        [x],
        #[inline(always)]
        |x| x,
    );
    let mean = (sum / count) as f32;
    let [squares] = sums(
        [x],
        #[inline(always)]
        |[x]| [(x - mean) * (x - mean)],
    );
    (mean, (1.0 / (squares / count + eps).sqrt()) as f32)
}

#[inline(always)]
fn row_backward(
    (mean, scale): (f32, f32),
    gamma: &[f32],
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    dbeta: &mut [f32],
    dgamma: &mut [f32],
) {
    let width = dx.len();
    let (gamma, x, dy) = (&gamma[..width], &x[..width], &dy[..width]);
    let (dbeta, dgamma) = (&mut dbeta[..width], &mut dgamma[..width]);
    let [dy_sum, dyh_sum] = sums(
        [x, dy, gamma],
        #[inline(always)]
        |[x, dy, gamma]| [gamma * dy, gamma * dy * ((x - mean) * scale)],
    );
    let (dy_mean, dyh_mean) = ((dy_sum / width as f64) as f32, (dyh_sum / width as f64) as f32);
    for i in 0..width {
        let h = (x[i] - mean) * scale;
        dbeta[i] += dy[i];
        dgamma[i] = dy[i].mul_add(h, dgamma[i]);
        dx[i] = scale * h.mul_add(-dyh_mean, dy[i].mul_add(gamma[i], -dy_mean));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check, check_threads};

    fn normed(shape: &[usize], test: fn(&Case)) {
        let width = shape[shape.len() - 1];
        let row = |x: &[f64], gamma: &[f64], beta: &[f64]| -> Vec<f64> {
            let mean = x.iter().sum::<f64>() / width as f64;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let scale = 1.0 / (variance + 1e-5).sqrt();
            (0..width).map(|i| (x[i] - mean) * scale * gamma[i] + beta[i]).collect()
        };
        test(&Case {
            inputs: &[shape],
            weights: &[&[width], &[width]],
            op: &|x, w| layer_norm(&x[0], &w[0], &w[1], 1e-5),
            reference: &|v| v[0].chunks(width).flat_map(|x| row(x, &v[1], &v[2])).collect(),
        });
    }

    #[test]
    fn rows_are_normalised_and_gradients_follow() {
        normed(&[2, 7, 5], check);
        normed(&[3, 77], check);
        normed(&[2, 300, 324], check_threads);
    }

    #[test]
    fn weights_of_another_width_are_refused() {
        let x = Tensor::zeros((2, 4), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        let of = |n: usize| WeightRef::alone("w", &[n], &vec![0f32; n], false).unwrap();
        assert!(layer_norm(&x, &of(4), &of(3), 1e-5).is_err());
    }
}

//! Nearest-neighbour resampling, as torch's `interpolate(size=..., mode="nearest")` does it.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Held, by_dtype, elements, for_parts, result, rows_per_part, tensor};
use super::gpu::{Fresh, Gpu, Operand, cuda_forward, emulated1};
use super::record::apply1_by_shape;
use super::vector::{Real, simd, unwritten};
use crate::kernels::glue::moves;

/// (B, C, H, W) -> (B, C, height, width); pixel (y, x) is the input's (floor(y*H/height), floor(x*W/width)), where the
/// quotient H/height is rounded to f32 first, as torch does (so y = 41 of 2 -> 82 rows is row 0, not 1).
pub fn upsample_nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    if h * w * height * width == 0 {
        bail!("upsample_nearest: from {h}x{w} to {height}x{width} pixels");
    }
    apply1_by_shape(x, Resample { rows: sources(h, height), columns: sources(w, width), h, w }, Resample::back)
}

/// The source of each of `to` positions among `from`.
fn sources(from: usize, to: usize) -> Vec<usize> {
    let scale = from as f32 / to as f32;
    (0..to).map(|i| ((i as f32 * scale) as usize).min(from - 1)).collect()
}

struct Resample {
    rows: Vec<usize>,
    columns: Vec<usize>,
    h: usize,
    w: usize,
}

impl CustomOp1 for Resample {
    fn name(&self) -> &'static str {
        "upsample_nearest"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if let Some(done) = emulated1(storage, layout, |gpu, x| self.forward_on(gpu, x)) {
            return done;
        }
        let (batch, channels, _, _) = layout.shape().dims4()?;
        by_dtype!(storage.dtype(), self.name(), T => {
            let y = self.gather::<T>(elements(storage, layout)?);
            Ok(result(y, (batch, channels, self.rows.len(), self.columns.len())))
        })
    }

    cuda_forward!(1);

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        self.back(x.shape(), dy).map(Some)
    }
}

impl Resample {
    fn back(&self, x: &Shape, dy: &Tensor) -> Result<Tensor> {
        let dy = dy.contiguous()?;
        if let Some(gpu) = Gpu::of(&dy)? {
            let dy = gpu.operand(&dy)?;
            let dx = gpu.fresh(dy.dtype, x)?;
            gpu.run(|l| self.kernels(&dy).backward(l, dy.at, dx.at))?;
            return Ok(dx.tensor());
        }
        let held = Held::new(&dy);
        by_dtype!(dy.dtype(), self.name(), T => {
            tensor(self.scatter_add::<T>(held.elements()?), x)
        })
    }

    /// For a tensor (B, C, ...) on either side.
    fn kernels(&self, of: &Operand) -> moves::Resample {
        let (from, to) = ([self.h, self.w], [self.rows.len(), self.columns.len()]);
        moves::Resample { dtype: of.dtype, planes: of.dims[..2].iter().product(), from, to }
    }

    fn forward_on(&self, gpu: &Gpu, x: Operand) -> Result<Fresh> {
        let y = gpu.fresh(x.dtype, vec![x.dims[0], x.dims[1], self.rows.len(), self.columns.len()])?;
        gpu.run(|l| self.kernels(&x).forward(l, x.at, y.at))?;
        Ok(y)
    }

    fn gather<T: Real>(&self, x: &[T]) -> Vec<T> {
        let (small, large) = (self.h * self.w, self.rows.len() * self.columns.len());
        let mut y = unwritten::<T>(x.len() / small * large);
        let cost = y.len();
        let planes = rows_per_part(large);
        let parts: Vec<_> = y.chunks_mut(planes * large).zip(x.chunks(planes * small)).collect();
        for_parts(parts, cost, |_, (y, x)| {
            for (y, x) in y.chunks_mut(large).zip(x.chunks(small)) {
                for (y, &row) in y.chunks_mut(self.columns.len()).zip(&self.rows) {
                    let x = &x[row * self.w..][..self.w];
                    if 2 * self.w == y.len() {
                        for (pair, &x) in y.chunks_exact_mut(2).zip(x) {
                            pair.fill(x);
                        }
                    } else {
                        y.iter_mut().zip(&self.columns).for_each(|(y, &column)| *y = x[column]);
                    }
                }
            }
        });
        y
    }

    fn scatter_add<T: Real>(&self, dy: &[T]) -> Vec<T> {
        let (small, large) = (self.h * self.w, self.rows.len() * self.columns.len());
        let mut dx = unwritten::<T>(dy.len() / large * small);
        let planes = rows_per_part(large);
        let parts: Vec<_> = dx.chunks_mut(planes * small).zip(dy.chunks(planes * large)).collect();
        for_parts(parts, dy.len(), |_, (dx, dy)| {
            let (mut sums, mut row) = (vec![0f32; small], vec![0f32; self.columns.len()]);
            simd(
                #[inline(always)]
                || {
                    for (dx, dy) in dx.chunks_mut(small).zip(dy.chunks(large)) {
                        self.plane_sums(dy, &mut sums, &mut row);
                        dx.iter_mut().zip(&sums).for_each(|(dx, &sum)| *dx = T::from_f32(sum));
                    }
                },
            );
        });
        dx
    }

    /// The sums over the pixels that each pixel was the source of.
    #[inline(always)]
    fn plane_sums<T: Real>(&self, dy: &[T], sums: &mut [f32], row: &mut [f32]) {
        sums.fill(0.0);
        for (dy, &source) in dy.chunks(self.columns.len()).zip(&self.rows) {
            let (dy, sums) = (T::read(dy, row), &mut sums[source * self.w..][..self.w]);
            if 2 * self.w == dy.len() {
                sums.iter_mut().zip(dy.as_chunks::<2>().0).for_each(|(sum, [a, b])| *sum += a + b);
            } else {
                dy.iter().zip(&self.columns).for_each(|(dy, &column)| sums[column] += dy);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check, check_threads};

    fn resampled(shape: [usize; 4], height: usize, width: usize, test: fn(&Case)) {
        let [_, _, h, w] = shape;
        let reference = |v: &[Vec<f64>]| -> Vec<f64> {
            let plane = |x: &[f64]| -> Vec<f64> {
                (0..height * width).map(|i| x[i / width * h / height * w + i % width * w / width]).collect()
            };
            v[0].chunks(h * w).flat_map(plane).collect()
        };
        let op = |x: &[Tensor], _: &[_]| upsample_nearest(&x[0], height, width);
        test(&Case { inputs: &[&shape], weights: &[], op: &op, reference: &reference });
    }

    #[test]
    fn pixels_are_repeated_and_their_gradients_summed() {
        resampled([2, 3, 3, 5], 6, 10, check);
        resampled([1, 2, 5, 5], 9, 9, check);
        resampled([1, 2, 4, 6], 3, 3, check);
        resampled([2, 30, 19, 23], 38, 46, check_threads);
    }

    /// What torch 2.x's `interpolate` gives, where integers would give the next row.
    #[test]
    fn the_scale_is_rounded_as_torch_rounds_it() {
        assert_eq!(sources(2, 82)[40..43], [0, 0, 1]);
        assert_eq!((sources(3, 123)[41], sources(3, 123)[82]), (0, 1));
        assert_eq!(sources(5, 9), [0, 0, 1, 1, 2, 2, 3, 3, 4]);
        assert_eq!(sources(7, 3), [0, 2, 4]);
    }
}

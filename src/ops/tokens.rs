//! Images as sequences of pixels and back: two transposes, each the other's backward.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Held, by_dtype, elements, for_parts, result, rows_per_part, tensor};
use super::gpu::{Fresh, Gpu, Operand, cuda_forward, emulated1};
use super::record::apply1_by_shape;
use super::vector::{Real, unwritten};
use crate::kernels::glue::moves;

/// (B, C, H, W) -> (B, H*W, C).
pub fn tokens_from_image(x: &Tensor) -> Result<Tensor> {
    let (_, channels, height, width) = x.dims4()?;
    apply1_by_shape(
        x,
        Transpose { rows: channels, columns: height * width, to: vec![height * width, channels] },
        Transpose::back,
    )
}

/// (B, H*W, C) -> (B, C, H, W).
pub fn image_from_tokens(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (_, tokens, channels) = x.dims3()?;
    if tokens != height * width {
        bail!("image_from_tokens: {tokens} tokens are not {height}x{width} pixels");
    }
    apply1_by_shape(
        x,
        Transpose { rows: tokens, columns: channels, to: vec![channels, height, width] },
        Transpose::back,
    )
}

/// Transposes the `rows` x `columns` matrix of each batch row; the result's dims after the batch are `to`.
struct Transpose {
    rows: usize,
    columns: usize,
    to: Vec<usize>,
}

impl CustomOp1 for Transpose {
    fn name(&self) -> &'static str {
        "tokens"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if let Some(done) = emulated1(storage, layout, |gpu, x| self.forward_on(gpu, x)) {
            return done;
        }
        let mut dims = vec![layout.dims()[0]];
        dims.extend(&self.to);
        by_dtype!(storage.dtype(), self.name(), T => {
            Ok(result(transpose::<T>(elements(storage, layout)?, self.rows, self.columns), dims))
        })
    }

    cuda_forward!(1);

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        self.back(x.shape(), dy).map(Some)
    }
}

impl Transpose {
    fn back(&self, x: &Shape, dy: &Tensor) -> Result<Tensor> {
        let dy = dy.contiguous()?;
        if let Some(gpu) = Gpu::of(&dy)? {
            let dy = gpu.operand(&dy)?;
            let dx = gpu.fresh(dy.dtype, x)?;
            gpu.run(|l| moves::transpose(l, dy.dtype, dy.at, dx.at, dy.dims[0], self.columns, self.rows))?;
            return Ok(dx.tensor());
        }
        let held = Held::new(&dy);
        by_dtype!(dy.dtype(), self.name(), T => {
            tensor(transpose::<T>(held.elements()?, self.columns, self.rows), x)
        })
    }

    fn forward_on(&self, gpu: &Gpu, x: Operand) -> Result<Fresh> {
        let y = gpu.fresh(x.dtype, [&x.dims[..1], &self.to].concat())?;
        gpu.run(|l| moves::transpose(l, x.dtype, x.at, y.at, x.dims[0], self.rows, self.columns))?;
        Ok(y)
    }
}

/// (batch, rows, columns) -> (batch, columns, rows).
fn transpose<T: Real>(x: &[T], rows: usize, columns: usize) -> Vec<T> {
    let mut y = unwritten::<T>(x.len());
    if x.is_empty() {
        return y;
    }
    // A part is some columns of one matrix, which are whole rows of the result.
    let strip = rows_per_part(rows).next_multiple_of(16).min(columns);
    let mut parts = Vec::new();
    for (y, x) in y.chunks_mut(rows * columns).zip(x.chunks(rows * columns)) {
        parts.extend(y.chunks_mut(strip * rows).enumerate().map(|(i, y)| (y, x, i * strip)));
    }
    for_parts(parts, x.len(), |_, (y, x, first)| {
        T::transpose(&x[first..], columns, (rows, y.len() / rows), y, rows);
    });
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check, check_threads};

    /// (rows, columns) to (columns, rows) in each batch row.
    fn swapped(v: &[f64], rows: usize, columns: usize) -> Vec<f64> {
        let one = |x: &[f64]| -> Vec<f64> { (0..x.len()).map(|i| x[i % rows * columns + i / rows]).collect() };
        v.chunks(rows * columns).flat_map(one).collect()
    }

    fn there_and_back(batch: usize, channels: usize, height: usize, width: usize, test: fn(&Case)) {
        let pixels = height * width;
        test(&Case {
            inputs: &[&[batch, channels, height, width]],
            weights: &[],
            op: &|x, _| tokens_from_image(&x[0]),
            reference: &|v| swapped(&v[0], channels, pixels),
        });
        test(&Case {
            inputs: &[&[batch, pixels, channels]],
            weights: &[],
            op: &|x, _| image_from_tokens(&x[0], height, width),
            reference: &|v| swapped(&v[0], pixels, channels),
        });
    }

    #[test]
    fn images_become_tokens_and_tokens_images() {
        there_and_back(2, 3, 3, 5, check);
        there_and_back(1, 21, 1, 19, check);
        there_and_back(2, 70, 23, 17, check_threads);
    }

    #[test]
    fn an_image_survives_the_round_trip() {
        let x = crate::ops::testing::var(1, (2, 35, 19, 33), candle_core::DType::BF16);
        let back = image_from_tokens(&tokens_from_image(&x).unwrap(), 19, 33).unwrap();
        assert_eq!(crate::ops::testing::f64s(&back), crate::ops::testing::f64s(&x));
        assert!(image_from_tokens(&tokens_from_image(&x).unwrap(), 33, 18).is_err());
    }
}

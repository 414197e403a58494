//! What joins ops: the residual sum and the concatenation of channels. candle has both; these keep half precision
//! in vector code, and hand the gradients on contiguous.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Held, by_dtype, elements, for_parts, result, rows_per_part, tensor};
use super::gpu::{Fresh, Gpu, Operand, cuda_forward, emulated2};
use super::pointwise::map2;
use super::record::apply2_by_shape;
use super::vector::{Real, unwritten};
use crate::kernels::glue;

/// a + b, of one shape and dtype.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.shape() != b.shape() || a.dtype() != b.dtype() {
        bail!("add: {:?} {:?} and {:?} {:?}", a.shape(), a.dtype(), b.shape(), b.dtype());
    }
    apply2_by_shape(a, b, Add, |_, _, dy| Ok([dy.clone(), dy.clone()]))
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout, b: &CpuStorage, lb: &Layout) -> Result<(CpuStorage, Shape)> {
        if let Some(done) = emulated2((a, la), (b, lb), |gpu, a, b| self.forward_on(gpu, a, b)) {
            return done;
        }
        by_dtype!(a.dtype(), self.name(), T => {
            let sum = map2::<T>(
                elements(a, la)?,
                elements(b, lb)?,
                #[inline(always)]
                |a, b| a + b,
            );
            Ok(result(sum, la.shape()))
        })
    }

    cuda_forward!(2);

    fn bwd(&self, _a: &Tensor, _b: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(dy.clone()), Some(dy.clone())))
    }
}

impl Add {
    fn forward_on(&self, gpu: &Gpu, a: Operand, b: Operand) -> Result<Fresh> {
        let y = gpu.fresh(a.dtype, a.dims)?;
        gpu.run(|l| glue::add(l, a.dtype, a.at, b.at, y.at, a.len()))?;
        Ok(y)
    }
}

/// Tensors (B, Ci, ...) with the same other dimensions -> (B, sum of Ci, ...).
pub fn cat_channels(tensors: &[&Tensor]) -> Result<Tensor> {
    let Some((&first, rest)) = tensors.split_first() else { bail!("cat_channels: of nothing") };
    let mut joined = first.clone();
    for &next in rest {
        let fits = joined.rank() >= 2
            && joined.rank() == next.rank()
            && joined.dtype() == next.dtype()
            && joined.dims()[0] == next.dims()[0]
            && joined.dims()[2..] == next.dims()[2..];
        if !fits {
            bail!("cat_channels: {:?} {:?} and {:?} {:?}", joined.shape(), joined.dtype(), next.shape(), next.dtype());
        }
        joined = apply2_by_shape(&joined, next, Cat, Cat::back)?;
    }
    Ok(joined)
}

struct Cat;

/// Elements of a batch row.
fn row(dims: &[usize]) -> usize {
    dims[1..].iter().product()
}

impl CustomOp2 for Cat {
    fn name(&self) -> &'static str {
        "cat_channels"
    }

    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout, b: &CpuStorage, lb: &Layout) -> Result<(CpuStorage, Shape)> {
        if let Some(done) = emulated2((a, la), (b, lb), |gpu, a, b| self.forward_on(gpu, a, b)) {
            return done;
        }
        let mut dims = la.dims().to_vec();
        dims[1] += lb.dims()[1];
        by_dtype!(a.dtype(), self.name(), T => {
            let (a, b) = (elements::<T>(a, la)?, elements::<T>(b, lb)?);
            let mut y = unwritten::<T>(a.len() + b.len());
            let mut copies = Vec::new();
            let mut rest = y.as_mut_slice();
            for i in 0..dims[0] {
                for (from, row) in [(a, row(la.dims())), (b, row(lb.dims()))] {
                    let to = rest.split_off_mut(..row).unwrap_or_default();
                    copies.push((to, &from[i * row..][..row]));
                }
            }
            copy(copies);
            Ok(result(y, dims))
        })
    }

    cuda_forward!(2);

    fn bwd(&self, a: &Tensor, b: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [da, db] = self.back([a.shape(), b.shape()], dy)?;
        Ok((Some(da), Some(db)))
    }
}

impl Cat {
    fn back(&self, [a, b]: [&Shape; 2], dy: &Tensor) -> Result<[Tensor; 2]> {
        let dy = dy.contiguous()?;
        let (ra, rb) = (row(a.dims()), row(b.dims()));
        if let Some(gpu) = Gpu::of(&dy)? {
            let dy = gpu.operand(&dy)?;
            let (da, db) = (gpu.fresh(dy.dtype, a)?, gpu.fresh(dy.dtype, b)?);
            gpu.run(|l| glue::moves::split_rows(l, dy.dtype, dy.at, (da.at, ra), (db.at, rb), dy.dims[0]))?;
            return Ok([da.tensor(), db.tensor()]);
        }
        let held = Held::new(&dy);
        by_dtype!(dy.dtype(), self.name(), T => {
            let dy = held.elements::<T>()?;
            let (mut da, mut db) = (unwritten::<T>(a.elem_count()), unwritten::<T>(b.elem_count()));
            let mut copies = Vec::new();
            if ra + rb > 0 {
                for ((da, db), dy) in da.chunks_mut(ra.max(1)).zip(db.chunks_mut(rb.max(1))).zip(dy.chunks(ra + rb)) {
                    copies.push((da, &dy[..ra]));
                    copies.push((db, &dy[ra..]));
                }
            }
            copy(copies);
            Ok([tensor(da, a)?, tensor(db, b)?])
        })
    }

    fn forward_on(&self, gpu: &Gpu, a: Operand, b: Operand) -> Result<Fresh> {
        let mut dims = a.dims.to_vec();
        dims[1] += b.dims[1];
        let y = gpu.fresh(a.dtype, dims)?;
        let parts = [(a.at, row(a.dims)), (b.at, row(b.dims))];
        gpu.run(|l| glue::moves::join_rows(l, a.dtype, parts[0], parts[1], y.at, a.dims[0]))?;
        Ok(y)
    }
}

/// Copies each of the pairs, cut into pieces for threads.
fn copy<T: Real>(pairs: Vec<(&mut [T], &[T])>) {
    let piece = rows_per_part(1);
    let cost = pairs.iter().map(|(to, _)| to.len()).sum();
    let pieces = pairs.into_iter().flat_map(|(to, from)| to.chunks_mut(piece).zip(from.chunks(piece))).collect();
    for_parts(pieces, cost, |_, (to, from): (&mut [T], &[T])| to.copy_from_slice(from));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check, check_threads};

    fn added(shape: &[usize], test: fn(&Case)) {
        let reference = |v: &[Vec<f64>]| -> Vec<f64> { v[0].iter().zip(&v[1]).map(|(a, b)| a + b).collect() };
        test(&Case { inputs: &[shape, shape], weights: &[], op: &|x, _| add(&x[0], &x[1]), reference: &reference });
    }

    fn joined(channels: [usize; 3], height: usize, width: usize, test: fn(&Case)) {
        let shapes = channels.map(|c| [2, c, height, width]);
        let reference = |v: &[Vec<f64>]| -> Vec<f64> {
            let row = |b: usize, i: usize| v[i][v[i].len() / 2 * b..][..v[i].len() / 2].to_vec();
            (0..2).flat_map(|b| (0..3).flat_map(move |i| row(b, i)).collect::<Vec<_>>()).collect()
        };
        test(&Case {
            inputs: &[&shapes[0], &shapes[1], &shapes[2]],
            weights: &[],
            op: &|x, _| cat_channels(&[&x[0], &x[1], &x[2]]),
            reference: &reference,
        });
    }

    #[test]
    fn sums_and_concatenations_hand_gradients_back() {
        added(&[2, 3, 3, 5], check);
        added(&[2, 30, 41, 37], check_threads);
        joined([3, 1, 2], 3, 5, check);
        joined([20, 11, 5], 41, 37, check_threads);
    }

    #[test]
    fn tensors_that_do_not_fit_are_refused() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        assert!(add(&zeros(&[2, 3]), &zeros(&[3, 2])).is_err());
        assert!(cat_channels(&[&zeros(&[2, 3, 4]), &zeros(&[2, 3, 5])]).is_err());
        assert!(cat_channels(&[]).is_err());
    }
}

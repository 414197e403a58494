//! Table look-up, as the text encoders' token and position embeddings.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Held, by_dtype, elements, for_parts, result, rows_per_part};
use super::gpu::{Fresh, Gpu, Operand, cuda_forward, emulated1};
use super::record::apply1_with_weights;
use super::vector::{Real, unwritten};
use crate::device::WeightRef;
use crate::kernels::Address;
use crate::kernels::glue::sums;

/// ids u32 (B, S), table (V, D), positions (P, D) with P >= S -> (B, S, D) in `dtype`: table[id] + positions[s].
///
/// `dtype` is that of the weights. Outside of a recording the table is trained only if `ids` is a `Var` (an integer one has
/// no gradient itself).
pub fn embedding(ids: &Tensor, table: &WeightRef, positions: Option<&WeightRef>, dtype: DType) -> Result<Tensor> {
    let (_, length) = ids.dims2()?;
    let &[rows, width] = table.shape() else { bail!("{}: a table has two dimensions", table.name()) };
    if let Some(positions) = positions
        && !matches!(*positions.shape(), [p, w] if p >= length && w == width)
    {
        bail!("{}: {:?} has no places for {length} tokens of width {width}", positions.name(), positions.shape());
    }
    let op = Embedding { table: table.clone(), positions: positions.cloned(), rows, width, dtype };
    let trains = table.trainable() || positions.is_some_and(WeightRef::trainable);
    apply1_with_weights(ids, op, trains, |op, ids, dy, _| op.bwd(ids, dy, dy))
}

struct Embedding {
    table: WeightRef,
    positions: Option<WeightRef>,
    rows: usize,
    width: usize,
    dtype: DType,
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if let Some(done) = emulated1(storage, layout, |gpu, ids| self.forward_on(gpu, ids)) {
            return done;
        }
        let (batch, length) = layout.shape().dims2()?;
        let ids = elements::<u32>(storage, layout)?;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.rows) {
            bail!("{}: there is no row {id} among {}", self.table.name(), self.rows);
        }
        by_dtype!(self.dtype, self.name(), T => {
            Ok(result(self.look_up::<T>(ids, length)?, (batch, length, self.width)))
        })
    }

    cuda_forward!(1);

    fn bwd(&self, ids: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        if let Some(gpu) = Gpu::of(ids)? {
            self.backward_on(&gpu, &gpu.operand(ids)?, &gpu.operand(&dy)?)?;
            return Ok(None);
        }
        let (held_ids, held_dy) = (Held::new(ids), Held::new(&dy));
        let length = ids.dim(1)?;
        by_dtype!(self.dtype, self.name(), T => {
            self.add_gradients::<T>(held_ids.elements()?, held_dy.elements()?, length)?;
        });
        Ok(None)
    }
}

impl Embedding {
    fn kernels(&self, ids: &Operand) -> sums::Embedding {
        let &[batch, length] = ids.dims else { unreachable!("checked in `embedding`") };
        sums::Embedding { dtype: self.dtype, batch, length, rows: self.rows, width: self.width }
    }

    fn forward_on(&self, gpu: &Gpu, ids: Operand) -> Result<Fresh> {
        let y = gpu.fresh(self.dtype, [ids.dims, &[self.width]].concat())?;
        let table = self.table.at(self.dtype)?;
        let positions = self.positions.as_ref().map(|p| p.at(self.dtype)).transpose()?;
        let places = positions.as_ref().map_or(Address::NULL, |p| p.address());
        gpu.run(|l| {
            // An id beyond the table reads nothing; that there is none is seen to where prompts become ids.
            let wrong = l.scratch(4)?;
            self.kernels(&ids).forward(l, ids.at, table.address(), places, y.at, wrong.address())
        })?;
        Ok(y)
    }

    fn backward_on(&self, gpu: &Gpu, ids: &Operand, dy: &Operand) -> Result<()> {
        let table = self.table.grad_at()?;
        let positions = self.positions.as_ref().map_or(Ok(Address::NULL), |positions| positions.grad_at())?;
        gpu.run(|l| self.kernels(ids).backward(l, ids.at, dy.at, table, positions))
    }

    fn look_up<T: Real>(&self, ids: &[u32], length: usize) -> Result<Vec<T>> {
        let table = self.table.view::<T>()?;
        let positions = self.positions.as_ref().map(|p| p.view::<T>()).transpose()?;
        let width = self.width;
        let mut y = unwritten::<T>(ids.len() * width);
        let cost = y.len();
        let rows = rows_per_part(width);
        let parts: Vec<_> = y.chunks_mut(rows * width).zip(ids.chunks(rows)).collect();
        let (table, positions) = (&*table, positions.as_deref());
        for_parts(parts, cost, |part, (y, ids)| {
            for (i, (y, &id)) in y.chunks_mut(width).zip(ids).enumerate() {
                y.copy_from_slice(&table[id as usize * width..][..width]);
                if let Some(positions) = positions {
                    let place = (part * rows + i) % length;
                    for (y, p) in y.iter_mut().zip(&positions[place * width..][..width]) {
                        *y = T::from_f32(y.to_f32() + p.to_f32());
                    }
                }
            }
        });
        Ok(y)
    }

    /// One token after the other, so that tokens that repeat add up in a fixed order.
    fn add_gradients<T: Real>(&self, ids: &[u32], dy: &[T], length: usize) -> Result<()> {
        let width = self.width;
        let add = |grad: &mut [f32], row: usize, dy: &[T]| {
            grad[row * width..][..width].iter_mut().zip(dy).for_each(|(g, dy)| *g += dy.to_f32());
        };
        self.table.add_grad(|grad| {
            ids.iter().zip(dy.chunks(width)).for_each(|(&id, dy)| add(grad, id as usize, dy));
        })?;
        let Some(positions) = &self.positions else { return Ok(()) };
        positions.add_grad(|grad| {
            dy.chunks(width).enumerate().for_each(|(i, dy)| add(grad, i % length, dy));
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{close, f64s, var, weight};
    use candle_core::{Device, Var};

    /// ids (2, 3) with a repeated token.
    fn ids() -> Var {
        Var::from_tensor(&Tensor::new(&[[1u32, 4, 1], [0, 1, 2]], &Device::Cpu).unwrap()).unwrap()
    }

    #[test]
    fn rows_are_looked_up_and_gradients_scattered() {
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 1e-2), (DType::F16, 2e-3)] {
            let (table, places) = (weight(1, &[5, 7], dtype, 0.0).unwrap(), weight(2, &[4, 7], dtype, 0.0).unwrap());
            let (t, p) = (crate::ops::testing::numbers(1, 35), crate::ops::testing::numbers(2, 28));
            let dy = var(3, (2, 3, 7), dtype);
            let (mut want, mut want_t, mut want_p) = (Vec::new(), vec![0.0; 35], vec![0.0; 28]);
            for (i, &id) in [1, 4, 1, 0, 1, 2].iter().enumerate() {
                for c in 0..7 {
                    want.push((t[id * 7 + c] + p[i % 3 * 7 + c]) as f64);
                    // Two passes below.
                    want_t[id * 7 + c] += 2.0 * f64s(&dy)[i * 7 + c];
                    want_p[i % 3 * 7 + c] += 2.0 * f64s(&dy)[i * 7 + c];
                }
            }
            for _ in 0..2 {
                let y = embedding(&ids(), &table, Some(&places), dtype).unwrap();
                assert_eq!(y.dtype(), dtype);
                close(&f64s(&y), &want, tolerance, "y");
                (&y * dy.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
            }
            let wide = |g: Vec<f32>| g.iter().map(|&g| g as f64).collect::<Vec<_>>();
            close(&wide(table.grad()), &want_t, 1e-6, "table");
            close(&wide(places.grad()), &want_p, 1e-6, "positions");
        }
    }

    #[test]
    fn requests_outside_the_table_are_errors() {
        let (table, places) =
            (weight(1, &[4, 7], DType::F32, 0.0).unwrap(), weight(2, &[2, 7], DType::F32, 0.0).unwrap());
        assert!(embedding(&ids(), &table, None, DType::F32).unwrap_err().to_string().contains("no row 4"));
        assert!(embedding(&ids(), &table, Some(&places), DType::F32).is_err());
        assert!(embedding(&ids(), &table, None, DType::BF16).is_err());
    }
}

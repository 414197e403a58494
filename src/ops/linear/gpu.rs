//! Linear layers by kernels and cuBLAS.

use candle_core::{DType, Result, Tensor};

use super::Linear;
use crate::kernels::Address;
use crate::kernels::glue::sums;
use crate::kernels::product::{self, Factor};
use crate::ops::gpu::{Fresh, Gpu, Operand};

/// A row-major matrix with so many columns; `turned`: multiplied with rows and columns exchanged.
fn factor(at: Address, columns: usize, turned: bool) -> Factor {
    Factor { at, stride: columns, turned }
}

impl Linear {
    /// The bias in every row first, to which the product is added: rounded once.
    pub(super) fn forward_on(&self, gpu: &Gpu, x: Operand) -> Result<Fresh> {
        let &Linear { inputs, outputs, .. } = self;
        let (dtype, rows) = (x.dtype, x.len() / inputs);
        let mut dims = x.dims.to_vec();
        *dims.last_mut().expect("checked in `linear`") = outputs;
        let y = gpu.fresh(dtype, dims)?;
        let weight = self.weight.at(dtype)?;
        let bias = self.bias.as_ref().map(|bias| bias.at(dtype)).transpose()?;
        let (a, b) = (factor(x.at, inputs, false), factor(weight.address(), inputs, true));
        gpu.run(|l| {
            if let Some(bias) = &bias {
                sums::add_bias(l, dtype, Address::NULL, bias.address(), Address::NULL, y.at, rows, outputs)?;
            }
            let (c, c_dtype, adds) = (y.at, dtype, bias.is_some());
            l.multiply(&product::Product {
                rows,
                columns: outputs,
                inner: inputs,
                dtype,
                a,
                b,
                c,
                c_dtype,
                c_stride: outputs,
                adds,
            })
        })?;
        Ok(y)
    }

    pub(super) fn input_gradient_on(&self, gpu: &Gpu, x: &Operand, dy: &Operand) -> Result<Tensor> {
        let &Linear { inputs, outputs, .. } = self;
        let (dtype, rows) = (x.dtype, x.len() / inputs);
        let dx = gpu.fresh(dtype, x.dims)?;
        let weight = self.weight.at(dtype)?;
        let (a, b) = (factor(dy.at, outputs, false), factor(weight.address(), inputs, false));
        gpu.run(|l| {
            let (c, c_dtype, c_stride) = (dx.at, dtype, inputs);
            l.multiply(&product::Product {
                rows,
                columns: inputs,
                inner: outputs,
                dtype,
                a,
                b,
                c,
                c_dtype,
                c_stride,
                adds: false,
            })
        })?;
        Ok(dx.tensor())
    }

    pub(super) fn add_weight_gradients_on(&self, gpu: &Gpu, x: &Operand, dy: &Operand) -> Result<()> {
        let &Linear { inputs, outputs, .. } = self;
        let (dtype, rows) = (x.dtype, x.len() / inputs);
        let (a, b) = (factor(dy.at, outputs, true), factor(x.at, inputs, false));
        let (dw, db) = (self.weight.grad_at()?, self.bias.as_ref().map_or(Ok(Address::NULL), |bias| bias.grad_at())?);
        gpu.run(|l| {
            if dw != Address::NULL {
                let (c_dtype, c_stride) = (DType::F32, inputs);
                let (rows, columns, inner) = (outputs, inputs, rows);
                l.multiply(&product::Product {
                    rows,
                    columns,
                    inner,
                    dtype,
                    a,
                    b,
                    c: dw,
                    c_dtype,
                    c_stride,
                    adds: true,
                })?;
            }
            match db == Address::NULL {
                true => Ok(()),
                false => sums::add_column_sums(l, dtype, dy.at, db, rows, outputs),
            }
        })
    }
}

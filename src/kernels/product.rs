//! Plain matrix products, which are cuBLAS's on a GPU: C = A B, row-major, sums in fp32 or wider.

use anyhow::{Result, ensure};
use candle_core::DType;

use super::Address;

/// Bytes that cuBLAS works in on a device of this capability: what NVIDIA recommends for Hopper and for what is older.
pub fn scratch_bytes(capability: u32) -> usize {
    if capability >= 90 { 32 << 20 } else { 4 << 20 }
}

/// A factor as it lies in memory: `stride` elements from the start of one row to the next one's. `turned`: what is
/// multiplied has its rows where this has its columns.
#[derive(Clone, Copy, Debug)]
pub struct Factor {
    pub at: Address,
    pub stride: usize,
    pub turned: bool,
}

/// C (rows, columns) = A (rows, inner) B (inner, columns); `adds`: plus what C was.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub rows: usize,
    pub columns: usize,
    pub inner: usize,
    /// Of both factors.
    pub dtype: DType,
    pub a: Factor,
    pub b: Factor,
    pub c: Address,
    /// That of the factors, or fp32.
    pub c_dtype: DType,
    pub c_stride: usize,
    pub adds: bool,
}

impl Product {
    /// Refuses dtypes and strides that make no sense.
    pub fn check(&self) -> Result<()> {
        let halves = matches!(self.dtype, DType::F16 | DType::BF16);
        ensure!(halves || self.dtype == DType::F32, "a product of {:?}", self.dtype);
        ensure!(
            self.c_dtype == self.dtype || self.c_dtype == DType::F32,
            "a product of {:?} as {:?}",
            self.dtype,
            self.c_dtype
        );
        let width = |factor: &Factor, rows: usize, columns: usize| if factor.turned { rows } else { columns };
        ensure!(self.a.stride >= width(&self.a, self.rows, self.inner), "a product whose rows overlap: {self:?}");
        ensure!(self.b.stride >= width(&self.b, self.inner, self.columns), "a product whose rows overlap: {self:?}");
        ensure!(self.c_stride >= self.columns, "a product whose rows overlap: {self:?}");
        Ok(())
    }
}

#[cfg(feature = "emulate")]
pub(super) use emulated::multiply;

#[cfg(feature = "emulate")]
mod emulated {
    use half::{bf16, f16};

    use super::*;

    /// The product in host memory, one number after another, in f64.
    ///
    /// # Safety
    /// The addresses are those of matrices as the product describes them, and nobody else changes C meanwhile.
    pub unsafe fn multiply(product: &Product) -> Result<()> {
        product.check()?;
        let &Product { rows, columns, inner, dtype, a, b, c, c_dtype, c_stride, adds } = product;
        let place = |factor: Factor, row: usize, column: usize| match factor.turned {
            true => column * factor.stride + row,
            false => row * factor.stride + column,
        };
        for row in 0..rows {
            for column in 0..columns {
                let at = row * c_stride + column;
                // SAFETY: places within the matrices, as the caller promises.
                unsafe {
                    let mut sum = if adds { read(c, c_dtype, at) } else { 0.0 };
                    for k in 0..inner {
                        sum += read(a.at, dtype, place(a, row, k)) * read(b.at, dtype, place(b, k, column));
                    }
                    write(c, c_dtype, at, sum);
                }
            }
        }
        Ok(())
    }

    unsafe fn read(from: Address, dtype: DType, at: usize) -> f64 {
        // SAFETY: the caller's.
        unsafe {
            match dtype {
                DType::F16 => (*(from.0 as *const f16).add(at)).to_f64(),
                DType::BF16 => (*(from.0 as *const bf16).add(at)).to_f64(),
                _ => f64::from(*(from.0 as *const f32).add(at)),
            }
        }
    }

    unsafe fn write(to: Address, dtype: DType, at: usize, value: f64) {
        // SAFETY: the caller's. Rounded to fp32 first, as a GPU's accumulators are.
        unsafe {
            match dtype {
                DType::F16 => *(to.0 as *mut f16).add(at) = f16::from_f32(value as f32),
                DType::BF16 => *(to.0 as *mut bf16).add(at) = bf16::from_f32(value as f32),
                _ => *(to.0 as *mut f32).add(at) = value as f32,
            }
        }
    }
}

//! Matrix products, by cuBLAS: sums in fp32, TF32 off unless it is allowed, the same bits every time (one stream, scratch of
//! our own).

use std::ffi::{c_int, c_void};

use anyhow::{Context, Result, bail};
use candle_core::DType;
use cudarc::cublas::result::gemm_ex;
use cudarc::cublas::sys as cublas;

use crate::kernels::product::{Factor, Product};

/// Lets sums be taken in nothing narrower than fp32, for all products with this handle.
///
/// # Safety
/// The handle is alive.
pub unsafe fn keep_sums_wide(handle: cublas::cublasHandle_t) -> Result<()> {
    let mode = cublas::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    // SAFETY: the caller's.
    match unsafe { cublas::cublasSetMathMode(handle, mode) } {
        cublas::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        status => bail!("cuBLAS will not keep its sums in fp32: {status:?}"),
    }
}

/// Launches the product on the handle's stream. cuBLAS counts columns first: what it is asked for is the transposed
/// product of the transposed factors, which lie there as ours do. `tf32`: factors in fp32 may be rounded to it.
///
/// # Safety
/// The handle is alive, and the addresses are those of matrices as the product describes them, in its device's memory.
pub unsafe fn multiply(handle: cublas::cublasHandle_t, product: &Product, tf32: bool) -> Result<()> {
    product.check()?;
    let &Product { rows, columns, inner, a, b, c, c_stride, adds, .. } = product;
    if rows * columns == 0 {
        return Ok(());
    }
    let size = |number: usize| c_int::try_from(number).with_context(|| format!("a matrix as large as {product:?}"));
    let (one, beta) = (1f32, if adds { 1f32 } else { 0f32 });
    let (factor, result) = (kind(product.dtype)?, kind(product.c_dtype)?);
    let compute = match tf32 && product.dtype == DType::F32 {
        true => cublas::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        false => cublas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    // SAFETY: the caller's; the two numbers are read before the call returns (host pointers are cuBLAS's default).
    let launched = unsafe {
        gemm_ex(
            handle,
            operation(b),
            operation(a),
            size(columns)?,
            size(rows)?,
            size(inner)?,
            (&raw const one).cast(),
            b.at.0 as *const c_void,
            factor,
            size(b.stride)?,
            a.at.0 as *const c_void,
            factor,
            size(a.stride)?,
            (&raw const beta).cast(),
            c.0 as *mut c_void,
            result,
            size(c_stride)?,
            compute,
            cublas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    launched.map_err(|error| anyhow::anyhow!("cuBLAS refuses {product:?}: {:?}", error.0))
}

fn operation(factor: Factor) -> cublas::cublasOperation_t {
    match factor.turned {
        true => cublas::cublasOperation_t::CUBLAS_OP_T,
        false => cublas::cublasOperation_t::CUBLAS_OP_N,
    }
}

fn kind(dtype: DType) -> Result<cublas::cudaDataType> {
    Ok(match dtype {
        DType::F32 => cublas::cudaDataType::CUDA_R_32F,
        DType::F16 => cublas::cudaDataType::CUDA_R_16F,
        DType::BF16 => cublas::cudaDataType::CUDA_R_16BF,
        other => bail!("a product of {other:?}"),
    })
}

//! Matrix multiplication: fp32 sums with fused multiply-adds over operands of any number type, which are packed from
//! wherever they lie (strided, transposed, the patches of an image). The layers are in `linear` and `conv2d`.
//!
//! The scheme is the one of Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", 2008).
//! Note: bits. An element is the sum over blocks of k, in order, of the chain of fused multiply-adds over the block; the
//! blocks depend on the depth alone. So it has the same bits for every instruction set, number of threads, and cut.

mod micro;
mod out;
mod pack;
mod product;
mod simd;
mod sums;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(super) use out::{Bias, Lattice, Out};
pub(super) use pack::{Grid, Left, Matrix, Right, panels, turned};
pub(super) use product::{Product, block_of};
pub use simd::Isa;
pub(super) use simd::{MOST_LANES, Scalar, Simd};
pub(super) use sums::{add_channel_sums, add_column_sums};

/// A matrix somewhere in a slice: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub col_stride: usize,
}

/// c = a b, or c += a b, on this thread: a (m, k), b (k, n), c (m, n) with `ldc` elements from row to row. For blocks of a
/// larger computation; allocates nothing once a thread has done its largest. Panics if a slice is too short.
#[allow(clippy::too_many_arguments)]
pub fn gemm_serial(m: usize, n: usize, k: usize, a: View, b: View, accumulate: bool, c: &mut [f32], ldc: usize) {
    gemm_serial_on(Isa::best(), [m, n, k], a, b, accumulate, c, ldc);
}

fn gemm_serial_on(isa: Isa, [m, n, k]: [usize; 3], a: View, b: View, accumulate: bool, c: &mut [f32], ldc: usize) {
    if m == 0 || n == 0 {
        return;
    }
    let product = Product {
        a: &Matrix::new(a.data, m, k, a.row_stride, a.col_stride),
        b: &Matrix::new(b.data, k, n, b.row_stride, b.col_stride),
        rows: m,
        grid: Grid::plain(n),
        depth: k,
        block: block_of(k, 1),
    };
    product.run_serial(isa, if accumulate { Out::adding(c, ldc, 0) } else { Out::storing(c, ldc, 0) });
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::numbers;

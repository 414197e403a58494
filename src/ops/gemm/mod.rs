//! Matrix multiplication: fp32 sums with fused multiply-adds over operands of any number type, which are packed from
//! wherever they lie (strided, transposed, the patches of an image). The layers are in `linear` and `conv2d`.
//!
//! The scheme is the one of Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", 2008).
//! Note: bits. An element is the sum over blocks of k, in order, of the chain of fused multiply-adds over the block; the
//! blocks depend on the operands' depth alone. So it has the same bits for every instruction set, number of threads, and cut.

mod few;
mod micro;
mod out;
mod pack;
mod product;
mod simd;
mod sums;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(super) use few::{FEW, few_rows};
pub(super) use out::{Bias, Lattice, Out};
pub(super) use pack::{Grid, Left, Matrix, Right, panels, turned};
pub(super) use product::Product;
pub(super) use simd::{MOST_LANES, Scalar, Simd, first};
pub(super) use sums::{add_channel_sums, add_column_sums};

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(super) use simd::{Isa, with_isa};
#[cfg(test)]
pub(super) use tests::numbers;

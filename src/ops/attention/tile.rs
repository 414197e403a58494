//! The one matrix product of attention: small, with one operand taken as it lies in memory (any strides, one number
//! broadcast at a time) and the other in rows of whole vectors, so that nothing is packed. Every result is one chain of
//! fused multiply-adds in the order of the summed index, whatever the processor's vectors.

use super::lanes::{Kernel, LANES, Vector, on_vectors};

/// Where the broadcast operand's (row, k) element is: `data[row * row_stride + k * k_stride]`.
#[derive(Clone, Copy)]
pub struct Strided<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub k_stride: usize,
}

/// Rows of numbers, `stride` apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// As a broadcast operand with these rows.
    pub fn by_row(self) -> Strided<'a> {
        Strided { data: self.data, row_stride: self.stride, k_stride: 1 }
    }

    /// As a broadcast operand with these columns as rows.
    pub fn by_column(self) -> Strided<'a> {
        Strided { data: self.data, row_stride: 1, k_stride: self.stride }
    }
}

/// Sizes of a product; `width` is a multiple of 16.
#[derive(Clone, Copy)]
pub struct Size {
    pub rows: usize,
    pub width: usize,
    pub depth: usize,
}

/// c[row][lane] = (or +=, if `add`) sum over k of a(row, k) * b[k][lane]. Rows of `c` are `c_stride` apart.
pub fn multiply(size: Size, a: Strided, b: Rows, c: &mut [f32], c_stride: usize, add: bool) {
    let Size { rows, width, depth } = size;
    if rows == 0 || width == 0 {
        return;
    }
    assert!(width.is_multiple_of(LANES) && width <= b.stride && width <= c_stride, "rows of whole vectors");
    assert!(c.len() >= (rows - 1) * c_stride + width, "result too short");
    if depth > 0 {
        assert!(b.data.len() >= (depth - 1) * b.stride + width, "row operand too short");
        assert!(a.data.len() > (rows - 1) * a.row_stride + (depth - 1) * a.k_stride, "strided operand too short");
    }
    let job = Job {
        rows,
        width,
        depth,
        a: a.data.as_ptr(),
        row_stride: a.row_stride,
        k_stride: a.k_stride,
        b: b.data.as_ptr(),
        b_stride: b.stride,
        c: c.as_mut_ptr(),
        c_stride,
        add,
    };
    // SAFETY: the assertions above bound every access of the tiles, which cover exactly rows x width of c.
    unsafe { on_vectors(job) }
}

#[derive(Clone, Copy)]
struct Job {
    rows: usize,
    width: usize,
    depth: usize,
    a: *const f32,
    row_stride: usize,
    k_stride: usize,
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
    add: bool,
}

impl Kernel for Job {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: as promised by `multiply`.
        unsafe {
            if V::SUMS < 24 {
                return if V::SUMS < 6 { self.sweep::<V, 2, 1>() } else { self.sweep::<V, 6, 1>() };
            }
            let fours = self.width / (4 * LANES) * (4 * LANES);
            Job { width: fours, ..self }.sweep::<V, 6, 4>();
            let rest = Job { width: self.width - fours, ..self.at_lane(fours) };
            match rest.width / LANES {
                3 => rest.sweep::<V, 8, 3>(),
                2 => rest.sweep::<V, 12, 2>(),
                1 => rest.sweep::<V, 16, 1>(),
                _ => (),
            }
        }
    }
}

impl Job {
    /// The job's columns from `lane` on.
    #[inline(always)]
    unsafe fn at_lane(self, lane: usize) -> Job {
        // SAFETY: `lane` is within the width, which `multiply` has checked.
        unsafe { Job { b: self.b.add(lane), c: self.c.add(lane), ..self } }
    }

    /// The job's rows from `row` on.
    #[inline(always)]
    unsafe fn at_row(self, row: usize) -> Job {
        // SAFETY: `row` is below the number of rows, which `multiply` has checked.
        unsafe { Job { a: self.a.add(row * self.row_stride), c: self.c.add(row * self.c_stride), ..self } }
    }

    /// Tiles of M rows by N vectors, then the rows that are left.
    #[inline(always)]
    unsafe fn sweep<V: Vector, const M: usize, const N: usize>(self) {
        for lane in (0..self.width).step_by(N * LANES) {
            // SAFETY: lane < width and row < rows throughout.
            unsafe {
                let job = self.at_lane(lane);
                let mut row = 0;
                while row + M <= self.rows {
                    job.at_row(row).tile::<V, M, N>();
                    row += M;
                }
                while M > 4 && row + 4 <= self.rows {
                    job.at_row(row).tile::<V, 4, N>();
                    row += 4;
                }
                match self.rows - row {
                    3 => job.at_row(row).tile::<V, 3, N>(),
                    2 => job.at_row(row).tile::<V, 2, N>(),
                    1 => job.at_row(row).tile::<V, 1, N>(),
                    _ => (),
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<V: Vector, const M: usize, const N: usize>(self) {
        // SAFETY: M rows and N vectors lie within the operands, as `multiply` has checked.
        unsafe {
            let mut sums = [[V::splat(0.0); N]; M];
            if self.add {
                for (i, row) in sums.iter_mut().enumerate() {
                    for (j, sum) in row.iter_mut().enumerate() {
                        *sum = V::load(self.c.add(i * self.c_stride + j * LANES));
                    }
                }
            }
            for k in 0..self.depth {
                let mut b = [V::splat(0.0); N];
                for (j, b) in b.iter_mut().enumerate() {
                    *b = V::load(self.b.add(k * self.b_stride + j * LANES));
                }
                for (i, row) in sums.iter_mut().enumerate() {
                    let a = V::splat(*self.a.add(i * self.row_stride + k * self.k_stride));
                    for (sum, &b) in row.iter_mut().zip(&b) {
                        *sum = a.mul_add(b, *sum);
                    }
                }
            }
            for (i, row) in sums.iter().enumerate() {
                for (j, sum) in row.iter().enumerate() {
                    sum.store(self.c.add(i * self.c_stride + j * LANES));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::numbers;

    #[test]
    fn products_of_all_shapes_are_chains_of_fused_multiply_adds() {
        for (rows, width, depth) in [(1, 16, 1), (5, 32, 7), (23, 48, 9), (13, 64, 40), (17, 144, 3), (6, 80, 0)] {
            let (a, b) = (numbers(1, (rows * depth).max(1)), numbers(2, depth * (width + 16)));
            let old = numbers(3, rows * width);
            for (add, transposed) in [(false, false), (true, false), (true, true)] {
                let (row_stride, k_stride) = if transposed { (1, rows) } else { (depth, 1) };
                let mut c = old.clone();
                let a = Strided { data: &a, row_stride, k_stride };
                let b = Rows { data: &b, stride: width + 16 };
                multiply(Size { rows, width, depth }, a, b, &mut c, width, add);
                for row in 0..rows {
                    for lane in 0..width {
                        let mut want = if add { old[row * width + lane] } else { 0.0 };
                        for k in 0..depth {
                            want = a.data[row * row_stride + k * k_stride].mul_add(b.data[k * b.stride + lane], want);
                        }
                        assert_eq!(c[row * width + lane], want);
                    }
                }
            }
        }
    }
}

//! The one matrix product of attention: small, with one operand taken as it lies in memory (any strides, one number
//! broadcast at a time) and the other in rows of whole vectors. Every result is one chain of fused multiply-adds in the
//! order of the summed index, whatever the processor's vectors.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Numbers in a vector, of whatever the processor makes them.
pub const LANES: usize = 16;

/// Where the broadcast operand's (row, k) element is: `data[row * row_stride + k * k_stride]`.
#[derive(Clone, Copy)]
pub struct Strided<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub k_stride: usize,
}

/// Rows of whole vectors, `stride` apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub stride: usize,
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
    // SAFETY: the assertions above bound every access of the tiles, which cover exactly rows x width of c; the
    // features are asked for before use.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return wide(job, rows, width);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return narrow(job, rows, width);
            }
        }
        sweep::<[f32; LANES], 2, 1>(job, rows, width)
    }
}

#[derive(Clone, Copy)]
struct Job {
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

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn wide(job: Job, rows: usize, width: usize) {
    // SAFETY: as promised by `multiply`. 24 accumulators of the 32 registers.
    unsafe {
        let fours = width / (4 * LANES) * (4 * LANES);
        sweep::<__m512, 6, 4>(job, rows, fours);
        let job = job.at_lane(fours);
        match (width - fours) / LANES {
            3 => sweep::<__m512, 8, 3>(job, rows, 3 * LANES),
            2 => sweep::<__m512, 12, 2>(job, rows, 2 * LANES),
            1 => sweep::<__m512, 16, 1>(job, rows, LANES),
            _ => (),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn narrow(job: Job, rows: usize, width: usize) {
    // SAFETY: as promised by `multiply`. 12 accumulators of the 16 registers.
    unsafe { sweep::<[__m256; 2], 6, 1>(job, rows, width) }
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
}

/// Tiles of M rows by N vectors, then the rows that are left.
#[inline(always)]
unsafe fn sweep<V: Vector, const M: usize, const N: usize>(job: Job, rows: usize, width: usize) {
    for lane in (0..width).step_by(N * LANES) {
        // SAFETY: lane < width and row < rows throughout.
        unsafe {
            let job = job.at_lane(lane);
            let mut row = 0;
            while row + M <= rows {
                tile::<V, M, N>(job.at_row(row));
                row += M;
            }
            while M > 4 && row + 4 <= rows {
                tile::<V, 4, N>(job.at_row(row));
                row += 4;
            }
            match rows - row {
                3 => tile::<V, 3, N>(job.at_row(row)),
                2 => tile::<V, 2, N>(job.at_row(row)),
                1 => tile::<V, 1, N>(job.at_row(row)),
                _ => (),
            }
        }
    }
}

#[inline(always)]
unsafe fn tile<V: Vector, const M: usize, const N: usize>(job: Job) {
    // SAFETY: M rows and N vectors lie within the operands, as `multiply` has checked.
    unsafe {
        let mut sums = [[V::zero(); N]; M];
        if job.add {
            for (i, row) in sums.iter_mut().enumerate() {
                for (j, sum) in row.iter_mut().enumerate() {
                    *sum = V::load(job.c.add(i * job.c_stride + j * LANES));
                }
            }
        }
        for k in 0..job.depth {
            let mut b = [V::zero(); N];
            for (j, b) in b.iter_mut().enumerate() {
                *b = V::load(job.b.add(k * job.b_stride + j * LANES));
            }
            for (i, row) in sums.iter_mut().enumerate() {
                let a = V::splat(*job.a.add(i * job.row_stride + k * job.k_stride));
                for (sum, &b) in row.iter_mut().zip(&b) {
                    *sum = a.mul_add(b, *sum);
                }
            }
        }
        for (i, row) in sums.iter().enumerate() {
            for (j, sum) in row.iter().enumerate() {
                sum.store(job.c.add(i * job.c_stride + j * LANES));
            }
        }
    }
}

/// Sixteen f32. Each method needs the processor feature that the type stands for.
trait Vector: Copy {
    unsafe fn zero() -> Self;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// self * b + c, rounded once.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
}

// SAFETY of the blocks below: the callers are compiled for, and run on, a processor with the feature.
#[cfg(target_arch = "x86_64")]
impl Vector for __m512 {
    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        unsafe { _mm512_fmadd_ps(self, b, c) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Vector for [__m256; 2] {
    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { [_mm256_setzero_ps(); 2] }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, self[0]);
            _mm256_storeu_ps(to.add(8), self[1]);
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        unsafe { [_mm256_fmadd_ps(self[0], b[0], c[0]), _mm256_fmadd_ps(self[1], b[1], c[1])] }
    }
}

impl Vector for [f32; LANES] {
    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller reads within its operand.
        unsafe { from.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller writes within its result.
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        std::array::from_fn(|i| self[i].mul_add(b[i], c[i]))
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

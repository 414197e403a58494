//! Transposing a matrix of f32 in registers, a square at a time.

/// Side of the squares.
pub const SQUARE: usize = 16;

/// to[column][row] = from[row][column], rows of `from` and of `to` being that many numbers apart.
pub fn transpose(from: &[f32], from_stride: usize, (rows, columns): (usize, usize), to: &mut [f32], to_stride: usize) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(columns <= from_stride && rows <= to_stride, "rows overlap");
    assert!(
        from.len() >= (rows - 1) * from_stride + columns && to.len() >= (columns - 1) * to_stride + rows,
        "too short"
    );
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        for row in (0..rows).step_by(SQUARE) {
            for column in (0..columns).step_by(SQUARE) {
                let size = ((rows - row).min(SQUARE), (columns - column).min(SQUARE));
                // SAFETY: the feature is there, and the square is cut to what the assertions have found.
                unsafe {
                    let from = from.as_ptr().add(row * from_stride + column);
                    square(from, from_stride, size, to.as_mut_ptr().add(column * to_stride + row), to_stride);
                }
            }
        }
        return;
    }
    for row in 0..rows {
        for column in 0..columns {
            to[column * to_stride + row] = from[row * from_stride + column];
        }
    }
}

/// Transposes a square of at most 16 by 16, by pairs, then fours, then quarters of vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn square(
    from: *const f32,
    from_stride: usize,
    (rows, columns): (usize, usize),
    to: *mut f32,
    to_stride: usize,
) {
    use std::arch::x86_64::*;
    let mask = |count: usize| -> __mmask16 { (0xffff_u32 >> (16 - count)) as u16 };
    let mut r = [_mm512_setzero_ps(); 16];
    for (i, r) in r.iter_mut().enumerate().take(rows) {
        // SAFETY: the mask leaves out what is beyond the columns.
        *r = unsafe { _mm512_maskz_loadu_ps(mask(columns), from.add(i * from_stride)) };
    }
    let mut t = r;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for g in (0..16).step_by(4) {
        let [a, b, c, d] = [t[g], t[g + 1], t[g + 2], t[g + 3]].map(
            #[inline(always)]
            |x| _mm512_castps_pd(x),
        );
        r[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        r[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        r[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        r[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    for j in 0..4 {
        let (even_low, even_high) =
            (_mm512_shuffle_f32x4::<0x88>(r[j], r[4 + j]), _mm512_shuffle_f32x4::<0x88>(r[8 + j], r[12 + j]));
        let (odd_low, odd_high) =
            (_mm512_shuffle_f32x4::<0xdd>(r[j], r[4 + j]), _mm512_shuffle_f32x4::<0xdd>(r[8 + j], r[12 + j]));
        t[j] = _mm512_shuffle_f32x4::<0x88>(even_low, even_high);
        t[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd_low, odd_high);
        t[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even_low, even_high);
        t[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd_low, odd_high);
    }
    for (j, t) in t.iter().enumerate().take(columns) {
        // SAFETY: the mask leaves out what is beyond the rows.
        unsafe { _mm512_mask_storeu_ps(to.add(j * to_stride), mask(rows), *t) };
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::ops::vector::Real;

    #[test]
    fn matrices_of_all_sizes_are_transposed() {
        for (rows, columns) in [(1, 1), (16, 16), (5, 40), (64, 17), (33, 31)] {
            let from: Vec<f32> = (0..rows * (columns + 3)).map(|i| i as f32).collect();
            let mut to = vec![-1f32; columns * (rows + 2)];
            transpose(&from, columns + 3, (rows, columns), &mut to, rows + 2);
            let mut half = vec![f16::NEG_ONE; to.len()];
            let halves: Vec<f16> = from.iter().map(|&x| f16::from_f32(x)).collect();
            f16::transpose(&halves, columns + 3, (rows, columns), &mut half, rows + 2);
            assert!(half.iter().zip(&to).all(|(half, &to)| *half == f16::from_f32(to)));
            for (i, &x) in to.iter().enumerate() {
                let (column, row) = (i / (rows + 2), i % (rows + 2));
                assert_eq!(x, if row < rows { from[row * (columns + 3) + column] } else { -1.0 });
            }
        }
    }
}

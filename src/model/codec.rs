//! fp32 <-> the little-endian numbers of a weight file.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use safetensors::Dtype;

/// Numbers turned at a time.
const STRIP: usize = 1024;

/// Whether tensors of this dtype can be read and written.
pub(super) fn supported(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// `bytes` hold as many numbers of a [`supported`] dtype as `values`.
pub(super) fn decode(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    if dtype == Dtype::F32 {
        for (x, b) in values.iter_mut().zip(bytes.chunks_exact(4)) {
            *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
        return;
    }
    let mut bits = [0u16; STRIP];
    for (values, bytes) in values.chunks_mut(STRIP).zip(bytes.chunks(2 * STRIP)) {
        let bits = &mut bits[..values.len()];
        bits.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(x, b)| *x = u16::from_le_bytes([b[0], b[1]]));
        match dtype {
            Dtype::F16 => bits.reinterpret_cast::<f16>().convert_to_f32_slice(values),
            _ => bits.reinterpret_cast::<bf16>().convert_to_f32_slice(values),
        }
    }
}

/// The reverse of [`decode`]; rounds to nearest, ties to even.
pub(super) fn encode(dtype: Dtype, values: &[f32], bytes: &mut [u8]) {
    if dtype == Dtype::F32 {
        values.iter().zip(bytes.chunks_exact_mut(4)).for_each(|(x, b)| b.copy_from_slice(&x.to_le_bytes()));
        return;
    }
    let mut bits = [0u16; STRIP];
    for (values, bytes) in values.chunks(STRIP).zip(bytes.chunks_mut(2 * STRIP)) {
        let bits = &mut bits[..values.len()];
        match dtype {
            Dtype::F16 => bits.reinterpret_cast_mut::<f16>().convert_from_f32_slice(values),
            _ => bits.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(values),
        }
        bits.iter().zip(bytes.chunks_exact_mut(2)).for_each(|(x, b)| b.copy_from_slice(&x.to_le_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_in_every_dtype() {
        // Exact in all three dtypes, and more than one strip of them.
        let values: Vec<f32> = (0..2 * STRIP + 3).map(|i| (i % 200) as f32 / 4.0 - 25.0).collect();
        for (dtype, size) in [(Dtype::F32, 4), (Dtype::F16, 2), (Dtype::BF16, 2)] {
            let mut bytes = vec![0; size * values.len()];
            encode(dtype, &values, &mut bytes);
            let mut back = vec![0.0; values.len()];
            decode(dtype, &bytes, &mut back);
            assert_eq!(back, values, "{dtype:?}");
        }
        let mut bytes = [0; 2];
        encode(Dtype::F16, &[1.0 + 1.5 / 1024.0], &mut bytes);
        assert_eq!(u16::from_le_bytes(bytes), 0x3c02, "ties go to even");
    }
}

//! Sums over ranks and copies, on the rank's threads. Every element is summed by itself, in rank order, so neither the
//! cutting into chunks nor the number of threads shows in the bits.

use half::bf16;
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::slice::Plain;
use crate::device::threads::parallel_for;

/// Elements that one task sums.
const TASK: usize = 32 << 10;
/// Elements summed in the first cache level before they are rounded and written.
const BLOCK: usize = 1024;
/// Bytes that one task copies.
const COPY: usize = 128 << 10;

/// A number type that can be summed over ranks.
pub(super) trait Summand: Plain {
    /// What sums are taken in.
    type Wide: Plain;
    const ZERO: Self::Wide;
    fn widen(from: &[Self], to: &mut [Self::Wide]);
    fn add(from: &[Self], to: &mut [Self::Wide]);
    /// Rounds once, to nearest, ties to even.
    fn round(from: &[Self::Wide], to: &mut [Self]);
}

/// f32 and f64 are summed in themselves.
macro_rules! summed_in_itself {
    ($type:ty) => {
        impl Summand for $type {
            type Wide = $type;
            const ZERO: $type = 0.0;
            fn widen(from: &[$type], to: &mut [$type]) {
                to.copy_from_slice(from);
            }
            fn add(from: &[$type], to: &mut [$type]) {
                to.iter_mut().zip(from).for_each(|(sum, value)| *sum += value);
            }
            fn round(from: &[$type], to: &mut [$type]) {
                to.copy_from_slice(from);
            }
        }
    };
}
summed_in_itself!(f32);
summed_in_itself!(f64);

impl Summand for bf16 {
    type Wide = f32;
    const ZERO: f32 = 0.0;

    fn widen(from: &[bf16], to: &mut [f32]) {
        to.iter_mut().zip(from).for_each(|(wide, value)| *wide = f32::from_bits(u32::from(value.to_bits()) << 16));
    }

    fn add(from: &[bf16], to: &mut [f32]) {
        to.iter_mut().zip(from).for_each(|(sum, value)| *sum += f32::from_bits(u32::from(value.to_bits()) << 16));
    }

    fn round(from: &[f32], to: &mut [bf16]) {
        // `bf16::from_f32` without its branch, so that it vectorises.
        to.iter_mut().zip(from).for_each(|(value, wide)| {
            let bits = wide.to_bits();
            let nearest = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
            let quiet_nan = (bits >> 16) as u16 | 0x40;
            *value = bf16::from_bits(if wide.is_nan() { quiet_nan } else { nearest });
        });
    }
}

impl Summand for f16 {
    type Wide = f32;
    const ZERO: f32 = 0.0;

    fn widen(from: &[f16], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn add(from: &[f16], to: &mut [f32]) {
        let mut wide = [0.0; BLOCK];
        let wide = &mut wide[..from.len()];
        from.convert_to_f32_slice(wide);
        to.iter_mut().zip(wide).for_each(|(sum, value)| *sum += *value);
    }

    fn round(from: &[f32], to: &mut [f16]) {
        to.convert_from_f32_slice(from);
    }
}

/// A slice that tasks write disjoint parts of.
struct Parts<T>(*mut T);
// SAFETY: tasks make references to disjoint parts only (below), of a type that may be sent.
unsafe impl<T: Send> Sync for Parts<T> {}

/// `output[i]` = the sum of every source's `[i]`, taken in the sources' order. All have the same length.
pub(super) fn sum<T: Summand>(sources: &[&[T]], output: &mut [T]) {
    let length = output.len();
    assert!(sources.iter().all(|source| source.len() == length), "sources of different lengths");
    let parts = Parts(output.as_mut_ptr());
    let parts = &parts;
    parallel_for(length.div_ceil(TASK), length * sources.len(), |task| {
        let mut wide = [T::ZERO; BLOCK];
        for start in (task * TASK..length.min((task + 1) * TASK)).step_by(BLOCK) {
            let block = start..length.min((task + 1) * TASK).min(start + BLOCK);
            let wide = &mut wide[..block.len()];
            for (i, source) in sources.iter().enumerate() {
                let source = &source[block.clone()];
                if i == 0 { T::widen(source, wide) } else { T::add(source, wide) }
            }
            // SAFETY: inside `output`, and no other block or task has this range.
            T::round(wide, unsafe { std::slice::from_raw_parts_mut(parts.0.add(block.start), block.len()) });
        }
    });
}

/// Copies bytes; as `copy_from_slice`, on several threads where it is much.
pub(super) fn copy(from: &[u8], to: &mut [u8]) {
    let length = to.len();
    assert_eq!(from.len(), length);
    let parts = Parts(to.as_mut_ptr());
    let parts = &parts;
    parallel_for(length.div_ceil(COPY), length / 8, |task| {
        let range = task * COPY..length.min((task + 1) * COPY);
        // SAFETY: inside `to`, and no other task has this range.
        let to = unsafe { std::slice::from_raw_parts_mut(parts.0.add(range.start), range.len()) };
        to.copy_from_slice(&from[range]);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_to_bf16_is_that_of_the_half_crate() {
        let mut wide: Vec<f32> = (0..=u16::MAX)
            .flat_map(|high| {
                [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(u32::from(high) << 16 | low))
            })
            .collect();
        wide.truncate(wide.len() / BLOCK * BLOCK);
        let mut rounded = vec![bf16::ZERO; wide.len()];
        bf16::round(&wide, &mut rounded);
        for (wide, rounded) in wide.iter().zip(&rounded) {
            assert_eq!(rounded.to_bits(), bf16::from_f32(*wide).to_bits(), "{wide:e}");
        }
    }

    #[test]
    fn sums_are_taken_in_order() {
        let sources = [vec![1e8f32; 70_000], vec![1.0; 70_000], vec![-1e8; 70_000]];
        let sources: Vec<&[f32]> = sources.iter().map(Vec::as_slice).collect();
        let mut output = vec![1.0; 70_000];
        sum(&sources, &mut output);
        assert!(output.iter().all(|value| *value == 0.0));
        sum(&[sources[0], sources[2], sources[1]], &mut output);
        assert!(output.iter().all(|value| *value == 1.0));
    }
}

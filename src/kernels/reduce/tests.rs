//! Against the CPU's sums, to the bit.

use candle_core::DType;

use super::*;
use crate::device::Buffer;
use crate::device::bulk::sum_of_squares as on_the_cpu;
use crate::kernels::testing::{Memory, devices};
use crate::ops::testing::numbers;

/// Numbers of many sizes.
fn values(len: usize) -> Vec<f32> {
    numbers(7, len).iter().enumerate().map(|(i, x)| x * 10f32.powi((i * 7 % 31) as i32 - 15)).collect()
}

#[test]
fn sums_of_squares_are_the_cpus_to_the_bit() {
    for device in devices() {
        for len in [0, 1, 7, 8, 9, 255, 300, PIECE - 1, PIECE, PIECE + 13, 3 * PIECE + 4099, 19 * PIECE] {
            for (dtype, skip) in [(DType::F32, 0), (DType::F32, 3), (DType::BF16, 0), (DType::BF16, 1)] {
                let numbers: Vec<f64> = values(len).into_iter().map(f64::from).collect();
                let memory = Memory::new(dtype, &numbers, skip);
                let mut buffer = Buffer::unbudgeted(dtype, len.max(1)).unwrap();
                for (i, x) in memory.get().into_iter().enumerate() {
                    match dtype {
                        DType::BF16 => buffer.as_mut_slice()[i] = half::bf16::from_f64(x),
                        _ => buffer.as_mut_slice()[i] = x as f32,
                    }
                }
                let total = crate::kernels::testing::Values::<f64>::unwritten(1);
                sum_of_squares(device, dtype, memory.address(), len, total.address()).unwrap();
                let mut sum = Buffer::unbudgeted(DType::U8, 8).unwrap();
                on_the_cpu(&buffer, 0..len, &mut sum).unwrap();
                let want = f64::from_le_bytes(sum.bytes().try_into().unwrap());
                assert_eq!(total.get()[0].to_bits(), want.abs().to_bits(), "{dtype:?} {len} {skip}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_is_found_wherever_it_is() {
    for device in devices() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (at, what, skip) in
                [(0, f64::NAN, 0), (2_100, f64::INFINITY, 0), (77, f64::NEG_INFINITY, 1), (0, 1.0, 1)]
            {
                let mut numbers = vec![60_000.0; 2_101];
                numbers[at] = what;
                let memory = Memory::new(dtype, &numbers, skip);
                let found = Memory::new(DType::F32, &[0.0], 0);
                not_finite(device, dtype, memory.address(), numbers.len(), found.address()).unwrap();
                let expected = if what == 1.0 { 0 } else { 1 };
                assert_eq!((found.get()[0] as f32).to_bits(), expected, "{dtype:?} {at} {what}");
            }
        }
    }
}

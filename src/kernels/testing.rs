//! What the wrappers' tests share: numbers in the emulated device's memory, and comparisons with the ops on the CPU.

use candle_core::{DType, Tensor};
use half::{bf16, f16};

use super::Address;
use super::emulated::{Emulated, Order, Values};
use crate::ops::testing::{f64s, var};

/// Numbers of some dtype in the emulated device's memory.
pub struct Memory {
    values: Values<u8>,
    dtype: DType,
    skipped: usize,
}

fn to_bytes(dtype: DType, x: f32) -> Vec<u8> {
    match dtype {
        DType::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        DType::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    }
}

impl Memory {
    /// Rounded to the dtype; `skip` numbers precede them, so that they are aligned to nothing better.
    pub fn new(dtype: DType, numbers: &[f64], skip: usize) -> Self {
        let skipped = skip * dtype.size_in_bytes();
        let mut bytes = vec![0x55; skipped];
        bytes.extend(numbers.iter().flat_map(|&x| to_bytes(dtype, x as f32)));
        Memory { values: Values::new(&bytes).unwrap(), dtype, skipped }
    }

    /// NaNs.
    pub fn unwritten(dtype: DType, len: usize, skip: usize) -> Self {
        Memory::new(dtype, &vec![f64::NAN; len], skip)
    }

    pub fn address(&self) -> Address {
        self.values.address().at(self.skipped)
    }

    pub fn get(&self) -> Vec<f64> {
        let bytes = self.values.get();
        assert!(bytes[..self.skipped].iter().all(|&byte| byte == 0x55), "written before the beginning");
        let numbers = bytes[self.skipped..].chunks(self.dtype.size_in_bytes());
        let number = |b: &[u8]| match self.dtype {
            DType::F16 => f16::from_le_bytes([b[0], b[1]]).to_f64(),
            DType::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f64(),
            _ => f32::from_le_bytes([b[0], b[1], b[2], b[3]]).into(),
        };
        numbers.map(number).collect()
    }
}

/// The dtypes, and how far results may be off that were rounded to them once.
pub const DTYPES: [(DType, f64); 3] = [(DType::F32, 1e-5), (DType::F16, 1e-3), (DType::BF16, 8e-3)];

/// An old device and newer ones; threads in different orders.
pub fn devices() -> [Emulated; 3] {
    [(75, Order::Descending), (80, Order::Ascending), (90, Order::Shuffled(5))]
        .map(|(capability, order)| Emulated::new(capability, order).unwrap())
}

/// An op's result on the CPU, and the gradients of its inputs by that of the result, which is `var(21, ...)`.
pub struct Expected {
    pub y: Vec<f64>,
    pub dy: Vec<f64>,
    pub gradients: Vec<Vec<f64>>,
}

/// Runs an op on leaves of these shapes, which are `var(1, ...)`, `var(2, ...)` and so on.
pub fn expected(dtype: DType, shapes: &[&[usize]], op: &dyn Fn(&[Tensor]) -> Tensor) -> (Vec<Vec<f64>>, Expected) {
    let leaves: Vec<_> = (1..).zip(shapes).map(|(seed, &shape)| var(seed, shape, dtype)).collect();
    let tensors: Vec<Tensor> = leaves.iter().map(|leaf| leaf.as_tensor().clone()).collect();
    let y = op(&tensors);
    let dy = var(21, y.shape(), dtype);
    let grads = (&y * dy.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    let gradients = leaves.iter().map(|leaf| grads.get(leaf).map_or(Vec::new(), f64s)).collect();
    (tensors.iter().map(f64s).collect(), Expected { y: f64s(&y), dy: f64s(&dy), gradients })
}

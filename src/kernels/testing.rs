//! What the wrappers' tests share: where they run, numbers in that memory, and comparisons with the ops on the CPU.
//!
//! They run on the GPU where the program is built for one (feature `cuda`) and there is one, else on the emulated devices
//! (feature `emulate`), else not at all.

#[cfg(feature = "cuda")]
use std::sync::Arc;

use candle_core::{DType, Tensor};
use half::{bf16, f16};

#[cfg(feature = "emulate")]
use super::emulated::{self, Emulated, Order};
use super::{Address, Launcher};
#[cfg(feature = "cuda")]
use crate::device::cuda::{DeviceMemory, Gpu, tests::gpu};
use crate::ops::testing::{f64s, var};

/// Where kernels are tested; of emulated devices an old one and newer ones, threads in different orders. They live as long
/// as the tests do.
pub fn devices() -> Vec<&'static dyn Launcher> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = gpu() {
        let gpu: &'static Arc<Gpu> = Box::leak(Box::new(gpu));
        return vec![&**gpu];
    }
    #[cfg(feature = "emulate")]
    {
        let new = |(capability, order)| &*Box::leak(Box::new(Emulated::new(capability, order).unwrap()));
        [(75, Order::Descending), (80, Order::Ascending), (90, Order::Shuffled(5))].map(new).map(|d| d as _).to_vec()
    }
    #[cfg(not(feature = "emulate"))]
    Vec::new()
}

/// Values in the memory of those devices.
pub struct Values<T> {
    memory: Held,
    len: usize,
    kind: std::marker::PhantomData<T>,
}

enum Held {
    #[cfg(feature = "emulate")]
    Emulated(emulated::Values<u8>),
    #[cfg(feature = "cuda")]
    Gpu(Arc<Gpu>, DeviceMemory),
}

impl Held {
    fn new(bytes: &[u8]) -> Self {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = gpu() {
            // No bytes are no memory there.
            let memory = gpu.write(if bytes.is_empty() { &[0] } else { bytes }, "a test").unwrap();
            return Held::Gpu(gpu, memory);
        }
        #[cfg(feature = "emulate")]
        return Held::Emulated(emulated::Values::new(bytes).unwrap());
        #[cfg(not(feature = "emulate"))]
        panic!("no device for {} bytes", bytes.len())
    }
}

impl<T: bytemuck::Pod> Values<T> {
    /// A copy of `values`.
    pub fn new(values: &[T]) -> Self {
        let memory = Held::new(bytemuck::cast_slice(values));
        Values { memory, len: values.len(), kind: std::marker::PhantomData }
    }

    /// Values whose every byte is 0xff, which is a NaN in every dtype.
    pub fn unwritten(len: usize) -> Self {
        let memory = Held::new(&vec![0xff; len * size_of::<T>()]);
        Values { memory, len, kind: std::marker::PhantomData }
    }

    pub fn address(&self) -> Address {
        match &self.memory {
            #[cfg(feature = "emulate")]
            Held::Emulated(values) => values.address(),
            #[cfg(feature = "cuda")]
            Held::Gpu(_, memory) => memory.address(),
        }
    }

    /// What is there once everything that was launched is done.
    pub fn get(&self) -> Vec<T> {
        let bytes = match &self.memory {
            #[cfg(feature = "emulate")]
            Held::Emulated(values) => values.get(),
            #[cfg(feature = "cuda")]
            Held::Gpu(gpu, memory) => gpu.read(memory).unwrap(),
        };
        bytemuck::pod_collect_to_vec(&bytes[..self.len * size_of::<T>()])
    }
}

/// Numbers of some dtype in their memory.
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
        Memory { values: Values::new(&bytes), dtype, skipped }
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

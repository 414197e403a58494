//! Ordinary numbers for kernels to compute with: zeros would take other ways through some of them, and save power.

use anyhow::Result;
use half::bf16;

use crate::device::cuda::{DeviceMemory, Gpu};

/// The `i`th number, from -1 on and below 1.
fn number(i: usize) -> f32 {
    ((i.wrapping_mul(2_654_435_761) >> 11) % 2048) as f32 / 1024.0 - 1.0
}

/// So many in bf16.
pub(super) fn halves(gpu: &Gpu, count: usize) -> Result<DeviceMemory> {
    let values: Vec<bf16> = (0..count).map(|i| bf16::from_f32(number(i))).collect();
    gpu.write(bytemuck::cast_slice(&values), "a benchmark's numbers")
}

/// So many in f32.
pub(super) fn floats(gpu: &Gpu, count: usize) -> Result<DeviceMemory> {
    let values: Vec<f32> = (0..count).map(number).collect();
    gpu.write(bytemuck::cast_slice(&values), "a benchmark's numbers")
}

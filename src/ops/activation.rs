//! Pointwise activations, the gated one of the transformers' feed-forward layers, and the time embedding's addition.

mod gpu;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Held, by_dtype, elements, for_parts, result, rows_per_part, tensor};
use super::gpu::{Gpu, cuda_forward, emulated1, emulated2};
use super::pointwise::{map, map2};
use super::record::{apply1, apply2_by_shape};
use super::vector::{PIECE, Real, normal, sigmoid, simd, sums, unwritten};

/// A function of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x).
    Silu,
    /// x * Phi(x), with the error function.
    Gelu,
    /// x * sigmoid(1.702 x).
    QuickGelu,
}

const QUICK: f32 = 1.702;

/// The activation of every element, in x's shape and dtype.
pub fn activation(x: &Tensor, kind: Activation) -> Result<Tensor> {
    apply1(x, Pointwise(kind))
}

struct Pointwise(Activation);

impl CustomOp1 for Pointwise {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if let Some(done) = emulated1(storage, layout, |gpu, x| self.forward_on(gpu, x)) {
            return done;
        }
        by_dtype!(storage.dtype(), self.name(), T => {
            Ok(result(activate::<T>(elements(storage, layout)?, self.0), layout.shape()))
        })
    }

    cuda_forward!(1);

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        if let Some(gpu) = Gpu::of(x)? {
            return self.backward_on(&gpu, gpu.operand(x)?, gpu.operand(&dy)?).map(Some);
        }
        let (held_x, held_dy) = (Held::new(x), Held::new(&dy));
        by_dtype!(x.dtype(), self.name(), T => {
            let dx = activate_backward::<T>(held_x.elements()?, held_dy.elements()?, self.0);
            Ok(Some(tensor(dx, x.shape())?))
        })
    }
}

fn activate<T: Real>(x: &[T], kind: Activation) -> Vec<T> {
    match kind {
        Activation::Silu => map(
            x,
            #[inline(always)]
            |x| x * sigmoid(x),
        ),
        Activation::Gelu => map(
            x,
            #[inline(always)]
            |x| x * normal(x).0,
        ),
        Activation::QuickGelu => map(
            x,
            #[inline(always)]
            |x| x * sigmoid(QUICK * x),
        ),
    }
}

fn activate_backward<T: Real>(x: &[T], dy: &[T], kind: Activation) -> Vec<T> {
    match kind {
        Activation::Silu => map2(
            x,
            dy,
            #[inline(always)]
            |x, dy| dy * silu_slope(x),
        ),
        Activation::Gelu => map2(
            x,
            dy,
            #[inline(always)]
            |x, dy| dy * gelu_slope(x),
        ),
        Activation::QuickGelu => map2(
            x,
            dy,
            #[inline(always)]
            |x, dy| dy * silu_slope(QUICK * x),
        ),
    }
}

/// d/dx of x sigmoid(x). That of x sigmoid(a x) is the same function at a x.
#[inline(always)]
pub(super) fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * x.mul_add(1.0 - s, 1.0)
}

#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    let (below, density) = normal(x);
    x.mul_add(density, below)
}

/// (..., 2D) -> (..., D): first half times gelu of the second half (diffusers' `GEGLU`).
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    match x.dims().last() {
        Some(&width) if width > 0 && width % 2 == 0 => apply1(x, Geglu),
        _ => bail!("geglu: the last dimension of {:?} has no two halves", x.shape()),
    }
}

struct Geglu;

impl CustomOp1 for Geglu {
    fn name(&self) -> &'static str {
        "geglu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut dims = layout.dims().to_vec();
        let width = dims.pop().unwrap_or(0) / 2;
        dims.push(width);
        if let Some(done) = emulated1(storage, layout, |gpu, x| self.forward_on(gpu, x)) {
            return done;
        }
        by_dtype!(storage.dtype(), self.name(), T => {
            Ok(result(gate::<T>(elements(storage, layout)?, width), dims))
        })
    }

    cuda_forward!(1);

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let width = dy.dims().last().copied().unwrap_or(0);
        if let Some(gpu) = Gpu::of(x)? {
            return self.backward_on(&gpu, gpu.operand(x)?, gpu.operand(&dy)?).map(Some);
        }
        let (held_x, held_dy) = (Held::new(x), Held::new(&dy));
        by_dtype!(x.dtype(), self.name(), T => {
            Ok(Some(tensor(gate_backward::<T>(held_x.elements()?, held_dy.elements()?, width), x.shape())?))
        })
    }
}

fn gate<T: Real>(x: &[T], width: usize) -> Vec<T> {
    let mut y = unwritten::<T>(x.len() / 2);
    let rows = rows_per_part(width);
    let parts: Vec<_> = y.chunks_mut(rows * width).zip(x.chunks(rows * 2 * width)).collect();
    for_parts(parts, x.len(), |_, (y, x)| {
        simd(
            #[inline(always)]
            || {
                let mut s = [[0f32; PIECE]; 3];
                let [s, t, u] = &mut s;
                for (y, x) in y.chunks_mut(width).zip(x.chunks(2 * width)) {
                    let (a, g) = x.split_at(width);
                    for ((y, a), g) in y.chunks_mut(PIECE).zip(a.chunks(PIECE)).zip(g.chunks(PIECE)) {
                        let (a, g) = (T::read(a, s), T::read(g, t));
                        T::write(
                            y,
                            u,
                            #[inline(always)]
                            |y| y.iter_mut().zip(a.iter().zip(g)).for_each(|(y, (a, &g))| *y = a * (g * normal(g).0)),
                        );
                    }
                }
            },
        );
    });
    y
}

fn gate_backward<T: Real>(x: &[T], dy: &[T], width: usize) -> Vec<T> {
    let mut dx = unwritten::<T>(x.len());
    let rows = rows_per_part(2 * width);
    let parts: Vec<_> =
        dx.chunks_mut(rows * 2 * width).zip(x.chunks(rows * 2 * width).zip(dy.chunks(rows * width))).collect();
    for_parts(parts, x.len(), |_, (dx, (x, dy))| {
        simd(
            #[inline(always)]
            || {
                for ((dx, x), dy) in dx.chunks_mut(2 * width).zip(x.chunks(2 * width)).zip(dy.chunks(width)) {
                    let ((da, dg), (a, g)) = (dx.split_at_mut(width), x.split_at(width));
                    gate_row_backward(da, dg, a, g, dy);
                }
            },
        );
    });
    dx
}

#[inline(always)]
fn gate_row_backward<T: Real>(da: &mut [T], dg: &mut [T], a: &[T], g: &[T], dy: &[T]) {
    let mut s = [[0f32; PIECE]; 4];
    let [s, t, u, v] = &mut s;
    let pieces = da.chunks_mut(PIECE).zip(dg.chunks_mut(PIECE));
    let inputs = a.chunks(PIECE).zip(g.chunks(PIECE)).zip(dy.chunks(PIECE));
    for ((da, dg), ((a, g), dy)) in pieces.zip(inputs) {
        let (a, g, dy) = (T::read(a, s), T::read(g, t), T::read(dy, u));
        let mut w = [0f32; PIECE];
        let slope = &mut w[..g.len()];
        T::write(
            da,
            v,
            #[inline(always)]
            |da| {
                let (a, g, dy, slope) = (&a[..da.len()], &g[..da.len()], &dy[..da.len()], &mut slope[..da.len()]);
                for i in 0..da.len() {
                    let (below, density) = normal(g[i]);
                    da[i] = dy[i] * (g[i] * below);
                    slope[i] = dy[i] * a[i] * g[i].mul_add(density, below);
                }
            },
        );
        T::write(
            dg,
            v,
            #[inline(always)]
            |dg| dg.copy_from_slice(slope),
        );
    }
}

/// x (B, C, H, W) + t (B, C) on every pixel; differentiable in both.
pub fn add_channels(x: &Tensor, t: &Tensor) -> Result<Tensor> {
    let (batch, channels, _, _) = x.dims4()?;
    if t.dims() != [batch, channels] || t.dtype() != x.dtype() {
        bail!("add_channels: {:?} {:?} does not fit {:?} {:?}", t.shape(), t.dtype(), x.shape(), x.dtype());
    }
    apply2_by_shape(x, t, AddChannels, AddChannels::back)
}

struct AddChannels;

impl CustomOp2 for AddChannels {
    fn name(&self) -> &'static str {
        "add_channels"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, t: &CpuStorage, lt: &Layout) -> Result<(CpuStorage, Shape)> {
        if let Some(done) = emulated2((x, lx), (t, lt), |gpu, x, t| self.forward_on(gpu, x, t)) {
            return done;
        }
        by_dtype!(x.dtype(), self.name(), T => {
            Ok(result(add_planes::<T>(elements(x, lx)?, elements(t, lt)?), lx.shape()))
        })
    }

    cuda_forward!(2);

    fn bwd(&self, x: &Tensor, t: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dt] = self.back([x.shape(), t.shape()], dy)?;
        Ok((Some(dx), Some(dt)))
    }
}

impl AddChannels {
    fn back(&self, [_, t]: [&Shape; 2], dy: &Tensor) -> Result<[Tensor; 2]> {
        let dy = dy.contiguous()?;
        if let Some(gpu) = Gpu::of(&dy)? {
            let dt = self.sums_on(&gpu, gpu.operand(&dy)?, t.dims())?;
            return Ok([dy, dt]);
        }
        let held = Held::new(&dy);
        by_dtype!(dy.dtype(), self.name(), T => {
            let dt = sum_planes::<T>(held.elements()?, t.elem_count());
            let dt = tensor(dt, t)?;
            drop(held);
            Ok([dy, dt])
        })
    }
}

fn add_planes<T: Real>(x: &[T], t: &[T]) -> Vec<T> {
    let pixels = x.len() / t.len().max(1);
    let mut y = unwritten::<T>(x.len());
    let planes = rows_per_part(pixels);
    let part = (planes * pixels).max(1);
    let parts: Vec<_> = y.chunks_mut(part).zip(x.chunks(part)).zip(t.chunks(planes)).collect();
    for_parts(parts, x.len(), |_, ((y, x), t)| {
        simd(
            #[inline(always)]
            || {
                let (mut s, mut u) = ([0f32; PIECE], [0f32; PIECE]);
                for ((y, x), t) in y.chunks_mut(pixels).zip(x.chunks(pixels)).zip(t) {
                    let t = t.to_f32();
                    for (y, x) in y.chunks_mut(PIECE).zip(x.chunks(PIECE)) {
                        let x = T::read(x, &mut s);
                        T::write(
                            y,
                            &mut u,
                            #[inline(always)]
                            |y| y.iter_mut().zip(x).for_each(|(y, x)| *y = x + t),
                        );
                    }
                }
            },
        );
    });
    y
}

/// The sum over each of `planes` planes.
fn sum_planes<T: Real>(dy: &[T], planes: usize) -> Vec<T> {
    let pixels = dy.len() / planes.max(1);
    let mut y = unwritten::<T>(planes);
    let rows = rows_per_part(pixels);
    let parts: Vec<_> = y.chunks_mut(rows).zip(dy.chunks((rows * pixels).max(1))).collect();
    for_parts(parts, dy.len(), |_, (y, dy)| {
        simd(
            #[inline(always)]
            || {
                let mut s = [0f32; PIECE];
                for (y, dy) in y.iter_mut().zip(dy.chunks(pixels)) {
                    let mut total = 0.0;
                    for piece in dy.chunks(PIECE) {
                        let piece = T::read(piece, &mut s);
                        total += sums(
                            [piece],
                            #[inline(always)]
                            |x| x,
                        )[0];
                    }
                    *y = T::from_f32(total as f32);
                }
            },
        );
    });
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check, check_threads};

    fn sigmoid64(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    /// By its series; good for the small x of these tests.
    fn gelu64(x: f64) -> f64 {
        let z = x / std::f64::consts::SQRT_2;
        let (mut term, mut sum) = (z, z);
        for n in 1..60 {
            term *= -z * z / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        0.5 * x * (1.0 + sum * 2.0 / std::f64::consts::PI.sqrt())
    }

    fn one(kind: Activation, shape: &[usize], test: fn(&Case)) {
        let reference = |v: &[Vec<f64>]| -> Vec<f64> {
            let f = |&x: &f64| match kind {
                Activation::Silu => x * sigmoid64(x),
                Activation::Gelu => gelu64(x),
                Activation::QuickGelu => x * sigmoid64(1.702 * x),
            };
            v[0].iter().map(f).collect()
        };
        test(&Case { inputs: &[shape], weights: &[], op: &|x, _| activation(&x[0], kind), reference: &reference });
    }

    #[test]
    fn activations_follow_their_formulas() {
        for kind in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
            one(kind, &[3, 7], check);
            one(kind, &[5, 70_001], check_threads);
        }
    }

    #[test]
    fn geglu_gates_the_first_half() {
        let gated = |shape: &[usize], test: fn(&Case)| {
            let width = shape[2] / 2;
            let reference = |v: &[Vec<f64>]| -> Vec<f64> {
                let row = |x: &[f64]| -> Vec<f64> { (0..width).map(|i| x[i] * gelu64(x[width + i])).collect() };
                v[0].chunks(2 * width).flat_map(row).collect()
            };
            test(&Case { inputs: &[shape], weights: &[], op: &|x, _| geglu(&x[0]), reference: &reference });
        };
        gated(&[2, 3, 10], check);
        gated(&[2, 35, 4_098], check_threads);
        assert!(geglu(&Tensor::zeros((2, 3), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap()).is_err());
    }

    #[test]
    fn channels_are_added_to_every_pixel() {
        let added = |x: &[usize], test: fn(&Case)| {
            let pixels = x[2] * x[3];
            let reference =
                |v: &[Vec<f64>]| -> Vec<f64> { v[0].iter().enumerate().map(|(i, x)| x + v[1][i / pixels]).collect() };
            let op = |x: &[Tensor], _: &[_]| add_channels(&x[0], &x[1]);
            test(&Case { inputs: &[x, &x[..2]], weights: &[], op: &op, reference: &reference });
        };
        added(&[2, 3, 3, 5], check);
        added(&[2, 30, 41, 37], check_threads);
    }
}

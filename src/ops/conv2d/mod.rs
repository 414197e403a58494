//! 2-D convolution as matrix products over patches that are packed from the image on the way.

mod fold;
mod gpu;
mod patches;
mod planes;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Held, by_dtype, elements, result, tensor};
use super::gemm::{Bias, Lattice, Matrix, Out, Product, Scalar, add_channel_sums};
use super::gpu::{Gpu, cuda_forward, emulated1};
use super::record::apply1_with_weights;
use super::vector::unwritten;
use crate::device::WeightRef;
use fold::fold;
use patches::{MOST_TAPS, Patches, PatchesTurned, Window};
use planes::{Flipped, Planes};

/// Stride and zero padding of a convolution (the VAE's downsampling pads right and bottom only).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2d {
    pub stride: usize,
    pub top: usize,
    pub bottom: usize,
    pub left: usize,
    pub right: usize,
}

impl Conv2d {
    pub fn new(stride: usize, padding: usize) -> Self {
        Conv2d { stride, top: padding, bottom: padding, left: padding, right: padding }
    }
}

/// x (B, C, H, W), weight (O, C, kh, kw), bias (O) -> (B, O, H', W').
///
/// An image's result and its gradient have the same bits in every batch; weight gradients are summed over the batch.
pub fn conv2d(x: &Tensor, weight: &WeightRef, bias: Option<&WeightRef>, conv: Conv2d) -> Result<Tensor> {
    let op = Convolution::new(x, weight, bias, conv)?;
    let trains = weight.trainable() || bias.is_some_and(WeightRef::trainable);
    apply1_with_weights(x, op, trains, Convolution::back)
}

/// The op that [`conv2d`] applies to `x`, by itself: its two directions can be called, and measured, without a graph.
pub fn conv2d_op(
    x: &Tensor,
    weight: &WeightRef,
    bias: Option<&WeightRef>,
    conv: Conv2d,
) -> Result<impl CustomOp1 + use<>> {
    Convolution::new(x, weight, bias, conv)
}

struct Convolution {
    weight: WeightRef,
    bias: Option<WeightRef>,
    conv: Conv2d,
    outputs: usize,
    inputs: usize,
    kernel: (usize, usize),
    /// Rows and columns.
    input: (usize, usize),
    output: (usize, usize),
}

impl CustomOp1 for Convolution {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if let Some(done) = emulated1(storage, layout, |gpu, x| self.forward_on(gpu, x)) {
            return done;
        }
        let images = layout.dims()[0];
        let shape = (images, self.outputs, self.output.0, self.output.1);
        by_dtype!(storage.dtype(), self.name(), T => {
            Ok(result(self.forward(elements::<T>(storage, layout)?, images)?, shape))
        })
    }

    cuda_forward!(1);

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        self.back(x, dy, true)
    }
}

/// Sums over pixels and channels are cut into blocks of multiples of this.
const UNIT: usize = 16;

/// Up to this many input channels the data gradient is folded.
const FEW_CHANNELS: usize = 8;

/// Sums over channels and taps are cut into blocks of whole channels.
fn unit(taps: usize) -> usize {
    if taps <= 1 { UNIT } else { taps }
}

impl Convolution {
    fn new(x: &Tensor, weight: &WeightRef, bias: Option<&WeightRef>, conv: Conv2d) -> Result<Convolution> {
        let (_, inputs, height, width) = x.dims4()?;
        let &[outputs, channels, kh, kw] = weight.shape() else {
            bail!("{}: a convolution's weight has four dimensions, not {:?}", weight.name(), weight.shape())
        };
        if channels != inputs {
            bail!("{}: takes {channels} channels, was given {inputs}", weight.name());
        }
        if let Some(bias) = bias
            && bias.shape() != [outputs]
        {
            bail!("{}: its bias has shape {:?}, not [{outputs}]", weight.name(), bias.shape());
        }
        let (tall, wide) = (height + conv.top + conv.bottom, width + conv.left + conv.right);
        if conv.stride == 0 || kh == 0 || kw == 0 || tall < kh || wide < kw {
            bail!("{}: an image of {height} x {width} is too small for a kernel of {kh} x {kw}", weight.name());
        }
        if kh * kw > MOST_TAPS {
            bail!("{}: no convolution for kernels of more than {MOST_TAPS} taps", weight.name());
        }
        Ok(Convolution {
            weight: weight.clone(),
            bias: bias.cloned(),
            conv,
            outputs,
            inputs,
            kernel: (kh, kw),
            input: (height, width),
            output: ((tall - kh) / conv.stride + 1, (wide - kw) / conv.stride + 1),
        })
    }

    /// Adds to the weights' gradients; gives x's if that is wanted.
    fn back(&self, x: &Tensor, dy: &Tensor, wanted: bool) -> Result<Option<Tensor>> {
        let images = x.dim(0)?;
        let dy = dy.contiguous()?;
        if let Some(gpu) = Gpu::of(x)? {
            let (x, dy) = (gpu.operand(x)?, gpu.operand(&dy)?);
            let dx = if wanted { Some(self.input_gradient_on(&gpu, &x, &dy)?) } else { None };
            self.add_weight_gradients_on(&gpu, &x, &dy)?;
            return Ok(dx);
        }
        let (held_x, held_dy) = (Held::new(x), Held::new(&dy));
        by_dtype!(x.dtype(), self.name(), T => {
            let dy = held_dy.elements::<T>()?;
            self.add_weight_gradients(held_x.elements()?, dy, images)?;
            if wanted { tensor(self.input_gradient(dy, images)?, x.shape()).map(Some) } else { Ok(None) }
        })
    }

    fn taps(&self) -> usize {
        self.kernel.0 * self.kernel.1
    }

    fn input_pixels(&self) -> usize {
        self.input.0 * self.input.1
    }

    fn pixels(&self) -> usize {
        self.output.0 * self.output.1
    }

    /// Every pixel by itself: a matrix product over the images as they are.
    fn pointwise(&self) -> bool {
        self.taps() == 1 && self.conv == Conv2d::new(1, 0)
    }

    fn window(&self) -> Window {
        Window {
            input: self.input,
            output: self.output,
            taps: self.kernel,
            stride: self.conv.stride,
            top: -(self.conv.top as isize),
            left: -(self.conv.left as isize),
        }
    }

    fn forward<T: Scalar>(&self, x: &[T], images: usize) -> Result<Vec<T>> {
        let weight = self.weight.view::<T>()?;
        let bias: Option<Vec<f32>> = match &self.bias {
            Some(bias) => Some(bias.view::<T>()?.iter().map(|b| b.to_f32()).collect()),
            None => None,
        };
        let bias = bias.as_deref().map_or(Bias::None, Bias::Row);
        let depth = self.inputs * self.taps();
        let a = &Matrix::new(&weight, self.outputs, depth, depth, 1);
        Ok(if self.pointwise() {
            Product::new(a, &self.as_matrices(x, images, self.inputs), UNIT).to_vec(bias)
        } else {
            let patches = Patches::new(x, images, self.inputs, self.window());
            Product::new(a, &patches, unit(self.taps())).to_vec(bias)
        })
    }

    fn as_matrices<'a, T: Scalar>(&self, x: &'a [T], images: usize, channels: usize) -> Matrix<'a, T> {
        let pixels = self.pixels();
        Matrix::per_image(x, images, channels * pixels, channels, pixels, pixels, 1)
    }

    /// dx[c][iy][ix] is the sum of w[o][c][ky][kx] dy[o][oy][ox] over the outputs and taps with oy * stride + ky = iy + top,
    /// likewise for x. With a stride, input pixels fall into stride x stride phases by which taps reach them; each
    /// phase is a convolution of dy without stride.
    fn input_gradient<T: Scalar>(&self, dy: &[T], images: usize) -> Result<Vec<T>> {
        let weight = self.weight.view::<T>()?;
        let (rows, stride) = (self.inputs, self.conv.stride);
        if self.pointwise() {
            let turned = Matrix::new(&weight, rows, self.outputs, 1, rows);
            let product = Product::new(&turned, &self.as_matrices(dy, images, self.outputs), UNIT).to_vec(Bias::None);
            return Ok(product);
        }
        if rows <= FEW_CHANNELS {
            let elements = rows * self.taps();
            let turned = Matrix::new(&weight, elements, self.outputs, 1, elements);
            let pixels = self.as_matrices(dy, images, self.outputs);
            let products = Product::new(&turned, &pixels, UNIT).to_vec::<f32>(Bias::None);
            return Ok(fold(&products, self.window()));
        }
        if stride == 1 {
            let (flipped, window) = self.phase(&weight, (0, 0));
            return Ok(self.phase_product(dy, images, &flipped, window, |p| p.to_vec(Bias::None)));
        }
        // Every pixel belongs to a phase, whose product stores it.
        let mut dx = unwritten::<T>(images * rows * self.input_pixels());
        for py in 0..stride.min(self.input.0) {
            for px in 0..stride.min(self.input.1) {
                let (flipped, window) = self.phase(&weight, (py, px));
                let lattice = Lattice {
                    width: window.output.1,
                    first: py * self.input.1 + px,
                    line_step: stride * self.input.1,
                    pixel_step: stride,
                };
                let out = Out::storing(&mut dx, self.input_pixels(), rows * self.input_pixels()).lattice(lattice);
                self.phase_product(dy, images, &flipped, window, |p| p.run(out));
            }
        }
        Ok(dx)
    }

    /// The taps that reach the input pixels (py, px), (py + stride, px), ..., and where those lie in dy.
    fn phase<'a, T>(&self, weight: &'a [T], (py, px): (usize, usize)) -> (Flipped<'a, T>, Window) {
        let step = self.conv.stride;
        let (first_y, first_x) = ((py + self.conv.top) % step, (px + self.conv.left) % step);
        let count = |kernel: usize, first: usize| kernel.saturating_sub(first).div_ceil(step);
        let taps = (count(self.kernel.0, first_y), count(self.kernel.1, first_x));
        let flipped =
            Flipped { weight, inputs: self.inputs, kernel: self.kernel, taps, first: (first_y, first_x), step };
        let from = |phase: usize, padding: usize, taps: usize| ((phase + padding) / step) as isize + 1 - taps as isize;
        let window = Window {
            input: self.output,
            output: ((self.input.0 - py).div_ceil(step), (self.input.1 - px).div_ceil(step)),
            taps,
            stride: 1,
            top: from(py, self.conv.top, taps.0),
            left: from(px, self.conv.left, taps.1),
        };
        (flipped, window)
    }

    fn phase_product<T: Scalar, R>(
        &self,
        dy: &[T],
        images: usize,
        a: &Flipped<T>,
        window: Window,
        run: impl FnOnce(Product<Flipped<T>, Patches<T>>) -> R,
    ) -> R {
        run(Product::new(a, &Patches::new(dy, images, self.outputs, window), unit(window.taps())))
    }

    fn add_weight_gradients<T: Scalar>(&self, x: &[T], dy: &[T], images: usize) -> Result<()> {
        let columns = self.inputs * self.taps();
        let dy_planes = Planes::new(dy, images, self.outputs, self.pixels());
        self.weight.add_grad(|gradient| {
            let out = Out::adding(gradient, columns, 0);
            if self.pointwise() {
                let planes = Planes::new(x, images, self.inputs, self.pixels());
                Product::new(&dy_planes, &planes, UNIT).run(out);
            } else {
                let patches = PatchesTurned(Patches::new(x, images, self.inputs, self.window()));
                Product::new(&dy_planes, &patches, UNIT).run(out);
            }
        })?;
        match &self.bias {
            Some(bias) => bias.add_grad(|gradient| add_channel_sums(dy, self.pixels(), gradient)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;

//! 2-D convolution on the device (`kernels/conv2d.cu`): implicit matrix products of images as they are, (B, C, H, W),
//! with weights as they are, (O, C, kh, kw). Forward, gradient of the image, and gradients of weight and bias, which
//! are added to what is there. What it computes is what `ops::conv2d` says; f16 and bf16 go over tensor cores, f32 is
//! exact unless tf32 is allowed.
//!
//! There are two ways. Most of a network's convolutions in halves have their tiles copied (`kernels/conv2d_copies.cuh`), of
//! kernels of more than one tap from a copy of the image with channels last; what is odd, and everything in f32 and before
//! 8.0, is gathered element by element (`kernels/conv2d_tiles.cuh`). How both are cut is in [`cut`].
//!
//! Note: where the result alone is too few tiles for a device, the sum is cut into parts, which go to scratch in f32
//! and are added in their order: same bits every time on the same kind of device.

use anyhow::{Result, bail, ensure};
use candle_core::DType;

use self::cut::{Cut, Product};
use super::glue::moves::transpose;
use super::{Address, Arg, Family, Grid, Launcher, Scratch, suffix};

mod copied;
mod cut;
mod gathered;

/// Sizes of one convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convolution {
    pub dtype: DType,
    pub images: usize,
    /// Channels.
    pub inputs: usize,
    pub outputs: usize,
    /// Rows and columns of x and of the kernel.
    pub input: (usize, usize),
    pub kernel: (usize, usize),
    pub stride: usize,
    /// Zero padding.
    pub top: usize,
    pub bottom: usize,
    pub left: usize,
    pub right: usize,
}

/// Kernels of more taps than this are refused: what each tap reaches is a table in shared memory.
pub const MOST_TAPS: usize = 64;

/// One of the two products whose result is pixels.
#[derive(Clone, Copy)]
struct Pixels {
    product: Product,
    /// Of the source.
    channels: usize,
    source: (usize, usize),
    target: (usize, usize),
    backward: bool,
    /// Depths are taps and then channels, not channels and then taps.
    by_tap: bool,
}

/// Orders that a weight (outputs, inputs, taps) is turned to, as the kernel numbers them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turned {
    InputsOutputsTaps = 0,
    InputsTapsOutputs = 1,
    OutputsTapsInputs = 2,
}

impl Convolution {
    /// Rows and columns of y.
    pub fn output(&self) -> (usize, usize) {
        let along = |size: usize, padding: usize, kernel: usize| (size + padding - kernel) / self.stride + 1;
        (
            along(self.input.0, self.top + self.bottom, self.kernel.0),
            along(self.input.1, self.left + self.right, self.kernel.1),
        )
    }

    fn taps(&self) -> usize {
        self.kernel.0 * self.kernel.1
    }

    /// Pixels of y.
    fn pixels(&self) -> usize {
        let (height, width) = self.output();
        height * width
    }

    fn forward_pixels(&self) -> Pixels {
        let (source, target) = (self.input, self.output());
        let columns = self.images * self.pixels();
        let product = Product { rows: self.outputs, columns, depth: self.inputs * self.taps() };
        Pixels { product, channels: self.inputs, source, target, backward: false, by_tap: true }
    }

    fn input_pixels(&self) -> Pixels {
        let (source, target) = (self.output(), self.input);
        let columns = self.images * target.0 * target.1;
        let product = Product { rows: self.inputs, columns, depth: self.outputs * self.taps() };
        Pixels { product, channels: self.outputs, source, target, backward: true, by_tap: true }
    }

    fn weight_product(&self) -> Product {
        Product { rows: self.outputs, columns: self.inputs * self.taps(), depth: self.images * self.pixels() }
    }

    /// y (B, O, H', W') of x (B, C, H, W), weight (O, C, kh, kw) and bias (O).
    ///
    /// Errors if the sizes are none of a convolution, the device has no such dtype, or there is no scratch.
    pub fn forward(
        &self,
        launcher: &dyn Launcher,
        x: Address,
        weight: Address,
        bias: Option<Address>,
        y: Address,
    ) -> Result<()> {
        self.check(launcher)?;
        if self.images == 0 {
            return Ok(());
        }
        let pixels = self.forward_pixels();
        match self.copied_forward(launcher, &[x, weight]) {
            Some(from) => self.copy_pixels(launcher, from, pixels, (weight, Turned::OutputsTapsInputs), x, bias, y),
            None => self.gather_forward(launcher, pixels, weight, x, bias, y),
        }
    }

    /// dx (B, C, H, W) of dy (B, O, H', W').
    pub fn input_gradient(&self, launcher: &dyn Launcher, dy: Address, weight: Address, dx: Address) -> Result<()> {
        self.check(launcher)?;
        if self.images == 0 {
            return Ok(());
        }
        let pixels = self.input_pixels();
        match self.copied_pixels(launcher, self.outputs, self.output(), &[dy, weight]) {
            Some(from) => self.copy_pixels(launcher, from, pixels, (weight, Turned::InputsTapsOutputs), dy, None, dx),
            None => self.gather_input(launcher, pixels, weight, dy, dx),
        }
    }

    /// Adds to dw (O, C, kh, kw) and db (O), in f32, what x and dy give.
    pub fn add_weight_gradients(
        &self,
        launcher: &dyn Launcher,
        x: Address,
        dy: Address,
        dw: Address,
        db: Option<Address>,
    ) -> Result<()> {
        self.check(launcher)?;
        if self.images == 0 {
            return Ok(());
        }
        match self.copied_weights(launcher, &[x, dy, dw]) {
            Some(from) => self.copy_weights(launcher, from, x, dy, dw)?,
            None => self.gather_weights(launcher, x, dy, dw)?,
        }
        if let Some(db) = db {
            let grid = Grid { blocks: [self.outputs as u32, 1, 1], threads: 256, shared: 0 };
            let args = [dy.into(), db.into(), (self.images as i32).into(), (self.pixels() as i32).into()];
            launcher.launch(Family::Conv2d, &format!("conv2d_bias_{}", suffix(self.dtype)?), grid, &args)?;
        }
        Ok(())
    }

    /// A copy of the weight in another order.
    fn turn(&self, launcher: &dyn Launcher, weight: Address, order: Turned) -> Result<Scratch> {
        let size = self.dtype.size_in_bytes();
        let turned = launcher.scratch(self.inputs * self.outputs * self.taps() * size)?;
        let (outputs, inputs, to) = (self.outputs, self.inputs, turned.address());
        if self.taps() == 1 && order != Turned::OutputsTapsInputs {
            transpose(launcher, self.dtype, weight, to, 1, outputs, inputs)?;
            return Ok(turned);
        }
        let nine = self.taps() == 9 && self.dtype != DType::F32 && order != Turned::InputsOutputsTaps;
        let quick = nine && outputs.is_multiple_of(32) && inputs.is_multiple_of(32) && weight.aligned(4);
        // Kernels that a block turns: as many as fit into any device's shared memory.
        let side = if self.taps() <= 9 { 32 } else { 8 };
        let grid = Grid {
            blocks: [inputs.div_ceil(side) as u32, outputs.div_ceil(side) as u32, 1],
            threads: 256,
            shared: if quick { 0 } else { (side * side * self.taps() * size) as u32 },
        };
        let mut args: Vec<Arg> = vec![weight.into(), to.into()];
        let number = |n: usize| Arg::I32(n as i32);
        let name = match quick {
            true => {
                args.extend([outputs, inputs, order as usize].map(number));
                "conv2d_turn_nine"
            }
            false => {
                args.extend([outputs, inputs, self.taps(), side, order as usize].map(number));
                "conv2d_turn"
            }
        };
        launcher.launch(Family::Conv2d, &format!("{name}_{}", suffix(self.dtype)?), grid, &args)?;
        Ok(turned)
    }

    /// Launches a product of pixels with blocks of so many threads and bytes of shared memory, on weight, source and result.
    #[allow(clippy::too_many_arguments, reason = "what the two ways have in common")]
    fn launch_pixels(
        &self,
        launcher: &dyn Launcher,
        what: &str,
        pixels: Pixels,
        cut: Cut,
        (threads, shared): (usize, usize),
        [weight, source, to]: [Address; 3],
        bias: Option<Address>,
    ) -> Result<()> {
        let product = pixels.product;
        let parts = launcher.scratch(product.parts_bytes(cut))?;
        let bias = bias.unwrap_or(Address::NULL);
        let mut args = [weight, source, bias, to, parts.address()].map(Arg::Address).to_vec();
        args.extend([product.rows, cut.part].map(|n| Arg::I32(n as i32)));
        args.extend([self.whole(product.depth, weight), pixels.backward, pixels.by_tap].map(|b| Arg::I32(b.into())));
        self.push_shape(&mut args, pixels.channels, pixels.source, pixels.target);
        let grid = Grid { blocks: self.blocks(product, cut), threads: threads as u32, shared: shared as u32 };
        launcher.launch(Family::Conv2d, &self.name(launcher, what, cut)?, grid, &args)?;
        if cut.parts == 1 {
            return Ok(());
        }
        let (size, plane) = (product.rows * product.columns, pixels.target.0 * pixels.target.1);
        let args = [
            parts.address().into(),
            (cut.parts as i32).into(),
            bias.into(),
            to.into(),
            Arg::I64(size as i64),
            (product.rows as i32).into(),
            (plane as i32).into(),
        ];
        launcher.launch(Family::Conv2d, &format!("conv2d_sum_pixels_{}", suffix(self.dtype)?), each(size), &args)
    }

    /// Launches a product of weights' gradients; the operands are dy, x and dw.
    fn launch_weights(
        &self,
        launcher: &dyn Launcher,
        what: &str,
        product: Product,
        cut: Cut,
        grid: Grid,
        operands: [Arg; 3],
    ) -> Result<()> {
        let parts = launcher.scratch(product.parts_bytes(cut))?;
        let [dy, _, dw] = operands;
        let mut args = operands.to_vec();
        args.push(parts.address().into());
        args.extend([product.rows, cut.part].map(|n| Arg::I32(n as i32)));
        let whole = matches!(dy, Arg::Address(dy) if self.whole(self.pixels(), dy));
        args.push(Arg::I32(whole.into()));
        self.push_shape(&mut args, self.inputs, self.input, self.output());
        launcher.launch(Family::Conv2d, &self.name(launcher, what, cut)?, grid, &args)?;
        if cut.parts == 1 {
            return Ok(());
        }
        let size = product.rows * product.columns;
        let args = [parts.address().into(), (cut.parts as i32).into(), dw, Arg::I64(size as i64)];
        launcher.launch(Family::Conv2d, "conv2d_sum_weights", each(size), &args)
    }

    /// The name of a product's kernel. In tf32 the launch and its scratch are f32's.
    fn name(&self, launcher: &dyn Launcher, what: &str, cut: Cut) -> Result<String> {
        let tf32 = self.dtype == DType::F32 && launcher.allows_tf32() && launcher.capability() >= 80;
        let end = if tf32 { "tf32" } else { suffix(self.dtype)? };
        Ok(format!("conv2d_{what}_{}_{end}", cut.tile.name))
    }

    fn blocks(&self, product: Product, cut: Cut) -> [u32; 3] {
        let along = |size: usize, tile: usize| size.div_ceil(tile) as u32;
        [along(product.columns, cut.tile.columns), along(product.rows, cut.tile.rows), cut.parts as u32]
    }

    /// Rows of `span` elements can be copied 16 bytes at a time.
    fn whole(&self, span: usize, at: Address) -> bool {
        span.is_multiple_of(8) && at.aligned(16)
    }

    fn push_shape(&self, args: &mut Vec<Arg>, channels: usize, source: (usize, usize), target: (usize, usize)) {
        let shape = [
            self.images,
            channels,
            source.0,
            source.1,
            target.0,
            target.1,
            self.kernel.0,
            self.kernel.1,
            self.stride,
            self.top,
            self.left,
        ];
        args.extend(shape.map(|n| Arg::I32(n as i32)));
    }

    fn check(&self, launcher: &dyn Launcher) -> Result<()> {
        let (tall, wide) = (self.input.0 + self.top + self.bottom, self.input.1 + self.left + self.right);
        ensure!(self.inputs > 0 && self.outputs > 0 && self.stride > 0 && self.taps() > 0, "no convolution: {self:?}");
        ensure!(tall >= self.kernel.0 && wide >= self.kernel.1, "an image too small for its kernel: {self:?}");
        ensure!(self.taps() <= MOST_TAPS, "no convolution for kernels of more than {MOST_TAPS} taps: {self:?}");
        for product in [self.forward_pixels().product, self.input_pixels().product, self.weight_product()] {
            let most = i32::MAX as usize;
            ensure!(
                product.columns < most && product.depth < most && product.rows.div_ceil(64) <= 65535,
                "too large a convolution: {self:?}"
            );
        }
        if self.dtype == DType::BF16 && launcher.capability() < 80 {
            let capability = launcher.capability() as f32 / 10.0;
            bail!("convolutions in bf16 need a device of compute capability 8.0; this one has {capability}");
        }
        suffix(self.dtype).map(|_| ())
    }
}

/// A thread for each of so many numbers, within reason.
fn each(count: usize) -> Grid {
    Grid { blocks: [count.div_ceil(256).clamp(1, 4096) as u32, 1, 1], threads: 256, shared: 0 }
}

#[cfg(test)]
mod tests;

//! 2-D convolution on the device (`kernels/conv2d.cu`): implicit matrix products of images as they are, (B, C, H, W),
//! with weights as they are, (O, C, kh, kw). Forward, gradient of the image, and gradients of weight and bias, which
//! are added to what is there. What it computes is what `ops::conv2d` says; f16 and bf16 go over tensor cores, f32 is
//! exact unless tf32 is allowed.
//!
//! Note: where the result alone is too few tiles for a device, the sum is cut into parts, which go to scratch in f32
//! and are added in their order: same bits every time on the same kind of device.

use anyhow::{Result, bail, ensure};
use candle_core::DType;

use super::{Address, Arg, Family, Grid, Launcher, Scratch, suffix};

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
/// Bytes of parts of sums that a convolution may have in scratch.
pub const MOST_PARTS_BYTES: usize = 64 << 20;
/// From so many pixels on a weight is turned for the forward, too: it makes gathering cheaper.
const MANY_PIXELS: usize = 1024;
/// Sums are cut into multiples of this.
const DEPTH: usize = 32;
/// Parts are no shorter than this many times DEPTH.
const SHORTEST_PART: usize = 8;

/// What a kernel works on: a product of (rows, depth) and (depth, columns).
#[derive(Clone, Copy)]
struct Product {
    rows: usize,
    columns: usize,
    depth: usize,
}

/// How a product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    /// Rows and columns of a block: 128 or 64.
    tile: usize,
    parts: usize,
    /// Depth of a part.
    part: usize,
}

impl Product {
    fn tiles(&self, tile: usize) -> usize {
        self.rows.div_ceil(tile) * self.columns.div_ceil(tile)
    }

    /// Large tiles where there are enough of them for the device; parts where not even small ones are.
    fn cut(&self, dtype: DType, multiprocessors: usize) -> Cut {
        let large = dtype != DType::F32 && self.rows > 64 && self.columns > 64 && self.tiles(128) >= multiprocessors;
        let tile = if large { 128 } else { 64 };
        let bytes = 4 * self.rows * self.columns;
        let most = (self.depth / (SHORTEST_PART * DEPTH)).min(MOST_PARTS_BYTES / bytes.max(1)).max(1);
        let wanted = (2 * multiprocessors / self.tiles(tile).max(1)).clamp(1, most);
        let part = self.depth.div_ceil(wanted).next_multiple_of(DEPTH);
        Cut { tile, parts: self.depth.div_ceil(part), part }
    }

    /// Scratch for the parts, none if there is one only.
    fn parts(&self, cut: Cut) -> usize {
        if cut.parts == 1 { 0 } else { 4 * cut.parts * self.rows * self.columns }
    }
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

    fn forward_product(&self) -> Product {
        Product { rows: self.outputs, columns: self.images * self.pixels(), depth: self.inputs * self.taps() }
    }

    fn input_product(&self) -> Product {
        let columns = self.images * self.input.0 * self.input.1;
        Product { rows: self.inputs, columns, depth: self.outputs * self.taps() }
    }

    fn weight_product(&self) -> Product {
        Product { rows: self.outputs, columns: self.inputs * self.taps(), depth: self.images * self.pixels() }
    }

    /// Bytes of the weight, turned.
    fn turned_bytes(&self) -> usize {
        self.inputs * self.outputs * self.taps() * self.dtype.size_in_bytes()
    }

    /// Whether sums over so many channels can go by taps and then channels: tensor cores take eight depths of one tap.
    fn by_tap(&self, channels: usize) -> bool {
        self.dtype != DType::F32 && channels.is_multiple_of(8)
    }

    /// Whether the forward's sums go so, and whether the weight must be turned for it.
    fn forward_order(&self) -> (bool, bool) {
        let many = self.images * self.pixels() >= MANY_PIXELS;
        let by_tap = self.by_tap(self.inputs) && (many || self.taps() == 1);
        (by_tap, by_tap && self.taps() > 1)
    }

    /// The most scratch that one call takes, bytes: forward, gradient of x, gradients of weights.
    pub fn scratch_bytes(&self, multiprocessors: u32) -> [usize; 3] {
        let parts = |product: Product| product.parts(product.cut(self.dtype, multiprocessors as usize));
        [
            parts(self.forward_product()) + if self.forward_order().1 { self.turned_bytes() } else { 0 },
            parts(self.input_product()) + self.turned_bytes(),
            parts(self.weight_product()),
        ]
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
        let (by_tap, turned) = self.forward_order();
        let pixels = Pixels {
            product: self.forward_product(),
            channels: self.inputs,
            source: self.input,
            target: self.output(),
            backward: false,
            by_tap,
        };
        if !turned {
            return self.pixels_of(launcher, pixels, weight, x, bias, y);
        }
        let copy = self.turn(launcher, weight, Turned::OutputsTapsInputs)?;
        self.pixels_of(launcher, pixels, copy.address(), x, bias, y)
    }

    /// dx (B, C, H, W) of dy (B, O, H', W').
    pub fn input_gradient(&self, launcher: &dyn Launcher, dy: Address, weight: Address, dx: Address) -> Result<()> {
        self.check(launcher)?;
        let by_tap = self.by_tap(self.outputs);
        let order = if by_tap { Turned::InputsTapsOutputs } else { Turned::InputsOutputsTaps };
        let turned = self.turn(launcher, weight, order)?;
        let pixels = Pixels {
            product: self.input_product(),
            channels: self.outputs,
            source: self.output(),
            target: self.input,
            backward: true,
            by_tap,
        };
        self.pixels_of(launcher, pixels, turned.address(), dy, None, dx)
    }

    /// A copy of the weight in another order.
    fn turn(&self, launcher: &dyn Launcher, weight: Address, order: Turned) -> Result<Scratch> {
        let turned = launcher.scratch(self.turned_bytes())?;
        // Kernels that a block turns: as many as fit into any device's shared memory.
        let side = if self.taps() <= 9 { 32 } else { 8 };
        let grid = Grid {
            blocks: [self.inputs.div_ceil(side) as u32, self.outputs.div_ceil(side) as u32, 1],
            threads: 256,
            shared: (side * side * self.taps() * self.dtype.size_in_bytes()) as u32,
        };
        let mut args: Vec<Arg> = vec![weight.into(), turned.address().into()];
        args.extend([self.outputs, self.inputs, self.taps(), side, order as usize].map(|n| Arg::I32(n as i32)));
        launcher.launch(Family::Conv2d, &format!("conv2d_turn_{}", suffix(self.dtype)?), grid, &args)?;
        Ok(turned)
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
        let product = self.weight_product();
        let cut = product.cut(self.dtype, launcher.multiprocessors() as usize);
        let parts = launcher.scratch(product.parts(cut))?;
        let mut args = [dy, x, dw, parts.address()].map(Arg::Address).to_vec();
        args.extend([product.rows, cut.part].map(|n| Arg::I32(n as i32)));
        args.push(Arg::I32(self.whole(self.pixels(), dy).into()));
        self.push_shape(&mut args, self.inputs, self.input, self.output());
        self.launch(launcher, "weights", product, cut, 0, &args)?;
        if cut.parts > 1 {
            let size = product.rows * product.columns;
            let args = [parts.address().into(), (cut.parts as i32).into(), dw.into(), Arg::I64(size as i64)];
            launcher.launch(Family::Conv2d, "conv2d_sum_weights", each(size), &args)?;
        }
        if let Some(db) = db {
            let grid = Grid { blocks: [self.outputs as u32, 1, 1], threads: 256, shared: 0 };
            let args = [dy.into(), db.into(), (self.images as i32).into(), (self.pixels() as i32).into()];
            launcher.launch(Family::Conv2d, &format!("conv2d_bias_{}", suffix(self.dtype)?), grid, &args)?;
        }
        Ok(())
    }

    fn pixels_of(
        &self,
        launcher: &dyn Launcher,
        pixels: Pixels,
        weight: Address,
        source: Address,
        bias: Option<Address>,
        to: Address,
    ) -> Result<()> {
        if self.images == 0 {
            return Ok(());
        }
        let product = pixels.product;
        let cut = product.cut(self.dtype, launcher.multiprocessors() as usize);
        let parts: Scratch = launcher.scratch(product.parts(cut))?;
        let bias = bias.unwrap_or(Address::NULL);
        let mut args = [weight, source, bias, to, parts.address()].map(Arg::Address).to_vec();
        args.extend([product.rows, cut.part].map(|n| Arg::I32(n as i32)));
        let flags = [self.whole(product.depth, weight), pixels.backward, pixels.by_tap];
        args.extend(flags.map(|b| Arg::I32(b.into())));
        self.push_shape(&mut args, pixels.channels, pixels.source, pixels.target);
        self.launch(launcher, "pixels", product, cut, self.taps() * cut.tile * 4, &args)?;
        if cut.parts > 1 {
            let size = product.rows * product.columns;
            let plane = pixels.target.0 * pixels.target.1;
            let args = [
                parts.address().into(),
                (cut.parts as i32).into(),
                bias.into(),
                to.into(),
                Arg::I64(size as i64),
                (product.rows as i32).into(),
                (plane as i32).into(),
            ];
            launcher.launch(
                Family::Conv2d,
                &format!("conv2d_sum_pixels_{}", suffix(self.dtype)?),
                each(size),
                &args,
            )?;
        }
        Ok(())
    }

    fn launch(
        &self,
        launcher: &dyn Launcher,
        what: &str,
        product: Product,
        cut: Cut,
        table: usize,
        args: &[Arg],
    ) -> Result<()> {
        let (mut name, grid) = self.configuration(what, product, cut, table)?;
        if self.dtype == DType::F32 && launcher.allows_tf32() && launcher.capability() >= 80 {
            // The same launch, the same scratch.
            name = name.replace("_f32", "_tf32");
        }
        launcher.launch(Family::Conv2d, &name, grid, args)
    }

    /// The kernel's name and how it is launched, with a table of so many bytes.
    fn configuration(&self, what: &str, product: Product, cut: Cut, table: usize) -> Result<(String, Grid)> {
        // f32 has its tiles in static shared memory.
        let tiles = if self.dtype == DType::F32 { 0 } else { 2 * 2 * cut.tile * DEPTH * 2 };
        let grid = Grid {
            blocks: [
                product.columns.div_ceil(cut.tile) as u32,
                product.rows.div_ceil(cut.tile) as u32,
                cut.parts as u32,
            ],
            threads: if self.dtype == DType::F32 || cut.tile == 128 { 256 } else { 128 },
            shared: (tiles + table) as u32,
        };
        let size = if cut.tile == 128 { "large" } else { "small" };
        Ok((format!("conv2d_{what}_{size}_{}", suffix(self.dtype)?), grid))
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
        for product in [self.forward_product(), self.input_product(), self.weight_product()] {
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

/// One of the two products whose result is pixels.
struct Pixels {
    product: Product,
    /// Of the source.
    channels: usize,
    source: (usize, usize),
    target: (usize, usize),
    backward: bool,
    /// Order of the weight's and the sum's depths.
    by_tap: bool,
}

/// Orders that a weight (outputs, inputs, taps) is turned to, as the kernel numbers them.
#[derive(Clone, Copy)]
enum Turned {
    InputsOutputsTaps = 0,
    InputsTapsOutputs = 1,
    OutputsTapsInputs = 2,
}

/// A thread for each of so many numbers, within reason.
fn each(count: usize) -> Grid {
    Grid { blocks: [count.div_ceil(256).clamp(1, 4096) as u32, 1, 1], threads: 256, shared: 0 }
}

#[cfg(test)]
mod tests;

//! Convolutions whose operands are gathered element by element (`kernels/conv2d_tiles.cuh`): in f32 and tf32, before 8.0, and
//! of sizes that no whole chunks can be copied of.

use anyhow::Result;
use candle_core::DType;

use super::cut::{Cut, DEPTH};
use super::{Convolution, Pixels, Turned};
use crate::kernels::{Address, Arg, Grid, Launcher};

/// From so many pixels on a weight is turned for the forward, too: it makes gathering cheaper.
const MANY_PIXELS: usize = 1024;

impl Convolution {
    /// Whether sums over so many channels can go by taps and then channels: tensor cores take eight depths of one tap.
    fn by_tap(&self, channels: usize) -> bool {
        self.dtype != DType::F32 && channels.is_multiple_of(8)
    }

    pub(super) fn gather_forward(
        &self,
        launcher: &dyn Launcher,
        pixels: Pixels,
        weight: Address,
        x: Address,
        bias: Option<Address>,
        y: Address,
    ) -> Result<()> {
        let many = self.images * self.pixels() >= MANY_PIXELS;
        let by_tap = self.by_tap(self.inputs) && (many || self.taps() == 1);
        if !by_tap || self.taps() == 1 {
            return self.gather_pixels(launcher, pixels, by_tap, [weight, x, y], bias);
        }
        let turned = self.turn(launcher, weight, Turned::OutputsTapsInputs)?;
        self.gather_pixels(launcher, pixels, true, [turned.address(), x, y], bias)
    }

    pub(super) fn gather_input(
        &self,
        launcher: &dyn Launcher,
        pixels: Pixels,
        weight: Address,
        dy: Address,
        dx: Address,
    ) -> Result<()> {
        let by_tap = self.by_tap(self.outputs);
        let order = if by_tap { Turned::InputsTapsOutputs } else { Turned::InputsOutputsTaps };
        let turned = self.turn(launcher, weight, order)?;
        self.gather_pixels(launcher, pixels, by_tap, [turned.address(), dy, dx], None)
    }

    fn gather_pixels(
        &self,
        launcher: &dyn Launcher,
        pixels: Pixels,
        by_tap: bool,
        operands: [Address; 3],
        bias: Option<Address>,
    ) -> Result<()> {
        let cut = pixels.product.cut_gathered(self.dtype, launcher.multiprocessors() as usize);
        // Beside the tiles: what each tap of each column reaches.
        let (threads, tiles) = self.gathering_block(cut);
        let block = (threads, tiles + self.taps() * cut.tile.columns * 4);
        self.launch_pixels(launcher, "pixels", Pixels { by_tap, ..pixels }, cut, block, operands, bias)
    }

    pub(super) fn gather_weights(&self, launcher: &dyn Launcher, x: Address, dy: Address, dw: Address) -> Result<()> {
        let product = self.weight_product();
        let cut = product.cut_gathered(self.dtype, launcher.multiprocessors() as usize);
        let (threads, tiles) = self.gathering_block(cut);
        let grid = Grid { blocks: self.blocks(product, cut), threads: threads as u32, shared: tiles as u32 };
        self.launch_weights(launcher, "weights", product, cut, grid, [dy, x, dw].map(Arg::Address))
    }

    /// Threads of a block, and bytes of its tiles; those of f32 are in static shared memory.
    pub(super) fn gathering_block(&self, cut: Cut) -> (usize, usize) {
        match self.dtype {
            DType::F32 => (256, 0),
            _ => (if cut.tile.rows == 128 { 256 } else { 128 }, 2 * 2 * (cut.tile.rows + cut.tile.columns) * DEPTH),
        }
    }
}

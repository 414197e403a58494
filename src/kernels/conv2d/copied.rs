//! Convolutions whose tiles are copied (`kernels/conv2d_copies.cuh`): in halves, from 8.0, where eight channels or pixels are
//! always 16 aligned bytes.

use anyhow::Result;
use candle_core::DType;

use super::cut::{COLUMNS, DEPTH, PIXELS, TAPS};
use super::{Convolution, Pixels, Turned};
use crate::kernels::glue::moves::transpose;
use crate::kernels::{Address, Arg, Grid, Launcher, Scratch, shared_memory};

/// From so many pixels on turning the weight pays for the forward.
const MANY_PIXELS: usize = 256;
/// Taps that a thread can keep a bit of.
const MOST_TAPS: usize = 32;
/// Tiles on their way or in use.
const STAGES: usize = 3;
/// Halves of a row of a tile of taps.
const TAPS_ROW: usize = (2 * 9 + 1) * 8;

/// What is copied from: planes as they are, or an image with its channels last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    Planes,
    ChannelsLast,
}

impl Convolution {
    /// What the products whose result is pixels are copied from; none if they are gathered. `channels` and `source` are those
    /// of what is convolved.
    pub(super) fn copied_pixels(
        &self,
        launcher: &dyn Launcher,
        channels: usize,
        (height, width): (usize, usize),
        operands: &[Address],
    ) -> Option<From> {
        let elements = self.images * channels * height * width;
        if !self.can_copy(launcher, operands) || !channels.is_multiple_of(8) || elements >= i32::MAX as usize {
            return None;
        }
        match self.is_plain() && (height * width).is_multiple_of(8) {
            true => Some(From::Planes),
            false => (self.taps() <= MOST_TAPS).then_some(From::ChannelsLast),
        }
    }

    /// The same of the forward, for which a weight of several taps must be turned: not for few pixels.
    pub(super) fn copied_forward(&self, launcher: &dyn Launcher, operands: &[Address]) -> Option<From> {
        let pays = self.taps() == 1 || self.images * self.pixels() >= MANY_PIXELS;
        self.copied_pixels(launcher, self.inputs, self.input, operands).filter(|_| pays)
    }

    /// The same of the weights' gradients.
    pub(super) fn copied_weights(&self, launcher: &dyn Launcher, operands: &[Address]) -> Option<From> {
        let elements = self.images * self.inputs * self.input.0 * self.input.1;
        if !self.can_copy(launcher, operands) || !self.pixels().is_multiple_of(8) || elements >= i32::MAX as usize {
            return None;
        }
        let nine = self.kernel == (3, 3) && self.inputs.is_multiple_of(8);
        if self.is_plain() { Some(From::Planes) } else { nine.then_some(From::ChannelsLast) }
    }

    fn can_copy(&self, launcher: &dyn Launcher, operands: &[Address]) -> bool {
        self.dtype != DType::F32 && launcher.capability() >= 80 && operands.iter().all(|operand| operand.aligned(16))
    }

    /// One tap, neither stride nor padding.
    fn is_plain(&self) -> bool {
        self.taps() == 1 && self.stride == 1 && self.top + self.bottom + self.left + self.right == 0
    }

    /// A copy of images (B, `channels`, height, width) as (B, height, width, `channels`).
    fn channels_last(
        &self,
        launcher: &dyn Launcher,
        from: Address,
        channels: usize,
        (height, width): (usize, usize),
    ) -> Result<Scratch> {
        let plane = height * width;
        let copy = launcher.scratch(self.images * channels * plane * self.dtype.size_in_bytes())?;
        transpose(launcher, self.dtype, from, copy.address(), self.images, channels, plane)?;
        Ok(copy)
    }

    /// The result `to` of `pixels`; the weight is turned to `order`.
    #[allow(clippy::too_many_arguments, reason = "operands of a product")]
    pub(super) fn copy_pixels(
        &self,
        launcher: &dyn Launcher,
        from: From,
        pixels: Pixels,
        (weight, order): (Address, Turned),
        source: Address,
        bias: Option<Address>,
        to: Address,
    ) -> Result<()> {
        // A weight of one tap is as its forward wants it.
        let turned = match (order, self.taps()) {
            (Turned::OutputsTapsInputs, 1) => None,
            _ => Some(self.turn(launcher, weight, order)?),
        };
        let last = match from {
            From::Planes => None,
            From::ChannelsLast => Some(self.channels_last(launcher, source, pixels.channels, pixels.source)?),
        };
        let cut = pixels.product.cut(&PIXELS, launcher.multiprocessors() as usize);
        let weight = turned.as_ref().map_or(weight, Scratch::address);
        let source = last.as_ref().map_or(source, Scratch::address);
        let shared = STAGES * 2 * DEPTH * (cut.tile.rows + cut.tile.columns);
        let what = if from == From::Planes { "copied_planes" } else { "copied_pixels" };
        self.launch_pixels(launcher, what, pixels, cut, (128, shared), [weight, source, to], bias)
    }

    /// Adds to dw what x and dy give.
    pub(super) fn copy_weights(
        &self,
        launcher: &dyn Launcher,
        from: From,
        x: Address,
        dy: Address,
        dw: Address,
    ) -> Result<()> {
        let (product, multiprocessors) = (self.weight_product(), launcher.multiprocessors() as usize);
        let (what, cut, last) = match from {
            From::Planes => ("copied_columns", product.cut(&COLUMNS, multiprocessors), None),
            From::ChannelsLast => {
                let last = self.channels_last(launcher, x, self.inputs, self.input)?;
                // Of the large tile, a multiprocessor of consumer cards has room for one block alone, which would wait for itself.
                let roomy = shared_memory(launcher.capability()) > 100 << 10;
                let tiles = if roomy { &TAPS[..] } else { &TAPS[1..] };
                ("copied_taps", product.cut(tiles, multiprocessors), Some(last))
            }
        };
        let columns = if last.is_some() { DEPTH * TAPS_ROW } else { DEPTH * cut.tile.columns };
        let shared = STAGES * 2 * (DEPTH * cut.tile.rows + columns);
        let grid = Grid {
            blocks: match from {
                From::Planes => self.blocks(product, cut),
                // Sixteen channels at a time, whatever is left of the last ones.
                From::ChannelsLast => {
                    let [_, rows, parts] = self.blocks(product, cut);
                    [self.inputs.div_ceil(16) as u32, rows, parts]
                }
            },
            threads: 128,
            shared: shared as u32,
        };
        let x = last.as_ref().map_or(x, Scratch::address);
        self.launch_weights(launcher, what, product, cut, grid, [dy, x, dw].map(Arg::Address))
    }
}

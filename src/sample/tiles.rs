//! Decoding in overlapping tiles that are blended where they overlap: the arithmetic of diffusers' `tiled_decode`, on
//! plain slices.

use anyhow::Result;

/// An image or latents: (channels, height, width).
#[derive(Clone, Debug, PartialEq)]
pub struct Plane {
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    pub values: Vec<f32>,
}

impl Plane {
    pub fn is_finite(&self) -> bool {
        self.values.iter().all(|x| x.is_finite())
    }

    /// Rows `top..` and columns `left..`, at most `height` and `width` of them.
    fn cut(&self, top: usize, left: usize, height: usize, width: usize) -> Plane {
        let (height, width) = (height.min(self.height - top), width.min(self.width - left));
        let mut values = Vec::with_capacity(self.channels * height * width);
        for c in 0..self.channels {
            for y in top..top + height {
                let from = (c * self.height + y) * self.width + left;
                values.extend_from_slice(&self.values[from..from + width]);
            }
        }
        Plane { channels: self.channels, height, width, values }
    }

    fn at(&self, channel: usize, y: usize, x: usize) -> usize {
        (channel * self.height + y) * self.width + x
    }

    /// Lets the last rows of `above` fade into this one's first ones.
    fn blend_from_above(&mut self, above: &Plane, extent: usize) {
        let extent = extent.min(above.height).min(self.height);
        for y in 0..extent {
            for c in 0..self.channels {
                for x in 0..self.width.min(above.width) {
                    let from = above.values[above.at(c, above.height - extent + y, x)];
                    let to = self.at(c, y, x);
                    self.values[to] = fade(from, self.values[to], y, extent);
                }
            }
        }
    }

    /// Lets the last columns of `left` fade into this one's first ones.
    fn blend_from_left(&mut self, left: &Plane, extent: usize) {
        let extent = extent.min(left.width).min(self.width);
        for c in 0..self.channels {
            for y in 0..self.height.min(left.height) {
                for x in 0..extent {
                    let from = left.values[left.at(c, y, left.width - extent + x)];
                    let to = self.at(c, y, x);
                    self.values[to] = fade(from, self.values[to], x, extent);
                }
            }
        }
    }

    /// Writes this one's first rows and columns into `whole` at (top, left), as many as fit below `limit`.
    fn paste(&self, whole: &mut Plane, top: usize, left: usize, limit: usize) {
        let (height, width) = (self.height.min(limit), self.width.min(limit));
        for c in 0..self.channels {
            for y in 0..height {
                let (from, to) = (self.at(c, y, 0), whole.at(c, top + y, left));
                whole.values[to..to + width].copy_from_slice(&self.values[from..from + width]);
            }
        }
    }
}

fn fade(from: f32, to: f32, step: usize, steps: usize) -> f32 {
    let share = step as f64 / steps as f64;
    from * (1.0 - share) as f32 + to * share as f32
}

/// How latents are cut: into tiles of the size that the VAE was trained on, each reaching a quarter into the next one.
#[derive(Clone, Copy, Debug)]
pub struct Tiles {
    /// Side of a tile, in latents.
    side: usize,
    /// From one tile to the next, in latents.
    stride: usize,
    /// Pixels along a latent's side.
    downscale: usize,
}

impl Tiles {
    /// `sample_size`: the VAE's own, in pixels. A tile's side is a multiple of four latents, so that a quarter of it is
    /// whole (where it is not, diffusers' tiles do not fit together).
    pub fn of(sample_size: usize, downscale: usize) -> Self {
        let side = (sample_size / downscale / 4 * 4).max(8);
        Tiles { side, stride: side / 4 * 3, downscale }
    }

    /// Whether latents are larger than one tile.
    pub fn are_smaller_than(&self, latents: &Plane) -> bool {
        latents.height > self.side || latents.width > self.side
    }

    /// Decodes tile by tile; `decode` takes latents to pixels. At most two rows of tiles are held at a time.
    pub fn decode(&self, latents: &Plane, mut decode: impl FnMut(Plane) -> Result<Plane>) -> Result<Plane> {
        let blend = (self.side - self.stride) * self.downscale;
        let limit = self.stride * self.downscale;
        let (height, width) = (latents.height * self.downscale, latents.width * self.downscale);
        let mut whole = Plane { channels: 3, height, width, values: vec![0.0; 3 * height * width] };
        let mut above: Vec<Plane> = Vec::new();
        for top in (0..latents.height).step_by(self.stride) {
            let mut row: Vec<Plane> = Vec::new();
            for (j, left) in (0..latents.width).step_by(self.stride).enumerate() {
                let mut tile = decode(latents.cut(top, left, self.side, self.side))?;
                if let Some(above) = above.get(j) {
                    tile.blend_from_above(above, blend);
                }
                if let Some(left) = row.last() {
                    tile.blend_from_left(left, blend);
                }
                tile.paste(&mut whole, top * self.downscale, left * self.downscale, limit);
                row.push(tile);
            }
            above = row;
        }
        Ok(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_of_a_decoder_that_sees_no_neighbours_fit_together_without_a_seam() {
        let tiles = Tiles::of(64, 8);
        for (height, width) in [(9, 8), (8, 20), (13, 17), (24, 6)] {
            let values: Vec<f32> = (0..3 * height * width).map(|i| (i * 37 % 101) as f32).collect();
            let latents = Plane { channels: 3, height, width, values };
            assert!(tiles.are_smaller_than(&latents));
            let enlarge = |plane: Plane| {
                let (height, width) = (8 * plane.height, 8 * plane.width);
                let value =
                    |i: usize| plane.values[plane.at(i / (height * width), i / width % height / 8, i % width / 8)];
                Ok(Plane { channels: 3, height, width, values: (0..3 * height * width).map(value).collect() })
            };
            let (whole, want) = (tiles.decode(&latents, enlarge).unwrap(), enlarge(latents.clone()).unwrap());
            let apart = whole.values.iter().zip(&want.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-4, "{height} x {width}: {apart}");
        }
        assert!(!tiles.are_smaller_than(&Plane { channels: 1, height: 8, width: 8, values: vec![0.0; 64] }));
    }
}

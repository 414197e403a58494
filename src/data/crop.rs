//! The geometry of crops: how large a picture is made, where its crop lies, and the crop's pixels as a network sees
//! them. What is drawn and for whom is not known here.

use super::Picture;

/// Where an item's crop comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crop {
    /// A recorded offset in the resized picture, in pixels; never mirrored.
    At { top: usize, left: usize },
    /// Uniform 64-bit numbers for a random crop's offsets (not used with `center_crop`), and whether to mirror.
    Drawn { top: u64, left: u64, flip: bool },
}

/// A part of a resized picture that holds every crop that can be asked for.
#[derive(Debug)]
pub(super) struct Window {
    pub picture: Picture,
    /// Of the window in the resized picture.
    pub top: usize,
    pub left: usize,
}

impl Window {
    /// The r × r pixels from (top, left) as (3, r, r) in −1 … 1, rounded as `ToTensor` and `Normalize` round.
    pub(super) fn pixels(&self, top: usize, left: usize, r: usize, flip: bool) -> Vec<f32> {
        let levels: [f32; 256] = std::array::from_fn(|v| (v as f32 / 255.0 - 0.5) / 0.5);
        let mut pixels = vec![0f32; 3 * r * r];
        for y in 0..r {
            let start = (top - self.top + y) * self.picture.width + (left - self.left);
            let line = &self.picture.rgb[start * 3..][..r * 3];
            for (x, pixel) in line.as_chunks::<3>().0.iter().enumerate() {
                let x = if flip { r - 1 - x } else { x };
                for (channel, &level) in pixel.iter().enumerate() {
                    pixels[(channel * r + y) * r + x] = levels[usize::from(level)];
                }
            }
        }
        pixels
    }
}

/// The size of a picture whose shorter side becomes `r`; the longer is rounded down, as in torchvision.
pub(super) fn fit((width, height): (usize, usize), r: usize) -> (usize, usize) {
    if width <= height { (r, r * height / width) } else { (r * width / height, r) }
}

/// n/2, a half to the even neighbour, as Python's `round` does.
pub(super) fn center(n: usize) -> usize {
    n / 2 + usize::from(n % 4 == 3)
}

/// A uniform 64-bit number as one of 0 … max.
pub(super) fn scale_draw(draw: u64, max: usize) -> usize {
    ((u128::from(draw) * (max as u128 + 1)) >> 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_side_is_rounded_down() {
        assert_eq!(fit((300, 97), 64), (197, 64));
        assert_eq!(fit((97, 300), 64), (64, 197));
        assert_eq!(fit((5, 5), 512), (512, 512));
        assert_eq!(fit((1, 3), 512), (512, 1536));
    }

    #[test]
    fn halves_go_to_the_even_offset() {
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7, 8].map(center), [0, 0, 1, 2, 2, 2, 3, 4, 4]);
    }

    #[test]
    fn draws_reach_every_offset_and_none_beyond() {
        assert_eq!(scale_draw(0, 9), 0);
        assert_eq!(scale_draw(u64::MAX, 9), 9);
        assert_eq!(scale_draw(u64::MAX / 2, 1), 0);
        assert_eq!(scale_draw(u64::MAX / 2 + 1, 1), 1);
        assert_eq!(scale_draw(u64::MAX, 0), 0);
    }

    #[test]
    fn a_window_gives_its_crops_also_mirrored() {
        // A resized picture of 5 columns and 3 rows, of which the window holds columns 1 … 4; red counts the columns.
        let rgb = (0..3u8).flat_map(|y| (1..5u8).flat_map(move |x| [x, y, 255])).collect();
        let window = Window { picture: Picture { width: 4, height: 3, rgb }, top: 0, left: 1 };
        let level = |v: u8| (f32::from(v) / 255.0 - 0.5) / 0.5;
        let plain = window.pixels(1, 2, 2, false);
        assert_eq!(plain[..8], [2, 3, 2, 3, 1, 1, 2, 2].map(level));
        assert_eq!(plain[8..], [1.0; 4]);
        assert_eq!(window.pixels(1, 2, 2, true)[..4], [3, 2, 3, 2].map(level));
    }
}

//! Resizing of 8-bit RGB pictures, equal to Pillow's `Image.resize` to the bit: antialiased filters whose support grows
//! with the reduction, evaluated in f64 and applied in fixed point, first along rows and then along columns, with
//! rounding to 8 bits in between. Only a window of the result is computed, since often only a crop of it is wanted.

use super::Picture;
use rayon::prelude::*;
use std::ops::Range;

/// The filter of a resize, by Pillow's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interpolation {
    Bilinear,
    Bicubic,
    Lanczos,
    Box,
    Hamming,
    Nearest,
}

impl Interpolation {
    /// By the names of the peers' option; Pillow has one nearest filter for both of theirs.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "bilinear" => Interpolation::Bilinear,
            "bicubic" => Interpolation::Bicubic,
            "lanczos" => Interpolation::Lanczos,
            "box" => Interpolation::Box,
            "hamming" => Interpolation::Hamming,
            "nearest" | "nearest_exact" => Interpolation::Nearest,
            _ => return None,
        })
    }

    /// Half the filter's width, in pixels of an enlargement.
    fn support(self) -> f64 {
        match self {
            Interpolation::Nearest => 0.0,
            Interpolation::Box => 0.5,
            Interpolation::Bilinear | Interpolation::Hamming => 1.0,
            Interpolation::Bicubic => 2.0,
            Interpolation::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
        let distance = x.abs();
        match self {
            Interpolation::Nearest => 0.0,
            // Half open, so that a pixel on the border of two boxes counts once.
            Interpolation::Box => f64::from(x > -0.5 && x <= 0.5),
            Interpolation::Bilinear => (1.0 - distance).max(0.0),
            Interpolation::Hamming => match distance {
                0.0 => 1.0,
                d if d >= 1.0 => 0.0,
                d => {
                    let angle = d * std::f64::consts::PI;
                    // Pillow writes these two as C floats.
                    angle.sin() / angle * (f64::from(0.54f32) + f64::from(0.46f32) * angle.cos())
                }
            },
            Interpolation::Bicubic => {
                const A: f64 = -0.5;
                match distance {
                    d if d < 1.0 => ((A + 2.0) * d - (A + 3.0)) * d * d + 1.0,
                    d if d < 2.0 => (((d - 5.0) * d + 8.0) * d - 4.0) * A,
                    _ => 0.0,
                }
            }
            Interpolation::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Interpolation::Lanczos => 0.0,
        }
    }
}

/// Bits behind the point of a coefficient: 32 less 8 of a pixel and 2 of head room for negative lobes.
const PRECISION: u32 = 32 - 8 - 2;

/// What the pixels `range` of one output axis are made of: for each its first input pixel and its coefficients.
struct Axis {
    range: Range<usize>,
    starts: Vec<usize>,
    /// `width` per output pixel, of which `counts` are used.
    coefficients: Vec<i32>,
    counts: Vec<usize>,
    width: usize,
}

impl Axis {
    fn new(input: usize, output: usize, range: Range<usize>, filter: Interpolation) -> Self {
        let scale = input as f64 / output as f64;
        let filter_scale = scale.max(1.0);
        let support = filter.support() * filter_scale;
        let width = support.ceil() as usize * 2 + 1;
        let mut axis = Axis {
            starts: Vec::with_capacity(range.len()),
            coefficients: vec![0; range.len() * width],
            counts: Vec::with_capacity(range.len()),
            width,
            range: range.clone(),
        };
        for (out, coefficients) in range.zip(axis.coefficients.chunks_exact_mut(width)) {
            let center = (out as f64 + 0.5) * scale;
            // Conversions truncate towards zero, as in C.
            let first = ((center - support + 0.5) as i64).max(0) as usize;
            let last = ((center + support + 0.5) as i64).clamp(0, input as i64) as usize;
            let inverse = 1.0 / filter_scale;
            let weights: Vec<f64> = (first..last).map(|i| filter.weight((i as f64 - center + 0.5) * inverse)).collect();
            let total: f64 = weights.iter().sum();
            for (c, weight) in coefficients.iter_mut().zip(&weights) {
                let share = if total != 0.0 { weight / total } else { *weight };
                *c = (share * f64::from(1 << PRECISION) + if share < 0.0 { -0.5 } else { 0.5 }) as i32;
            }
            axis.starts.push(first);
            axis.counts.push(weights.len());
        }
        axis
    }

    fn coefficients(&self, i: usize) -> &[i32] {
        &self.coefficients[i * self.width..][..self.counts[i]]
    }

    /// The same over an input whose first pixel is the former's pixel `first`.
    fn shifted(mut self, first: usize) -> Self {
        self.starts.iter_mut().for_each(|s| *s -= first);
        self
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.coefficients) + self.range.len() * 2 * size_of::<usize>()
    }

    /// The input pixels that are needed at all.
    fn needed(&self) -> Range<usize> {
        let first = self.starts.iter().min().copied().unwrap_or(0);
        let last = self.starts.iter().zip(&self.counts).map(|(s, c)| s + c).max().unwrap_or(0);
        first..last
    }
}

fn clip(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// The columns `columns` and rows `rows` of `source` resized to `width` × `height`.
pub(super) fn resize(
    source: &Picture,
    (width, height): (usize, usize),
    columns: Range<usize>,
    rows: Range<usize>,
    filter: Interpolation,
) -> Picture {
    if filter == Interpolation::Nearest {
        return nearest(source, (width, height), columns, rows);
    }
    // A pass along an axis whose size does not change is left out, not run with an identity filter: the same bits.
    let horizontal = (width != source.width).then(|| Axis::new(source.width, width, columns.clone(), filter));
    let vertical = (height != source.height).then(|| Axis::new(source.height, height, rows.clone(), filter));
    let needed_rows = vertical.as_ref().map_or(rows.clone(), Axis::needed);
    let needed_columns = horizontal.as_ref().map_or(columns.clone(), Axis::needed);
    match (horizontal, vertical) {
        (None, None) => window(source, columns, rows),
        (Some(h), None) => along_rows(source, &h, rows),
        (None, Some(v)) => along_columns(source, &v, columns),
        (Some(h), Some(v)) if columns_first((source.width, source.height), (width, height)) => {
            let between = along_columns(source, &v, needed_columns.clone());
            along_rows(&between, &h.shifted(needed_columns.start), 0..rows.len())
        }
        (Some(h), Some(v)) => {
            let between = along_rows(source, &h, needed_rows.clone());
            along_columns(&between, &v.shifted(needed_rows.start), 0..columns.len())
        }
    }
}

/// Bytes that [`resize`] takes at most beside its source (of such a width and height), its result among them.
pub(super) fn bytes_at_most(
    source: (usize, usize),
    (width, height): (usize, usize),
    columns: Range<usize>,
    rows: Range<usize>,
    filter: Interpolation,
) -> usize {
    let result = 3 * columns.len() * rows.len();
    if filter == Interpolation::Nearest {
        return result + size_of::<usize>() * (width + height);
    }
    let horizontal = (width != source.0).then(|| Axis::new(source.0, width, columns.clone(), filter));
    let vertical = (height != source.1).then(|| Axis::new(source.1, height, rows.clone(), filter));
    let between = match (&horizontal, &vertical) {
        (Some(h), Some(_)) if columns_first(source, (width, height)) => rows.len() * h.needed().len(),
        (Some(_), Some(v)) => columns.len() * v.needed().len(),
        _ => 0,
    };
    3 * between + result + [horizontal, vertical].iter().flatten().map(Axis::bytes).sum::<usize>()
}

/// Whether the pass along columns comes first: since Pillow 13, where it takes away more than twice as many rows as
/// the other takes columns. The order shows in the last bit, because the passes round in between.
fn columns_first(source: (usize, usize), (width, height): (usize, usize)) -> bool {
    let gone = |from: usize, to: usize| from as i64 - to as i64;
    let rows = gone(source.1, height);
    rows > 0 && rows > 2 * gone(source.0, width)
}

fn window(source: &Picture, columns: Range<usize>, rows: Range<usize>) -> Picture {
    let mut rgb = Vec::with_capacity(columns.len() * rows.len() * 3);
    for y in rows.clone() {
        rgb.extend_from_slice(&source.rgb[(y * source.width + columns.start) * 3..][..columns.len() * 3]);
    }
    Picture { width: columns.len(), height: rows.len(), rgb }
}

/// The rows `rows` of `source`, filtered along them.
fn along_rows(source: &Picture, axis: &Axis, rows: Range<usize>) -> Picture {
    let width = axis.range.len();
    let mut rgb = vec![0u8; width * rows.len() * 3];
    rgb.par_chunks_exact_mut(width * 3).zip(rows.clone()).for_each(|(out, y)| {
        let line = &source.rgb[y * source.width * 3..][..source.width * 3];
        for (x, pixel) in out.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            let mut sum = [1i32 << (PRECISION - 1); 3];
            let inputs = line[axis.starts[x] * 3..].as_chunks::<3>().0;
            for (input, &c) in inputs.iter().zip(axis.coefficients(x)) {
                for (s, &value) in sum.iter_mut().zip(input) {
                    *s = s.wrapping_add(i32::from(value).wrapping_mul(c));
                }
            }
            *pixel = sum.map(clip);
        }
    });
    Picture { width, height: rows.len(), rgb }
}

/// Values of a row that are summed at a time.
const AT_ONCE: usize = 768;

/// The columns `columns` of `source`, filtered along them.
fn along_columns(source: &Picture, axis: &Axis, columns: Range<usize>) -> Picture {
    let (width, line) = (columns.len(), source.width * 3);
    let mut rgb = vec![0u8; width * 3 * axis.range.len()];
    rgb.par_chunks_exact_mut(width * 3).enumerate().for_each(|(y, out)| {
        let inputs = source.rgb[axis.starts[y] * line..].chunks_exact(line);
        for (i, out) in out.chunks_mut(AT_ONCE).enumerate() {
            let mut sums = [1i32 << (PRECISION - 1); AT_ONCE];
            for (input, &c) in inputs.clone().zip(axis.coefficients(y)) {
                for (s, &value) in sums[..out.len()].iter_mut().zip(&input[columns.start * 3 + i * AT_ONCE..]) {
                    *s = s.wrapping_add(i32::from(value).wrapping_mul(c));
                }
            }
            for (o, s) in out.iter_mut().zip(sums) {
                *o = clip(s);
            }
        }
    });
    Picture { width, height: axis.range.len(), rgb }
}

/// The input pixel under the centre of each output pixel; positions are summed up as in Pillow's affine transform.
fn nearest(source: &Picture, (width, height): (usize, usize), columns: Range<usize>, rows: Range<usize>) -> Picture {
    let positions = |input: usize, output: usize| -> Vec<usize> {
        let scale = input as f64 / output as f64;
        let steps = std::iter::successors(Some(scale * 0.5), |position| Some(position + scale));
        steps.take(output).map(|position| (position as usize).min(input - 1)).collect()
    };
    let (xs, ys) = (positions(source.width, width), positions(source.height, height));
    let mut rgb = Vec::with_capacity(columns.len() * rows.len() * 3);
    for &y in &ys[rows.clone()] {
        for &x in &xs[columns.clone()] {
            rgb.extend_from_slice(&source.rgb[(y * source.width + x) * 3..][..3]);
        }
    }
    Picture { width: columns.len(), height: rows.len(), rgb }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Interpolation; 6] = [
        Interpolation::Bilinear,
        Interpolation::Bicubic,
        Interpolation::Lanczos,
        Interpolation::Box,
        Interpolation::Hamming,
        Interpolation::Nearest,
    ];

    fn picture(width: usize, height: usize) -> Picture {
        let rgb = (0..width * height * 3).map(|i| (i * i / 7 % 251) as u8).collect();
        Picture { width, height, rgb }
    }

    #[test]
    fn one_colour_stays_one_colour() {
        let source = Picture { width: 13, height: 7, rgb: [200, 0, 255].repeat(91) };
        for filter in ALL {
            for (w, h) in [(5, 3), (40, 21), (13, 2), (1, 7)] {
                assert_eq!(resize(&source, (w, h), 0..w, 0..h, filter).rgb, [200, 0, 255].repeat(w * h), "{filter:?}");
            }
        }
    }

    #[test]
    fn a_window_is_that_part_of_the_whole() {
        for source in [picture(31, 23), picture(17, 90)] {
            for (filter, (w, h)) in ALL.into_iter().flat_map(|f| [(11, 9), (64, 47), (31, 9), (9, 23)].map(|s| (f, s)))
            {
                let whole = resize(&source, (w, h), 0..w, 0..h, filter);
                let part = resize(&source, (w, h), 2..7, 3..8, filter);
                assert_eq!(part, window(&whole, 2..7, 3..8), "{filter:?} {w} {h}");
            }
        }
    }

    #[test]
    fn the_same_size_is_the_same_picture() {
        let source = picture(9, 14);
        assert!(ALL.into_iter().all(|filter| resize(&source, (9, 14), 0..9, 0..14, filter) == source));
    }

    #[test]
    fn the_pass_that_takes_much_more_away_comes_first() {
        assert!(!columns_first((48, 64), (24, 32)));
        assert!(columns_first((48, 144), (24, 72 - 1 + 24)));
        assert!(columns_first((10, 20), (30, 19)));
        assert!(!columns_first((10, 20), (30, 21)));
    }
}

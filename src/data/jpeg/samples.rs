//! From coefficients to pixels, with libjpeg's arithmetic: inverse transform, upsampling, colour.

use super::{Component, Frame, Markers, Picture};
use rayon::prelude::*;

/// How many times more coarsely a component is sampled than the picture, along rows and columns.
type Factors = (usize, usize);

/// A component's samples.
struct Plane {
    width: usize,
    height: usize,
    samples: Vec<u8>,
}

impl Plane {
    fn row(&self, y: usize) -> &[u8] {
        &self.samples[y * self.width..][..self.width]
    }
}

/// The picture of a decoded frame; nothing for a sampling that libjpeg does not upsample, or a missing table. Coefficients
/// go as their samples come, and samples are brought to the picture's size line by line: [`super::Frame::bytes_at_most`]
/// counts on both.
pub(super) fn picture(frame: Frame, markers: &Markers) -> Option<Picture> {
    let colours = Colours::of(&frame, markers)?;
    let Frame { width, height, h, v, components, .. } = frame;
    let planes: Option<Vec<(Plane, Factors)>> = components
        .into_iter()
        .map(|component| {
            let whole = h.is_multiple_of(component.h) && v.is_multiple_of(component.v);
            let factors = (h / component.h, v / component.v);
            whole.then(|| samples(component)).flatten().map(|plane| (plane, factors))
        })
        .collect();
    let planes = planes?;
    let mut rgb = vec![0u8; width * height * 3];
    let scratch = || vec![vec![0u8; width]; planes.len()];
    rgb.par_chunks_exact_mut(width * 3).enumerate().for_each_init(scratch, |lines, (y, out)| {
        let rows = planes.iter().zip(lines).map(|((plane, factors), line)| upsample(plane, *factors, y, line));
        colours.convert(&rows.collect::<Vec<&[u8]>>(), out);
    });
    Some(Picture { width, height, rgb })
}

/// The inverse transform of a component's blocks, cut to the samples that belong to the picture.
fn samples(component: Component) -> Option<Plane> {
    let table = component.table?;
    let (width, height) = (component.width, component.height);
    let mut samples = vec![0u8; width * height];
    samples.par_chunks_mut(width * 8).enumerate().for_each(|(block_row, lines)| {
        for block_column in 0..width.div_ceil(8) {
            let block = inverse_transform(component.coefficients.block(block_column, block_row), &table);
            let left = block_column * 8;
            let count = (width - left).min(8);
            for (line, values) in lines.chunks_exact_mut(width).zip(&block) {
                line[left..left + count].copy_from_slice(&values[..count]);
            }
        }
    });
    Some(Plane { width, height, samples })
}

/// The accurate integer inverse cosine transform of Loeffler, Ligtenberg and Moschytz, with 13 bits of constants and 2
/// more bits between the passes.
fn inverse_transform(coefficients: &[i16; 64], table: &[i32; 64]) -> [[u8; 8]; 8] {
    if coefficients[1..].iter().all(|&c| c == 0) {
        let level = (i32::from(coefficients[0]).wrapping_mul(table[0]).wrapping_add(4) >> 3) + 128;
        return [[level.clamp(0, 255) as u8; 8]; 8];
    }
    let mut block = [[0i32; 8]; 8];
    for (i, value) in block.as_flattened_mut().iter_mut().enumerate() {
        *value = i32::from(coefficients[i]).wrapping_mul(table[i]);
    }
    let columns = pass(&block, 13 - 2);
    let rows = pass(&transposed(&columns), 13 + 2 + 3);
    transposed(&rows).map(|row| row.map(|value| (value + 128).clamp(0, 255) as u8))
}

fn transposed(block: &[[i32; 8]; 8]) -> [[i32; 8]; 8] {
    std::array::from_fn(|y| std::array::from_fn(|x| block[x][y]))
}

/// One pass over all eight columns at once: `block[k][c]` is frequency k of column c; `shift` bits are rounded off.
fn pass(block: &[[i32; 8]; 8], shift: u32) -> [[i32; 8]; 8] {
    let mut out = [[0i32; 8]; 8];
    for c in 0..8 {
        let f = |k: usize| block[k][c];
        let mul = |a: i32, b: i32| a.wrapping_mul(b);
        let z1 = mul(f(2).wrapping_add(f(6)), 4433);
        let even2 = z1.wrapping_sub(mul(f(6), 15137));
        let even3 = z1.wrapping_add(mul(f(2), 6270));
        let even0 = f(0).wrapping_add(f(4)) << 13;
        let even1 = f(0).wrapping_sub(f(4)) << 13;
        let even = [
            even0.wrapping_add(even3),
            even1.wrapping_add(even2),
            even1.wrapping_sub(even2),
            even0.wrapping_sub(even3),
        ];
        let z5 = mul(f(7).wrapping_add(f(3)).wrapping_add(f(5)).wrapping_add(f(1)), 9633);
        let z1 = mul(f(7).wrapping_add(f(1)), -7373);
        let z2 = mul(f(5).wrapping_add(f(3)), -20995);
        let z3 = mul(f(7).wrapping_add(f(3)), -16069).wrapping_add(z5);
        let z4 = mul(f(5).wrapping_add(f(1)), -3196).wrapping_add(z5);
        let odd = [
            mul(f(1), 12299).wrapping_add(z1).wrapping_add(z4),
            mul(f(3), 25172).wrapping_add(z2).wrapping_add(z3),
            mul(f(5), 16819).wrapping_add(z2).wrapping_add(z4),
            mul(f(7), 2446).wrapping_add(z1).wrapping_add(z3),
        ];
        let half = 1 << (shift - 1);
        for k in 0..4 {
            out[k][c] = even[k].wrapping_add(odd[k]).wrapping_add(half) >> shift;
            out[7 - k][c] = even[k].wrapping_sub(odd[k]).wrapping_add(half) >> shift;
        }
    }
    out
}

/// Line `y` of the picture, of a component sampled `h` × `v` times more coarsely; `line` is for it. Doubling is by a
/// triangle filter (three parts of the nearer sample and one of the other), other factors repeat samples.
fn upsample<'a>(plane: &'a Plane, (h, v): Factors, y: usize, line: &'a mut [u8]) -> &'a [u8] {
    let near = plane.row(y / v);
    // The other row that a doubled row lies next to; at the border the same one.
    let even = y.is_multiple_of(2);
    let other = || plane.row(if even { (y / 2).saturating_sub(1) } else { (y / 2 + 1).min(plane.height - 1) });
    let smooth_columns = h == 2 && plane.width > 2;
    match (h, v) {
        (1, 1) => return near,
        (2, 1) if smooth_columns => {
            let row: Vec<i32> = near.iter().map(|&s| i32::from(s)).collect();
            double(&row, line, (1, 2), 2);
        }
        (2, 2) if smooth_columns => {
            let row: Vec<i32> = near.iter().zip(other()).map(|(&a, &b)| 3 * i32::from(a) + i32::from(b)).collect();
            double(&row, line, (8, 7), 4);
        }
        (1, 2) => {
            let bias = if even { 1 } else { 2 };
            for ((o, &a), &b) in line.iter_mut().zip(near).zip(other()) {
                *o = ((3 * i32::from(a) + i32::from(b) + bias) >> 2) as u8;
            }
        }
        _ => {
            for (x, o) in line.iter_mut().enumerate() {
                *o = near[x / h];
            }
        }
    }
    line
}

/// Doubles a row of sums: each output is three parts of its own sum and one of the neighbour's, plus a bias (of the left
/// and of the right output), less `shift` bits. At both ends the sum stands for its missing neighbour.
fn double(row: &[i32], out: &mut [u8], (left, right): (i32, i32), shift: u32) {
    let mut before = row[0];
    for (x, (pair, &own)) in out.chunks_mut(2).zip(row).enumerate() {
        let after = row.get(x + 1).copied().unwrap_or(own);
        pair[0] = ((3 * own + before + left) >> shift) as u8;
        if let Some(second) = pair.get_mut(1) {
            *second = ((3 * own + after + right) >> shift) as u8;
        }
        before = own;
    }
}

/// What the components of a pixel are.
#[derive(Clone, Copy)]
enum Colours {
    Grey,
    Rgb,
    Ycc,
    Cmyk,
    Ycck,
}

impl Colours {
    /// By libjpeg's rules.
    fn of(frame: &Frame, markers: &Markers) -> Option<Colours> {
        let named_rgb = || frame.components.iter().map(|c| c.id).eq(*b"RGB");
        match (frame.components.len(), markers.jfif, markers.adobe) {
            (1, ..) => Some(Colours::Grey),
            (3, false, Some(0)) => Some(Colours::Rgb),
            (3, false, None) if named_rgb() => Some(Colours::Rgb),
            (3, ..) => Some(Colours::Ycc),
            (4, _, Some(1..)) => Some(Colours::Ycck),
            (4, ..) => Some(Colours::Cmyk),
            _ => None,
        }
    }

    /// A line of the picture from the same line of each component.
    fn convert(self, planes: &[&[u8]], line: &mut [u8]) {
        let pixels = line.as_chunks_mut::<3>().0.iter_mut();
        match (self, planes) {
            (Colours::Grey, [grey]) => pixels.zip(*grey).for_each(|(p, &g)| *p = [g; 3]),
            (Colours::Rgb, [r, g, b]) => {
                pixels.zip(*r).zip(*g).zip(*b).for_each(|(((p, &r), &g), &b)| *p = [r, g, b]);
            }
            (Colours::Ycc, [y, cb, cr]) => {
                pixels.zip(*y).zip(*cb).zip(*cr).for_each(|(((p, &y), &cb), &cr)| *p = ycc_to_rgb(y, cb, cr));
            }
            (kind, [a, b, c, k]) => {
                for ((((p, &a), &b), &c), &k) in pixels.zip(*a).zip(*b).zip(*c).zip(*k) {
                    let ink = match kind {
                        Colours::Ycck => ycc_to_rgb(a, b, c).map(|v| 255 - v),
                        _ => [a, b, c],
                    };
                    *p = cmyk_to_rgb(ink, k);
                }
            }
            _ => {}
        }
    }
}

/// ITU-R BT.601 with 16 bits of constants.
fn ycc_to_rgb(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    const HALF: i32 = 1 << 15;
    let red = y + ((91881 * cr + HALF) >> 16);
    let green = y + ((-22554 * cb - 46802 * cr + HALF) >> 16);
    let blue = y + ((116130 * cb + HALF) >> 16);
    [red, green, blue].map(|v| v.clamp(0, 255) as u8)
}

/// Pillow's conversion, which takes stored values as inverted, as Adobe's programs write them.
fn cmyk_to_rgb(ink: [u8; 3], k: u8) -> [u8; 3] {
    let white = i32::from(k);
    ink.map(|v| {
        let product = i32::from(255 - v) * white + 128;
        (white - ((product + (product >> 8)) >> 8)).clamp(0, 255) as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_integer_transform_follows_the_cosine_transform() {
        let mut coefficients = [0i16; 64];
        for (i, c) in coefficients.iter_mut().enumerate() {
            *c = ((i * 37 + 11) % 41) as i16 - 20;
        }
        let block = inverse_transform(&coefficients, &[2; 64]);
        let scale = |k: usize| if k == 0 { 0.5f64.sqrt() } else { 1.0 };
        let wave = |x: usize, k: usize| ((2 * x + 1) as f64 * k as f64 * std::f64::consts::PI / 16.0).cos();
        for (y, row) in block.iter().enumerate() {
            for (x, &value) in row.iter().enumerate() {
                let sum: f64 = (0..64)
                    .map(|i| {
                        let (v, u) = (i / 8, i % 8);
                        2.0 * f64::from(coefficients[i]) * scale(u) * scale(v) * wave(x, u) * wave(y, v) / 4.0
                    })
                    .sum();
                assert!((f64::from(value) - (sum + 128.0).clamp(0.0, 255.0)).abs() <= 1.0, "({x}, {y})");
            }
        }
    }

    #[test]
    fn a_constant_block_takes_no_transform_but_has_its_value() {
        let mut coefficients = [0i16; 64];
        for level in [-1100, -37, 0, 5, 1020] {
            coefficients[0] = level;
            let short = inverse_transform(&coefficients, &[3; 64]);
            let mut block = [[0i32; 8]; 8];
            block[0][0] = i32::from(level) * 3;
            let long = pass(&transposed(&pass(&block, 11)), 18)[4][2];
            assert_eq!(i32::from(short[2][4]), (long + 128).clamp(0, 255));
        }
    }

    #[test]
    fn doubling_leans_to_the_nearer_sample_and_stops_at_the_ends() {
        let mut out = [0u8; 7];
        double(&[0, 100, 200, 40], &mut out, (1, 2), 2);
        assert_eq!(out, [0, 25, 75, 125, 175, 160, 80]);
    }
}

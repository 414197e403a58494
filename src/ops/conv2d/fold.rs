//! The data gradient where the input has few channels: one product for all taps, whose rows are then shifted and summed.
//! A product over patches would pack every pixel of dy once per tap and use it for a handful of rows.

use super::patches::Window;
use crate::ops::cpu::for_parts;
use crate::ops::gemm::Scalar;

/// Adds up (images, channels x taps, output pixels) to (images, channels, input pixels): the reverse of taking patches,
/// with the window of the forward. Taps are added in order.
pub fn fold<T: Scalar>(products: &[f32], window: Window) -> Vec<T> {
    let (products_of_plane, size) = (window.pixels() * window.taps(), window.input.0 * window.input.1);
    let mut folded = vec![T::from_f32(0.0); products.len() / products_of_plane * size];
    let parts: Vec<_> = products.chunks_exact(products_of_plane).zip(folded.chunks_exact_mut(size)).collect();
    for_parts(parts, products.len(), |_, (products, to)| fold_plane(products, window, to));
    folded
}

fn fold_plane<T: Scalar>(products: &[f32], window: Window, to: &mut [T]) {
    let (height, width) = window.input;
    let mut sums = vec![0f32; height * width];
    for (tap, product) in products.chunks_exact(window.pixels()).enumerate() {
        let (down, right) = (window.top + (tap / window.taps.1) as isize, window.left + (tap % window.taps.1) as isize);
        for (y, line) in product.chunks_exact(window.output.1).enumerate() {
            let row = (y * window.stride) as isize + down;
            if !(0..height as isize).contains(&row) {
                continue;
            }
            let sums = &mut sums[row as usize * width..][..width];
            // The outputs whose input lies inside the line: from <= x * stride + right < width.
            let first = (-right).max(0).cast_unsigned().div_ceil(window.stride).min(line.len());
            let begin = ((first * window.stride) as isize + right).max(0) as usize;
            if window.stride == 1 {
                let sums = sums.get_mut(begin..).unwrap_or_default();
                sums.iter_mut().zip(&line[first..]).for_each(|(sum, x)| *sum += x);
            } else {
                let places = (begin..width).step_by(window.stride);
                places.zip(&line[first..]).for_each(|(at, x)| sums[at] += x);
            }
        }
    }
    to.iter_mut().zip(sums).for_each(|(to, sum)| *to = T::from_f32(sum));
}

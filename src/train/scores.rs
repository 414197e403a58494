//! Two numbers that say whether a run is a success: how near pictures of the subject come to its photographs, and how
//! far the class has drifted from what it was. Both compare pixels, so they need no other network and are the same
//! everywhere; they are for watching one run, not for comparing models.

use image::RgbImage;

/// Levels of each colour that a histogram tells apart.
const LEVELS: usize = 6;

/// How near `made` come to `subject`: how much of the colours that all photographs have in common (the subject's, where
/// their grounds differ) a picture has, too, on average; from 0 to 1. None without pictures, or if the photographs have
/// nothing in common.
pub fn likeness(made: &[RgbImage], subject: &[RgbImage]) -> Option<f64> {
    let smaller = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(&b).map(|(a, b)| a.min(*b)).collect();
    let common: Vec<f64> = subject.iter().map(histogram).reduce(smaller)?;
    let whole: f64 = common.iter().sum();
    let share = |image: &RgbImage| {
        let found = histogram(image).iter().zip(&common).map(|(a, b)| a.min(*b)).sum::<f64>();
        found / whole
    };
    (!made.is_empty() && whole > 0.0).then(|| made.iter().map(share).sum::<f64>() / made.len() as f64)
}

/// How far the class's pictures are from those of the same noise before training: the mean difference in 8-bit levels.
/// None if there are not equally many of the same size.
pub fn drift(made: &[RgbImage], before: &[RgbImage]) -> Option<f64> {
    let alike = made.len() == before.len() && made.iter().zip(before).all(|(a, b)| a.dimensions() == b.dimensions());
    let difference = |(a, b): (&RgbImage, &RgbImage)| {
        let sum: u64 = a.iter().zip(b.iter()).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        sum as f64 / a.as_raw().len() as f64
    };
    (alike && !made.is_empty()).then(|| made.iter().zip(before).map(difference).sum::<f64>() / made.len() as f64)
}

/// The share of the picture's pixels near each colour. A pixel counts for all levels it is between, and levels count for
/// their neighbours, so that a colour that is a little off is nearly the same.
fn histogram(image: &RgbImage) -> Vec<f64> {
    let mut bins = vec![0f64; LEVELS * LEVELS * LEVELS];
    let one = 1.0 / f64::from(image.width() * image.height());
    for pixel in image.pixels() {
        let place = pixel.0.map(|c| f64::from(c) / 255.0 * (LEVELS - 1) as f64);
        for corner in 0..8 {
            let mut weight = one;
            let mut bin = 0;
            for (c, place) in place.into_iter().enumerate() {
                let below = (place as usize).min(LEVELS - 2);
                let above = corner >> c & 1;
                let part = place - below as f64;
                weight *= if above == 1 { part } else { 1.0 - part };
                bin = bin * LEVELS + below + above;
            }
            bins[bin] += weight;
        }
    }
    for stride in [1, LEVELS, LEVELS * LEVELS] {
        bins = blurred(&bins, stride);
    }
    bins
}

/// Half of each level stays, a quarter goes to each neighbour along one colour; at the ends it stays.
fn blurred(bins: &[f64], stride: usize) -> Vec<f64> {
    let mut out = vec![0f64; bins.len()];
    for (i, value) in bins.iter().enumerate() {
        let level = i / stride % LEVELS;
        let below = if level > 0 { i - stride } else { i };
        let above = if level + 1 < LEVELS { i + stride } else { i };
        out[i] += value / 2.0;
        out[below] += value / 4.0;
        out[above] += value / 4.0;
    }
    out
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use image::Rgb;

    use super::*;

    fn half(left: [u8; 3], right: [u8; 3]) -> RgbImage {
        RgbImage::from_fn(8, 4, |x, _| Rgb(if x < 4 { left } else { right }))
    }

    #[test]
    fn likeness_is_of_the_colours_that_all_photographs_share() {
        let (red, blue, green, white) = ([255, 0, 0], [0, 0, 255], [0, 255, 0], [255; 3]);
        // Red on different grounds.
        let subject = [half(red, blue), half(green, red)];
        let of = |image| likeness(&[image], &subject).unwrap();
        assert!(of(half(white, red)) > 0.99 && of(half(red, red)) > 0.99);
        assert!(of(half(blue, green)) < 0.1 && of(half(white, white)) < 0.1);
        // A colour a little off is nearly the same; a smaller subject counts for less.
        assert!(of(half([240, 10, 5], blue)) > 0.85);
        let quarter = RgbImage::from_fn(8, 4, |x, _| Rgb(if x < 2 { red } else { white }));
        assert!((0.4..0.6).contains(&of(quarter)));
        let mean = likeness(&[half(red, red), half(white, white)], &subject).unwrap();
        assert!((0.49..0.56).contains(&mean));
        assert_eq!(likeness(&[], &subject), None);
        assert_eq!(likeness(&[half(red, red)], &[]), None);
        let sum: f64 = histogram(&half([13, 77, 200], [255, 254, 1])).iter().sum();
        assert!((sum - 1.0).abs() < 1e-12);
    }

    #[test]
    fn drift_is_in_levels() {
        let (a, b) = (half([10, 10, 10], [0, 0, 0]), half([10, 10, 10], [30, 0, 0]));
        assert_eq!(drift(from_ref(&a), from_ref(&b)), Some(5.0));
        assert_eq!(drift(from_ref(&a), from_ref(&a)), Some(0.0));
        assert_eq!(drift(&[a.clone(), b], from_ref(&a)), None);
    }
}

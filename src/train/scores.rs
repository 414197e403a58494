//! Two numbers that say whether a run is a success: how near pictures of the subject come to its photographs, and how
//! far the class has drifted from what it was. Both compare pixels, so they need no other network and are the same
//! everywhere; they are for watching one run, not for comparing models.

use image::RgbImage;

/// Levels of each colour that a histogram tells apart.
const LEVELS: usize = 6;

/// How near `made` come to `subject`: for each picture the largest share of its colours that it has in common with one
/// of the photographs (intersection of colour histograms), on average; from 0 to 1. None without pictures.
pub fn likeness(made: &[RgbImage], subject: &[RgbImage]) -> Option<f64> {
    let photographs: Vec<Vec<f64>> = subject.iter().map(histogram).collect();
    let nearest = |image: &RgbImage| {
        let colours = histogram(image);
        let shared = |photograph: &Vec<f64>| photograph.iter().zip(&colours).map(|(a, b)| a.min(*b)).sum::<f64>();
        photographs.iter().map(shared).fold(0.0, f64::max)
    };
    (!made.is_empty() && !subject.is_empty()).then(|| made.iter().map(nearest).sum::<f64>() / made.len() as f64)
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

/// The share of the picture's pixels near each colour; a pixel between colours counts for all it is between.
fn histogram(image: &RgbImage) -> Vec<f64> {
    let mut bins = vec![0f64; LEVELS * LEVELS * LEVELS];
    let one = 1.0 / (image.width() * image.height()) as f64;
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
    bins
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    fn half(left: [u8; 3], right: [u8; 3]) -> RgbImage {
        RgbImage::from_fn(8, 4, |x, _| Rgb(if x < 4 { left } else { right }))
    }

    #[test]
    fn likeness_is_the_share_of_common_colours() {
        let (red, blue, green) = ([255, 0, 0], [0, 0, 255], [0, 255, 0]);
        let subject = [half(red, blue), half(green, green)];
        let of = |image| (likeness(&[image], &subject).unwrap() * 1000.0).round() / 1000.0;
        assert_eq!(of(half(blue, red)), 1.0);
        assert_eq!(of(half(red, red)), 0.5);
        assert_eq!(of(half([255; 3], [255; 3])), 0.0);
        // A colour a little off is nearly the same.
        assert!(of(half([250, 5, 0], blue)) > 0.9);
        assert_eq!(likeness(&[half(red, red), half(blue, red)], &subject).map(|x| (x * 100.0).round()), Some(75.0));
        assert_eq!(likeness(&[], &subject), None);
        let sum: f64 = histogram(&half([13, 77, 200], [255, 254, 1])).iter().sum();
        assert!((sum - 1.0).abs() < 1e-12);
    }

    #[test]
    fn drift_is_in_levels() {
        let (a, b) = (half([10, 10, 10], [0, 0, 0]), half([10, 10, 10], [30, 0, 0]));
        assert_eq!(drift(&[a.clone()], &[b.clone()]), Some(5.0));
        assert_eq!(drift(&[a.clone()], &[a.clone()]), Some(0.0));
        assert_eq!(drift(&[a.clone(), b], &[a]), None);
    }
}

//! Numbers over steps: smoothing, thinning to what a screen can show, and the range worth showing.

/// A number at a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    pub step: f64,
    pub value: f64,
}

/// Steps that the smoothed line averages over: about a twelfth of the run, from 5 to 100.
pub fn smoothing_span(steps: usize) -> usize {
    (steps / 12).clamp(5, 100)
}

/// The exponential moving average whose weights reach back about `span` points, corrected for its start as in Adam.
/// Values that are no numbers are passed over.
pub fn smoothed(points: &[Point], span: usize) -> Vec<Point> {
    let keep = 1.0 - 2.0 / (span as f64 + 1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let finite = points.iter().filter(|point| point.value.is_finite());
    finite
        .map(|point| {
            sum = keep * sum + (1.0 - keep) * point.value;
            weight = keep * weight + (1.0 - keep);
            Point { step: point.step, value: sum / weight }
        })
        .collect()
}

/// At most `2 * buckets + 2` of `points` (in order of their steps), which draw the same picture: the first and last, and
/// the lowest and highest of each of `buckets` equal ranges of steps. What is no number is left out.
pub fn decimated(points: &[Point], buckets: usize) -> Vec<Point> {
    let finite: Vec<Point> = points.iter().copied().filter(|point| point.value.is_finite()).collect();
    let (Some(first), Some(last)) = (finite.first(), finite.last()) else { return Vec::new() };
    if finite.len() <= 2 * buckets {
        return finite;
    }
    let per_step = buckets as f64 / (last.step - first.step);
    let bucket = |point: &Point| (((point.step - first.step) * per_step) as usize).min(buckets - 1);
    let mut kept = vec![*first];
    for group in finite.chunk_by(|a, b| bucket(a) == bucket(b)) {
        let lowest = group.iter().min_by(|a, b| a.value.total_cmp(&b.value));
        let highest = group.iter().max_by(|a, b| a.value.total_cmp(&b.value));
        if let (Some(&lowest), Some(&highest)) = (lowest, highest) {
            let pair = if lowest.step <= highest.step { [lowest, highest] } else { [highest, lowest] };
            kept.extend(pair.into_iter().filter(|point| point.step > first.step && point.step < last.step));
        }
    }
    kept.push(*last);
    kept.dedup_by(|a, b| a.step == b.step);
    kept
}

/// The range to show, and how many values lie outside: all of it, unless a few values are so far off that the others
/// would be a flat line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Extent {
    pub low: f64,
    pub high: f64,
    pub above: usize,
    pub below: usize,
}

pub fn extent(values: impl Iterator<Item = f64>) -> Option<Extent> {
    let mut sorted: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let (&least, &most) = (sorted.first()?, sorted.last()?);
    let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
    let (low, high) = (at(0.01), at(0.99));
    let spread = high - low;
    let far = |gap: f64| spread > 0.0 && sorted.len() >= 50 && gap > 4.0 * spread;
    let high = if far(most - high) { high + 0.5 * spread } else { most };
    let low = if far(low - least) { low - 0.5 * spread } else { least };
    let above = sorted.iter().filter(|value| **value > high).count();
    let below = sorted.iter().filter(|value| **value < low).count();
    Some(Extent { low, high, above, below })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(values: impl IntoIterator<Item = f64>) -> Vec<Point> {
        values.into_iter().enumerate().map(|(i, value)| Point { step: i as f64 + 1.0, value }).collect()
    }

    /// A line with noise and single peaks.
    fn noisy(n: usize) -> Vec<Point> {
        points((0..n).map(|i| (i as f64 * 0.7).sin() + if i % 997 == 3 { 9.0 } else { 0.0 } - i as f64 / n as f64))
    }

    #[test]
    fn thinning_keeps_ends_and_extremes_and_is_small() {
        let all = noisy(30_000);
        let thin = decimated(&all, 600);
        assert!(thin.len() <= 1202 && thin.len() > 900);
        assert_eq!((thin[0], thin[thin.len() - 1]), (all[0], all[all.len() - 1]));
        assert!(thin.windows(2).all(|pair| pair[0].step < pair[1].step));
        assert!(thin.iter().all(|point| all[point.step as usize - 1] == *point));
        for part in all.chunks(1000) {
            let most = |points: &[Point]| points.iter().map(|point| point.value).fold(f64::MIN, f64::max);
            let (from, to) = (part[0].step, part[part.len() - 1].step);
            let shown: Vec<Point> = thin.iter().copied().filter(|p| (from..=to).contains(&p.step)).collect();
            assert_eq!(most(part), most(&shown));
        }
    }

    #[test]
    fn short_series_stay_whole_and_holes_are_left_out() {
        let few = noisy(50);
        assert_eq!(decimated(&few, 600), few);
        assert_eq!(decimated(&points([1.0, f64::NAN, 3.0]), 600).len(), 2);
        assert!(decimated(&points([f64::NAN]), 600).is_empty() && decimated(&[], 600).is_empty());
    }

    #[test]
    fn smoothing_follows_a_constant_from_the_start_and_damps_noise() {
        let constant = smoothed(&points([2.0; 20]), 5);
        assert!(constant.iter().all(|point| (point.value - 2.0).abs() < 1e-12));
        let waves = smoothed(&points((0..400).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 })), 50);
        assert!(waves[200..].iter().all(|point| point.value.abs() < 0.05));
        let over_hole = smoothed(&points([1.0, f64::INFINITY, 1.0]), 5);
        assert_eq!(over_hole.last(), Some(&Point { step: 3.0, value: 1.0 }));
    }

    #[test]
    fn a_few_far_values_do_not_flatten_the_rest() {
        let mut values: Vec<f64> = (0..200).map(|i| 1.0 + (i % 10) as f64 / 10.0).collect();
        let plain = extent(values.iter().copied()).unwrap();
        assert_eq!((plain.low, plain.high, plain.above, plain.below), (1.0, 1.9, 0, 0));
        values[50] = 1e6;
        let clipped = extent(values.iter().copied()).unwrap();
        assert!(clipped.high < 3.0 && clipped.above == 1 && clipped.below == 0, "{clipped:?}");
        assert_eq!(extent([f64::NAN].into_iter()), None);
        assert_eq!(extent([5.0].into_iter()).unwrap().high, 5.0);
    }
}

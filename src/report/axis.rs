//! Axes: where a number lies between 0 and 1, and the ticks with round labels.

use super::number;

/// An axis over `low..=high`, with ticks at round numbers within it.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    pub low: f64,
    pub high: f64,
    pub logarithmic: bool,
    pub ticks: Vec<Tick>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Tick {
    /// Between 0 (low) and 1 (high).
    pub place: f64,
    pub label: String,
}

impl Axis {
    /// Steps: ends where the data ends, ticks at whole numbers.
    pub fn steps(low: f64, high: f64) -> Axis {
        let high = if high > low { high } else { low + 1.0 };
        let gap = round_gap((high - low) / 5.0).max(1.0);
        Axis::linear(low, high, gap, number::value)
    }

    /// Values: ends at round numbers around the data.
    pub fn values(low: f64, high: f64) -> Axis {
        let (low, high) = apart(low, high);
        let gap = round_gap((high - low) / 4.0);
        let (low, high) = ((low / gap + 1e-9).floor() * gap, (high / gap - 1e-9).ceil() * gap);
        let tiny = low.abs().max(high.abs()) < 1e-2;
        let decimals = (-gap.log10()).ceil().clamp(0.0, 12.0) as usize;
        // A gap of 2.5 needs one digit more than its size says.
        let decimals = decimals + usize::from((gap * 10f64.powi(decimals as i32)).fract() > 1e-6);
        let label = |value: f64| match tiny {
            true => number::exponential(value),
            false => number::grouped(&format!("{value:.decimals$}")).replace('-', "−"),
        };
        Axis::linear(low, high, gap, label)
    }

    /// Values over several powers of ten, all above 0.
    pub fn powers(low: f64, high: f64) -> Axis {
        let (low, high) = (low.log10().floor() as i32, high.log10().ceil() as i32);
        let high = high.max(low + 1);
        let apart = ((high - low) as usize).div_ceil(5).max(1);
        let span = f64::from(high - low);
        let label = if low < -3 { number::exponential } else { number::value };
        let powers = (low..=high).step_by(apart);
        let ticks = powers
            .map(|power| Tick { place: f64::from(power - low) / span, label: label(10f64.powi(power)) })
            .collect();
        Axis { low: 10f64.powi(low), high: 10f64.powi(high), logarithmic: true, ticks }
    }

    fn linear(low: f64, high: f64, gap: f64, label: impl Fn(f64) -> String) -> Axis {
        let (first, last) = ((low / gap - 1e-6).ceil() as i64, (high / gap + 1e-6).floor() as i64);
        let ticks = (first..=last)
            .map(|n| n as f64 * gap)
            .map(|value| Tick { place: (value - low) / (high - low), label: label(value) })
            .collect();
        Axis { low, high, logarithmic: false, ticks }
    }

    /// Where `value` lies: 0 at the low end, 1 at the high one, beyond them as far as it is.
    pub fn place(&self, value: f64) -> f64 {
        match self.logarithmic {
            true => (value / self.low).log10() / (self.high / self.low).log10(),
            false => (value - self.low) / (self.high - self.low),
        }
    }
}

/// Ends that are some way apart.
fn apart(low: f64, high: f64) -> (f64, f64) {
    if high - low > 1e-9 * high.abs().max(low.abs()) {
        (low, high)
    } else if low == 0.0 {
        (0.0, 1.0)
    } else {
        let room = low.abs() * 0.1;
        (low - room, high + room)
    }
}

/// The next of 1, 2, 2.5, 5 times a power of ten from `least` on.
fn round_gap(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let fits = [1.0, 2.0, 2.5, 5.0].into_iter().find(|factor| factor * power >= least * (1.0 - 1e-9));
    fits.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|tick| tick.label.as_str()).collect()
    }

    #[test]
    fn ticks_are_round_and_within_the_axis() {
        assert_eq!(labels(&Axis::steps(1.0, 60.0)), ["20", "40", "60"]);
        assert_eq!(labels(&Axis::steps(0.0, 10_000.0)), ["0", "2,000", "4,000", "6,000", "8,000", "10,000"]);
        assert_eq!(labels(&Axis::values(0.85, 2.34)), ["0.5", "1.0", "1.5", "2.0", "2.5"]);
        assert_eq!(labels(&Axis::values(0.0, 5e-6)), ["0", "2e−6", "4e−6", "6e−6"]);
        assert_eq!(labels(&Axis::values(0.0, 1e-3)), ["0", "2.5e−4", "5e−4", "7.5e−4", "1e−3"]);
        assert_eq!(labels(&Axis::values(0.0, 0.9)), ["0.00", "0.25", "0.50", "0.75", "1.00"]);
        assert_eq!(labels(&Axis::values(-0.3, 0.3)), ["−0.4", "−0.2", "0.0", "0.2", "0.4"]);
        assert_eq!(labels(&Axis::values(0.0, 12_000.0)), ["0", "5,000", "10,000", "15,000"]);
        assert_eq!(labels(&Axis::powers(0.02, 300.0)), ["0.01", "0.1", "1", "10", "100", "1,000"]);
        assert_eq!(labels(&Axis::powers(1e-5, 1e-2)), ["1e−5", "1e−4", "1e−3", "1e−2"]);
    }

    #[test]
    fn any_data_has_an_axis() {
        for (low, high) in [(0.0, 0.0), (3.0, 3.0), (-2.0, -2.0), (1e-300, 1e-300), (-1e9, 1e12), (0.1, 0.1 + 1e-17)] {
            let axis = Axis::values(low, high);
            assert!((2..=7).contains(&axis.ticks.len()), "{low} to {high}: {axis:?}");
            assert!(axis.low <= low && axis.high >= high && axis.high > axis.low, "{axis:?}");
            assert!(axis.ticks.iter().all(|tick| (-1e-6..=1.0 + 1e-6).contains(&tick.place)), "{axis:?}");
        }
        assert_eq!(labels(&Axis::steps(7.0, 7.0)), ["7", "8"]);
    }

    #[test]
    fn places_run_from_end_to_end() {
        let axis = Axis::values(0.0, 8.0);
        assert_eq!((axis.place(0.0), axis.place(4.0), axis.place(8.0)), (0.0, 0.5, 1.0));
        let axis = Axis::powers(0.1, 10.0);
        assert_eq!((axis.place(0.1), axis.place(10.0)), (0.0, 1.0));
        assert!((axis.place(1.0) - 0.5).abs() < 1e-12);
    }
}

//! Time steps as features.

use super::UnetConfig;

/// Sinusoids of the time steps, (timesteps, c0) row by row, c0 the channels of the UNet's first block: cosines and
/// sines of t * exp(-ln(10000) i / (c0/2 - freq_shift)), in fp32 at every step as the peer's `get_timestep_embedding`.
///
/// Time steps are whole in training; some samplers ask in between.
pub fn time_features(timesteps: impl IntoIterator<Item = f32>, config: &UnetConfig) -> Vec<f32> {
    let width = config.levels[0].channels;
    let half = width / 2;
    let frequencies: Vec<f32> = (0..half)
        .map(|i| {
            let exponent = -(10000f64.ln()) as f32 * i as f32 / (half as f64 - config.freq_shift) as f32;
            // Through f64 for one rounding on every platform.
            f64::from(exponent).exp() as f32
        })
        .collect();
    let mut features = Vec::new();
    for t in timesteps {
        let angles = || frequencies.iter().map(|f| f64::from(t * f));
        if config.flip_sin_to_cos {
            features.extend(angles().map(|a| a.cos() as f32));
            features.extend(angles().map(|a| a.sin() as f32));
        } else {
            features.extend(angles().map(|a| a.sin() as f32));
            features.extend(angles().map(|a| a.cos() as f32));
        }
        // An odd width is filled up with a zero.
        features.extend(std::iter::repeat_n(0.0, width % 2));
    }
    features
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_shift_and_values() {
        let mut config = UnetConfig::sd15_shape();
        config.levels[0].channels = 4;
        let features = time_features([0.0, 500.0], &config);
        assert_eq!(features[..4], [1.0, 1.0, 0.0, 0.0]);
        let expected = [500f64.cos(), 5f64.cos(), 500f64.sin(), 5f64.sin()];
        for (got, want) in features[4..].iter().zip(expected) {
            assert!((f64::from(*got) - want).abs() < 1e-6, "{got} {want}");
        }
        config.flip_sin_to_cos = false;
        config.freq_shift = 1.0;
        let features = time_features([2.0], &config);
        let slow = 2e-4f64;
        for (got, want) in features.iter().zip([2f64.sin(), slow.sin(), 2f64.cos(), slow.cos()]) {
            assert!((f64::from(*got) - want).abs() < 1e-6, "{got} {want}");
        }
    }
}

//! What a row of a batch needs before the network runs: the latent sampled from the VAE's posterior, the offset noise,
//! the noisy input and the target. One row at a time, so a rank prepares just its own.

use super::schedule::{NoiseSchedule, Prediction};

/// x0 = (mean + std·η)·scaling_factor with std = exp(½·logvar), logvar clamped to [−30, 20], as the peer's
/// `DiagonalGaussianDistribution` samples. `moments`: the mean's (C, h, w) values, then the log-variance's; `eta` and
/// `out`: (C, h, w).
pub fn sample_latent(moments: &[f32], eta: &[f32], scaling_factor: f32, out: &mut [f32]) {
    assert!(moments.len() == 2 * out.len() && eta.len() == out.len(), "a row and its posterior of different sizes");
    let (mean, logvar) = moments.split_at(out.len());
    for (((o, &m), &l), &e) in out.iter_mut().zip(mean).zip(logvar).zip(eta) {
        let std = f64::from(0.5 * l.clamp(-30.0, 20.0)).exp() as f32;
        *o = (m + std * e) * scaling_factor;
    }
}

/// ε ← ε + strength·ξ, one ξ a channel. `eps`: (C, h, w); `xi`: (C). The sum is the target of ε-prediction too.
pub fn add_offset_noise(eps: &mut [f32], xi: &[f32], strength: f32) {
    assert!(!xi.is_empty() && eps.len().is_multiple_of(xi.len()), "offset noise of another number of channels");
    let plane = eps.len() / xi.len();
    for (channel, &x) in eps.chunks_mut(plane).zip(xi) {
        let offset = strength * x;
        channel.iter_mut().for_each(|e| *e += offset);
    }
}

/// The network's noisy input x_t and the training target (ε or v, as the schedule predicts) of a row; `eps` with its
/// offset already added. All slices have the row's length.
pub fn noisy_and_target(
    schedule: &NoiseSchedule,
    t: usize,
    x0: &[f32],
    eps: &[f32],
    noisy: &mut [f32],
    target: &mut [f32],
) {
    schedule.add_noise(t, x0, eps, noisy);
    match schedule.prediction() {
        Prediction::Epsilon => target.copy_from_slice(eps),
        Prediction::Velocity => schedule.velocity(t, x0, eps, target),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_posterior_s_log_variance_is_clamped_on_both_sides() {
        let moments = [1.0, 1.0, 1.0, 0.0, -1e6, 1e6];
        let mut out = [0f32; 3];
        sample_latent(&moments, &[2.0, 2.0, 2.0], 0.5, &mut out);
        assert_eq!(out[0], 1.5);
        assert_eq!(out[1], (1.0 + (-15f64).exp() as f32 * 2.0) * 0.5);
        assert_eq!(out[2], (1.0 + 10f64.exp() as f32 * 2.0) * 0.5);
    }

    #[test]
    fn offset_noise_shifts_whole_channels_and_is_part_of_the_target() {
        let schedule = NoiseSchedule::from_config(&json!({})).unwrap();
        let mut eps = vec![0.5, 1.0, -1.0, 2.0];
        add_offset_noise(&mut eps, &[1.0, -2.0], 0.1);
        assert_eq!(eps, [0.5 + 0.1, 1.0 + 0.1, -1.0 - 0.2, 2.0 - 0.2]);
        let (mut noisy, mut target) = (vec![0f32; 4], vec![0f32; 4]);
        noisy_and_target(&schedule, 999, &[0.0; 4], &eps, &mut noisy, &mut target);
        assert_eq!(target, eps);
        let (_, share) = schedule.coefficients(999);
        assert_eq!(noisy[0], share * eps[0]);
    }

    #[test]
    fn v_prediction_s_target_is_the_velocity() {
        let schedule = NoiseSchedule::from_config(&json!({"prediction_type": "v_prediction"})).unwrap();
        let (mut noisy, mut target) = ([0f32; 1], [0f32; 1]);
        noisy_and_target(&schedule, 500, &[2.0], &[3.0], &mut noisy, &mut target);
        let (signal, noise) = schedule.coefficients(500);
        assert_eq!(target[0], signal * 3.0 - noise * 2.0);
        assert_eq!(noisy[0], signal * 2.0 + noise * 3.0);
    }
}

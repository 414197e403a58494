//! The forward process: the betas of a scheduler configuration, the cumulative signal share ᾱ of every time step, the
//! noisy input and the velocity at a step, and the Min-SNR weights. In f32 and in PyTorch's order of operations, so the
//! numbers are those of the peer to the bit. Samplers, which run the process backwards, are not here.

use super::scheduler_file::{self, number, text};
use crate::Refusal;
use anyhow::Result;
use serde_json::Value;
use std::path::Path;

/// What the network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise ε.
    Epsilon,
    /// v = √ᾱ·ε − √(1−ᾱ)·x0 (Salimans & Ho 2022, <https://arxiv.org/abs/2202.00512>).
    Velocity,
}

/// The Min-SNR weight under v-prediction, which the peer's two scripts define differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum VelocityWeight {
    /// min(s, γ)/(s + 1), of the full fine-tuning script and of the paper.
    #[default]
    OverSnrPlusOne,
    /// min(s, γ)/s + 1, of the SDXL script.
    PlusOne,
}

/// A discrete noise schedule as diffusers' `DDPMScheduler` builds it from any scheduler's configuration.
#[derive(Clone, Debug)]
pub struct NoiseSchedule {
    alphas_cumprod: Vec<f32>,
    prediction: Prediction,
}

impl NoiseSchedule {
    /// Reads `scheduler_config.json`, whatever scheduler class wrote it; absent keys take `DDPMScheduler`'s defaults.
    ///
    /// # Errors
    /// A [`Refusal`] naming file, key and remedy: unreadable file, unknown beta schedule or prediction type, bad numbers.
    pub fn from_json(path: &Path) -> Result<Self> {
        let config = scheduler_file::read(path)?;
        Self::from_config(&config).map_err(|e| Refusal::error(format!("{}: {e}", path.display())))
    }

    /// The same from the parsed configuration.
    pub fn from_config(config: &Value) -> Result<Self> {
        if !config.is_object() {
            return Err(Refusal::error("this is not a JSON object. Restore the file."));
        }
        let prediction = match text(config, "prediction_type", "epsilon")?.as_str() {
            "epsilon" => Prediction::Epsilon,
            "v_prediction" => Prediction::Velocity,
            other => {
                return Err(Refusal::error(format!(
                    "prediction_type = \"{other}\" cannot be trained; the training objective is defined for \"epsilon\" and \"v_prediction\". Use a model that predicts one of these."
                )));
            }
        };
        let zero_terminal_snr = config.get("rescale_betas_zero_snr").and_then(Value::as_bool).unwrap_or(false);
        Ok(NoiseSchedule { alphas_cumprod: signal_shares(config, zero_terminal_snr)?, prediction })
    }

    /// The number T of training time steps; steps are 0 … T−1.
    pub fn steps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// ᾱ of every step, T values.
    pub fn alphas_cumprod(&self) -> &[f32] {
        &self.alphas_cumprod
    }

    /// (√ᾱ_t, √(1−ᾱ_t)); `t` must be below [`Self::steps`].
    pub fn coefficients(&self, t: usize) -> (f32, f32) {
        let signal = self.alphas_cumprod[t];
        (signal.sqrt(), (1.0 - signal).sqrt())
    }

    /// x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε, element by element, each product rounded before the sum as in the peer.
    pub fn add_noise(&self, t: usize, x0: &[f32], eps: &[f32], out: &mut [f32]) {
        let (signal, noise) = self.coefficients(t);
        assert!(x0.len() == out.len() && eps.len() == out.len(), "rows of different lengths");
        for ((o, &x), &e) in out.iter_mut().zip(x0).zip(eps) {
            *o = signal * x + noise * e;
        }
    }

    /// v = √ᾱ_t·ε − √(1−ᾱ_t)·x0.
    pub fn velocity(&self, t: usize, x0: &[f32], eps: &[f32], out: &mut [f32]) {
        let (signal, noise) = self.coefficients(t);
        assert!(x0.len() == out.len() && eps.len() == out.len(), "rows of different lengths");
        for ((o, &x), &e) in out.iter_mut().zip(x0).zip(eps) {
            *o = signal * e - noise * x;
        }
    }

    /// The signal-to-noise ratio (√ᾱ_t/√(1−ᾱ_t))², as the peer's `compute_snr` rounds it.
    pub fn snr(&self, t: usize) -> f32 {
        let (signal, noise) = self.coefficients(t);
        let ratio = signal / noise;
        ratio * ratio
    }

    /// The Min-SNR-γ weight of step `t` (Hang et al. 2023, <https://arxiv.org/abs/2303.09556>). Where the SNR is zero
    /// (a schedule rescaled to zero terminal SNR) min(s, γ)/s takes its limit 1; the peer gets NaN there.
    pub fn min_snr_weight(&self, t: usize, gamma: f32, velocity: VelocityWeight) -> f32 {
        let snr = self.snr(t);
        let kept = snr.min(gamma);
        let base = if snr > 0.0 { kept / snr } else { 1.0 };
        match (self.prediction, velocity) {
            (Prediction::Epsilon, _) => base,
            (Prediction::Velocity, VelocityWeight::OverSnrPlusOne) => kept / (snr + 1.0),
            (Prediction::Velocity, VelocityWeight::PlusOne) => base + 1.0,
        }
    }
}

/// ᾱ of every time step as the configuration's betas give it, rescaled to zero terminal SNR if `zero_terminal_snr`.
pub(super) fn signal_shares(config: &Value, zero_terminal_snr: bool) -> Result<Vec<f32>> {
    let mut betas = betas(config)?;
    if zero_terminal_snr {
        betas = rescale_to_zero_terminal_snr(&betas);
    }
    Ok(cumulative_signal(&betas))
}

fn betas(config: &Value) -> Result<Vec<f32>> {
    if let Some(trained) = config.get("trained_betas").filter(|v| !v.is_null()) {
        let values: Option<Vec<f32>> =
            trained.as_array().and_then(|a| a.iter().map(|v| v.as_f64().map(|f| f as f32)).collect());
        return values
            .filter(|betas| !betas.is_empty() && betas.iter().all(|beta| (0.0..=1.0).contains(beta)))
            .ok_or_else(|| Refusal::error("trained_betas is not a list of numbers in 0 … 1. Restore the file."));
    }
    let steps = number(config, "num_train_timesteps", 1000.0)?;
    if !(1.0..=1e6).contains(&steps) || steps.fract() != 0.0 {
        return Err(Refusal::error(format!(
            "num_train_timesteps = {steps} is not a whole number between 1 and 1000000. Restore the file."
        )));
    }
    let steps = steps as usize;
    let (start, end) = (number(config, "beta_start", 1e-4)?, number(config, "beta_end", 0.02)?);
    let in_range = |v: f64| (0.0..1.0).contains(&v);
    if !in_range(start) || !in_range(end) {
        return Err(Refusal::error(format!(
            "beta_start = {start} and beta_end = {end} must lie in 0 … 1. Restore the file."
        )));
    }
    match text(config, "beta_schedule", "linear")?.as_str() {
        "linear" => Ok(linspace(start, end, steps)),
        "scaled_linear" => Ok(linspace(start.sqrt(), end.sqrt(), steps).into_iter().map(|v| v * v).collect()),
        "squaredcos_cap_v2" => Ok(squared_cosine(steps)),
        other => Err(Refusal::error(format!(
            "beta_schedule = \"{other}\" is not known; known are linear, scaled_linear and squaredcos_cap_v2, and a list in trained_betas. Put the model's betas into trained_betas."
        ))),
    }
}

/// `torch.linspace` in float32: from both ends to the middle, with fused multiply-add, as its AVX2 and AVX-512 kernels
/// are compiled. Other orders of rounding differ in the last bit of every fifth value.
pub(super) fn linspace(start: f64, end: f64, steps: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    if steps == 1 {
        return vec![start];
    }
    let step = (end - start) / (steps - 1) as f32;
    (0..steps)
        .map(
            |i| {
                if i < steps / 2 { step.mul_add(i as f32, start) } else { (-step).mul_add((steps - 1 - i) as f32, end) }
            },
        )
        .collect()
}

/// Nichol & Dhariwal 2021, <https://arxiv.org/abs/2102.09672>, eq. 17, with betas capped at 0.999.
fn squared_cosine(steps: usize) -> Vec<f32> {
    let signal = |s: f64| ((s + 0.008) / 1.008 * std::f64::consts::PI / 2.0).cos().powi(2);
    let at = |i: usize| signal(i as f64 / steps as f64);
    (0..steps).map(|i| (1.0 - at(i + 1) / at(i)).min(0.999) as f32).collect()
}

/// ∏(1−β), rounded to f32 at every step but carried in f64, as `torch.cumprod` does.
fn cumulative_signal(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0f64;
    betas
        .iter()
        .map(|beta| {
            product *= f64::from(1.0 - beta);
            product as f32
        })
        .collect()
}

/// Lin et al. 2023, <https://arxiv.org/abs/2305.08891>, algorithm 1: shifts and scales √ᾱ so that the last step is pure noise.
fn rescale_to_zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = cumulative_signal(betas).into_iter().map(f32::sqrt).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let scale = first / (first - last);
    let signal: Vec<f32> = roots
        .iter()
        .map(|r| {
            let root = (r - last) * scale;
            root * root
        })
        .collect();
    (0..signal.len()).map(|i| 1.0 - if i == 0 { signal[0] } else { signal[i] / signal[i - 1] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn stable_diffusion(prediction: &str) -> NoiseSchedule {
        let config = json!({"_class_name": "PNDMScheduler", "trained_betas": null, "beta_start": 0.00085,
            "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": prediction});
        NoiseSchedule::from_config(&config).unwrap()
    }

    /// A hash of all the bits (FNV-1a), compared with the same hash of PyTorch's table.
    fn fingerprint(values: &[f32]) -> u64 {
        let bytes = values.iter().flat_map(|v| v.to_bits().to_le_bytes());
        bytes.fold(0xcbf29ce484222325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100000001b3))
    }

    /// The check vectors of the training contract: t, ᾱ, √ᾱ, √(1−ᾱ), SNR and the three weights at γ = 5.
    const TABLE: [(usize, [f64; 7]); 7] = [
        (0, [0.999149978, 0.9995749, 0.0291551333, 1175.44055, 0.00425372, 0.00425011, 1.00425372]),
        (10, [0.990431309, 0.995204151, 0.0978196859, 103.5075, 0.04830568, 0.04784346, 1.04830568]),
        (100, [0.894223154, 0.945633769, 0.325233519, 8.453866, 0.59144538, 0.52888416, 1.59144538]),
        (250, [0.673792303, 0.820848525, 0.571145952, 2.06553173, 1.0, 0.67379232, 2.0]),
        (500, [0.276332468, 0.525673389, 0.850686491, 0.381850064, 1.0, 0.27633249, 2.0]),
        (750, [0.0561698042, 0.237001687, 0.971509278, 0.059512604, 1.0, 0.05616979, 2.0]),
        (999, [0.00466009509, 0.0682648867, 0.997667253, 0.00468191225, 1.0, 0.00466009, 2.0]),
    ];

    #[test]
    fn the_contract_s_check_vectors_hold() {
        let (eps, v) = (stable_diffusion("epsilon"), stable_diffusion("v_prediction"));
        for (t, row) in TABLE {
            let [signal, root, noise, snr, w_eps, w_v, w_plus] = row.map(|v| v as f32);
            assert_eq!(eps.alphas_cumprod()[t], signal, "step {t}");
            // PyTorch's square root is MKL's, which is a bit off in the last place now and then; ours is correctly rounded.
            let (signal_root, noise_root) = eps.coefficients(t);
            assert!(signal_root.to_bits().abs_diff(root.to_bits()) <= 1, "step {t}");
            assert!(noise_root.to_bits().abs_diff(noise.to_bits()) <= 1, "step {t}");
            assert!((eps.snr(t) / snr - 1.0).abs() < 4e-7, "step {t}");
            assert!((eps.min_snr_weight(t, 5.0, VelocityWeight::default()) - w_eps).abs() < 3e-7, "step {t}");
            assert!((v.min_snr_weight(t, 5.0, VelocityWeight::OverSnrPlusOne) - w_v).abs() < 3e-7, "step {t}");
            assert!((v.min_snr_weight(t, 5.0, VelocityWeight::PlusOne) - w_plus).abs() < 3e-7, "step {t}");
        }
    }

    #[test]
    fn every_table_equals_pytorch_s_to_the_bit() {
        let tables = [
            (json!({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}), 0x552efb731a320022),
            (json!({"beta_schedule": "squaredcos_cap_v2"}), 0x6d7434fdfe965e9e),
            (json!({}), 0x5b0ad40d73df8aec),
            (json!({"trained_betas": [0.1, 0.2, 0.3, 0.7]}), 0xbe58f597205cd524),
            (
                json!({"num_train_timesteps": 777, "beta_end": 0.05, "beta_schedule": "scaled_linear"}),
                0xf523c52b697f7983,
            ),
        ];
        for (config, expected) in tables {
            let schedule = NoiseSchedule::from_config(&config).unwrap();
            assert_eq!(fingerprint(schedule.alphas_cumprod()), expected, "{config}");
        }
    }

    #[test]
    fn noisy_input_and_velocity_equal_pytorch_s_to_the_bit() {
        let schedule = stable_diffusion("epsilon");
        let (x0, eps) = ([0.3, -1.7, 2.25], [-0.9, 0.11, 1.4]);
        let expected: [(usize, [i32; 3], [i32; 3]); 3] = [
            (0, [1049368988, -1076291371, 1074957588], [-1083667830, 1042503786, 1068153382]),
            (437, [-1089938090, -1083107253, 1075740571], [-1085759474, 1068872758, -1083086657]),
            (999, [-1084186965, -1144083904, 1069969720], [-1095191878, 1071254967, -1073116116]),
        ];
        for (t, noisy, velocity) in expected {
            let mut out = [0f32; 3];
            schedule.add_noise(t, &x0, &eps, &mut out);
            assert_eq!(out.map(|v| v.to_bits() as i32), noisy);
            schedule.velocity(t, &x0, &eps, &mut out);
            assert_eq!(out.map(|v| v.to_bits() as i32), velocity);
        }
    }

    #[test]
    fn zero_terminal_snr_gives_finite_weights() {
        let config = json!({"rescale_betas_zero_snr": true, "prediction_type": "v_prediction"});
        let schedule = NoiseSchedule::from_config(&config).unwrap();
        assert_eq!(schedule.snr(999), 0.0);
        assert_eq!(schedule.alphas_cumprod()[0], 0.9999);
        assert!((schedule.alphas_cumprod()[500] / 0.0752462 - 1.0).abs() < 1e-6);
        assert_eq!(schedule.min_snr_weight(999, 5.0, VelocityWeight::OverSnrPlusOne), 0.0);
        assert_eq!(schedule.min_snr_weight(999, 5.0, VelocityWeight::PlusOne), 2.0);
    }

    #[test]
    fn what_cannot_be_trained_is_refused_by_name() {
        let cases = [
            (json!({"prediction_type": "sample"}), "sample"),
            (json!({"beta_schedule": "sigmoidal"}), "sigmoidal"),
            (json!({"num_train_timesteps": 0}), "num_train_timesteps"),
            (json!({"beta_end": 1.5}), "beta_end"),
            (json!({"trained_betas": "x"}), "trained_betas"),
        ];
        for (config, named) in cases {
            let error = NoiseSchedule::from_config(&config).unwrap_err();
            assert!(error.is::<Refusal>() && error.to_string().contains(named), "{error}");
        }
        let missing = NoiseSchedule::from_json(Path::new("no/scheduler_config.json")).unwrap_err();
        assert!(missing.to_string().contains("no/scheduler_config.json"));
    }
}

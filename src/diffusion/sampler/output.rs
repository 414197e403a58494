//! From the network's prediction to the clean picture x0 or the noise ε, and the limits put on x0.

use super::LatentShape;
use crate::Refusal;
use crate::diffusion::scheduler_file::{choice, flag, number};
use anyhow::{Result, bail};
use serde_json::Value;
use std::borrow::Cow;

/// What the network predicts, of a sample x = signal·x0 + noise·ε.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// ε.
    Noise,
    /// x0.
    Clean,
    /// v = signal·ε − noise·x0.
    Velocity,
}

impl Output {
    /// Reads `prediction_type`; `clean` says whether the sampler's class knows the type "sample".
    pub(super) fn read(config: &Value, clean: bool) -> Result<Self> {
        let choices = [("epsilon", Output::Noise), ("v_prediction", Output::Velocity), ("sample", Output::Clean)];
        choice(config, "prediction_type", "epsilon", if clean { &choices } else { &choices[..2] })
    }

    /// x0. `signal` and `noise` are the factors of x0 and ε in `sample`.
    pub(super) fn clean(self, sample: &[f32], prediction: &[f32], signal: f32, noise: f32) -> Vec<f32> {
        let pairs = sample.iter().zip(prediction);
        match self {
            Output::Noise => pairs.map(|(&x, &eps)| (x - noise * eps) / signal).collect(),
            Output::Clean => prediction.to_vec(),
            Output::Velocity => pairs.map(|(&x, &v)| signal * x - noise * v).collect(),
        }
    }

    /// ε, likewise.
    pub(super) fn noise(self, sample: &[f32], prediction: &[f32], signal: f32, noise: f32) -> Vec<f32> {
        let pairs = sample.iter().zip(prediction);
        match self {
            Output::Noise => prediction.to_vec(),
            Output::Clean => pairs.map(|(&x, &x0)| (x - signal * x0) / noise).collect(),
            Output::Velocity => pairs.map(|(&x, &v)| signal * v + noise * x).collect(),
        }
    }
}

/// The first C channels of a prediction of C or 2C channels.
pub(super) fn mean_part(prediction: &[f32], shape: LatentShape) -> Cow<'_, [f32]> {
    if prediction.len() == shape.numbers() {
        return Cow::Borrowed(prediction);
    }
    let picture = shape.picture();
    Cow::Owned(prediction.chunks_exact(2 * picture).flat_map(|both| &both[..picture]).copied().collect())
}

/// The second C channels.
///
/// # Errors
/// There are none.
pub(super) fn variance_part(prediction: &[f32], shape: LatentShape) -> Result<Vec<f32>> {
    if prediction.len() == shape.numbers() {
        bail!(
            "the scheduler's variance_type is a learned one, but the network's prediction has {} channels and not twice as many",
            shape.channels
        );
    }
    let picture = shape.picture();
    Ok(prediction.chunks_exact(2 * picture).flat_map(|both| &both[picture..]).copied().collect())
}

/// What is done to x0 before it is used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Limit {
    None,
    /// To −range … range.
    Clip(f32),
    /// Dynamic thresholding (Saharia et al. 2022, <https://arxiv.org/abs/2205.11487>, section 2.3).
    Threshold {
        ratio: f32,
        max: f32,
    },
}

impl Limit {
    /// Reads `thresholding` and its keys, and `clip_sample` and `clip_sample_range` where the class has them (`clips`).
    pub(super) fn read(config: &Value, clips: bool) -> Result<Self> {
        if flag(config, "thresholding", false)? {
            let ratio = number(config, "dynamic_thresholding_ratio", 0.995)?;
            let max = number(config, "sample_max_value", 1.0)?;
            if !(0.0..=1.0).contains(&ratio) || max <= 0.0 {
                return Err(Refusal::error(format!(
                    "thresholding needs dynamic_thresholding_ratio = {ratio} in 0 … 1 and sample_max_value = {max} above 0. Restore the file."
                )));
            }
            return Ok(Limit::Threshold { ratio: ratio as f32, max: max as f32 });
        }
        if clips && flag(config, "clip_sample", true)? {
            return Ok(Limit::Clip(number(config, "clip_sample_range", 1.0)? as f32));
        }
        Ok(Limit::None)
    }

    pub(super) fn apply(self, clean: &mut [f32], shape: LatentShape) {
        match self {
            Limit::None => {}
            Limit::Clip(range) => clean.iter_mut().for_each(|x| *x = x.max(-range).min(range)),
            Limit::Threshold { ratio, max } => {
                for picture in clean.chunks_exact_mut(shape.picture().max(1)) {
                    let bound = quantile(picture.iter().map(|x| x.abs()).collect(), ratio).max(1.0).min(max);
                    picture.iter_mut().for_each(|x| *x = x.max(-bound).min(bound) / bound);
                }
            }
        }
    }
}

/// The `ratio` quantile, interpolated between the two nearest values as `torch.quantile` does it, in f32.
fn quantile(mut values: Vec<f32>, ratio: f32) -> f32 {
    let rank = ratio * (values.len() - 1) as f32;
    let (below, weight) = (rank.floor() as usize, rank - rank.floor());
    let (_, low, rest) = values.select_nth_unstable_by(below, f32::total_cmp);
    let low = *low;
    let high = if weight > 0.0 { rest.iter().copied().min_by(f32::total_cmp).unwrap_or(low) } else { low };
    if weight < 0.5 { low + weight * (high - low) } else { high - (high - low) * (1.0 - weight) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_torch_s() {
        let values = vec![3.0, -1.0, 0.5, 2.0, 7.25];
        for (ratio, expected) in [(0.0, -1.0), (0.25, 0.5), (0.3, 0.8), (0.9, 5.55), (1.0, 7.25)] {
            assert!((quantile(values.clone(), ratio) - expected).abs() < 1e-6, "{ratio}");
        }
        assert_eq!(quantile(vec![4.0], 0.995), 4.0);
    }

    #[test]
    fn the_two_halves_of_a_learned_variance_are_taken_picture_by_picture() {
        let shape = LatentShape { pictures: 2, channels: 1, area: 2 };
        let prediction = [1.0, 2.0, -1.0, -2.0, 3.0, 4.0, -3.0, -4.0];
        assert_eq!(mean_part(&prediction, shape).as_ref(), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(variance_part(&prediction, shape).unwrap(), [-1.0, -2.0, -3.0, -4.0]);
        assert_eq!(mean_part(&prediction[..4], shape).as_ref(), &prediction[..4]);
        assert!(variance_part(&prediction[..4], shape).is_err());
    }
}

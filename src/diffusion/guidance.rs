//! Classifier-free guidance and its rescaling: two predictions into one. Which prompts they were made with is the
//! caller's business.

use super::sampler::LatentShape;
use anyhow::{Result, bail};

/// uncond + scale·(cond − uncond) (Ho & Salimans 2022, <https://arxiv.org/abs/2207.12598>), then mixed with itself at
/// the deviation that `cond` has in that picture: `rescale` of the way (Lin et al. 2023,
/// <https://arxiv.org/abs/2305.08891>, section 3.4; diffusers' `rescale_noise_cfg`); 0 is no rescaling.
///
/// Predictions are (pictures, C, area), or (pictures, 2C, area) where the second half is a learned variance: that half
/// is not guided but `cond`'s, as in the IF pipelines.
///
/// # Errors
/// Predictions that do not have that shape.
pub fn guide(uncond: &[f32], cond: &[f32], scale: f32, rescale: f32, shape: LatentShape) -> Result<Vec<f32>> {
    let numbers = shape.numbers();
    if uncond.len() != cond.len() || (cond.len() != numbers && cond.len() != 2 * numbers) {
        bail!("predictions of {} and {} numbers to guide, for {numbers} latents", uncond.len(), cond.len());
    }
    let mut guided = cond.to_vec();
    if numbers == 0 {
        return Ok(guided);
    }
    let whole = cond.len() / shape.pictures;
    let pictures = guided.chunks_exact_mut(whole).zip(uncond.chunks_exact(whole)).zip(cond.chunks_exact(whole));
    for ((guided, uncond), cond) in pictures {
        let (guided, cond) = (&mut guided[..shape.picture()], &cond[..shape.picture()]);
        for ((g, &u), &c) in guided.iter_mut().zip(uncond).zip(cond) {
            *g = u + scale * (c - u);
        }
        if rescale > 0.0 {
            let factor = deviation(cond) / deviation(guided);
            // Where the guided prediction is all one number there is nothing to scale.
            if factor.is_finite() {
                guided.iter_mut().for_each(|g| *g = rescale * (*g * factor) + (1.0 - rescale) * *g);
            }
        }
    }
    Ok(guided)
}

/// The standard deviation with n − 1 in the divisor, as `torch.std` has it.
fn deviation(values: &[f32]) -> f32 {
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
    let squares: f64 = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum();
    (squares / (values.len() - 1) as f64).sqrt() as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    const SHAPE: LatentShape = LatentShape { pictures: 2, channels: 3, area: 12 };

    fn recorded() -> [Vec<f32>; 4] {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/samplers/trajectories.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        ["uncond", "cond", "guided", "rescaled"].map(|name| {
            let view = tensors.tensor(&format!("guidance/{name}")).unwrap();
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        })
    }

    #[test]
    fn guidance_and_rescaling_are_diffusers() {
        let [uncond, cond, guided, rescaled] = recorded();
        assert_eq!(guide(&uncond, &cond, 7.5, 0.0, SHAPE).unwrap(), guided);
        let ours = guide(&uncond, &cond, 7.5, 0.7, SHAPE).unwrap();
        let worst = ours.iter().zip(&rescaled).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-6, "{worst}");
    }

    #[test]
    fn a_learned_variance_is_taken_from_the_prompt_unguided() {
        let [uncond, cond, guided, _] = recorded();
        let with_variance = |means: &[f32], variance: f32| -> Vec<f32> {
            let pictures = means.chunks_exact(SHAPE.picture());
            pictures.flat_map(|mean| mean.iter().copied().chain(vec![variance; SHAPE.picture()])).collect()
        };
        let both = guide(&with_variance(&uncond, 1.0), &with_variance(&cond, 2.0), 7.5, 0.0, SHAPE).unwrap();
        assert_eq!(both, with_variance(&guided, 2.0));
        assert!(guide(&uncond, &both, 7.5, 0.0, SHAPE).is_err());
        assert!(guide(&uncond[1..], &cond[1..], 7.5, 0.0, SHAPE).is_err());
    }

    #[test]
    fn a_prediction_without_spread_stays_as_it_is() {
        let (zeros, shape) = ([0.0; 4], LatentShape { pictures: 1, channels: 1, area: 4 });
        assert_eq!(guide(&zeros, &zeros, 7.5, 0.7, shape).unwrap(), zeros);
    }
}

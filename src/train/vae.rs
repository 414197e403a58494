//! The VAE's encoder, ready to run: pictures in, the latents' distributions out.

use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};

use crate::device::{Compute, on_host};
use crate::model::{self, Component, VaeConfig};
use crate::pipeline::{Frozen, PipelineWeights};
use crate::segment::SlotId;
use crate::zero::Tiers;

/// The encoder in the run's precision, as the peer has it. fp16 is too narrow for the activations of some published VAEs:
/// a picture whose moments are not finite is encoded again in fp32.
pub(super) struct Encoder {
    network: Frozen,
    /// The same in fp32, of which nothing is in memory until it runs; none where that is the run's precision.
    wide: Option<Frozen>,
    dtype: DType,
    pixels: SlotId,
    moments: SlotId,
    device: Device,
    pub latent_channels: usize,
    /// Pixels along a latent's side.
    pub downscale: usize,
    pub scaling_factor: f32,
}

impl Encoder {
    /// `in_files`: the weights stay in their files, and no more than two segments' are in memory.
    ///
    /// # Errors
    /// A [`Refusal`](crate::Refusal) if the weights do not fit the configuration.
    pub fn load(
        config: &VaeConfig,
        weights: &Arc<PipelineWeights>,
        tiers: &Tiers,
        in_files: bool,
        compute: &Compute,
    ) -> Result<Self> {
        let encoder = model::vae_encoder(config);
        weights.component(Component::Vae).check(&model::wanted(&encoder.graph, Component::Vae))?;
        let left_there =
            |dtype: DType| Frozen::in_files(model::vae_encoder(config).graph, dtype, tiers, weights.clone());
        let network = match in_files {
            true => left_there(compute.dtype),
            false => Frozen::load(encoder.graph, compute.dtype, tiers, &**weights)?,
        };
        Ok(Encoder {
            network,
            wide: (compute.dtype != DType::F32).then(|| left_there(DType::F32)),
            dtype: compute.dtype,
            pixels: encoder.pixels,
            moments: encoder.moments,
            device: compute.device.clone(),
            latent_channels: config.latent_channels,
            downscale: config.downscale(),
            scaling_factor: config.scaling_factor as f32,
        })
    }

    /// Means, then log-variances (2C, h, w) of a picture (3, side, side) from -1 to 1.
    pub fn moments(&self, picture: Vec<f32>, side: usize) -> Result<Vec<f32>> {
        let picture = Tensor::from_vec(picture, (1, 3, side, side), &Device::Cpu)?;
        let moments = self.run(&self.network, &picture, self.dtype)?;
        let finite = |moments: &[f32]| moments.iter().all(|m| m.is_finite());
        let Some(wide) = self.wide.as_ref().filter(|_| !finite(&moments)) else { return Ok(moments) };
        let moments = self.run(wide, &picture, DType::F32)?;
        ensure!(finite(&moments), "the VAE's encoder gives latents that are not finite");
        Ok(moments)
    }

    fn run(&self, network: &Frozen, picture: &Tensor, dtype: DType) -> Result<Vec<f32>> {
        // Rounded here, so that only what is needed travels.
        let pixels = picture.to_dtype(dtype)?.to_device(&self.device)?;
        let output = network.run(vec![(self.pixels, pixels)], self.moments)?;
        Ok(on_host(&output)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const SIDE: usize = 64;

    #[test]
    fn what_overflows_in_half_precision_is_encoded_in_fp32_and_nothing_else() {
        let folder = Path::new("tests/data/models/sd15");
        let config = VaeConfig::read(&folder.join("vae")).unwrap();
        let weights = Arc::new(PipelineWeights::open(folder, "").unwrap());
        let load = |dtype, in_files| {
            let compute = Compute { device: Device::Cpu, dtype };
            Encoder::load(&config, &weights, &Tiers::on_device().unwrap(), in_files, &compute).unwrap()
        };
        let picture = |brightness: f32| -> Vec<f32> {
            (0..3 * SIDE * SIDE).map(|i| brightness * ((i * 37 % 101) as f32 / 50.0 - 1.0)).collect()
        };
        let exact = load(DType::F32, false);
        for (dtype, bound) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            let (resident, in_files) = (load(dtype, false), load(dtype, true));
            let (half, wide) =
                (resident.moments(picture(1.0), SIDE).unwrap(), exact.moments(picture(1.0), SIDE).unwrap());
            assert_eq!(half, in_files.moments(picture(1.0), SIDE).unwrap());
            let size = wide.iter().fold(0.0, |most: f32, m| most.max(m.abs()));
            let apart = half.iter().zip(&wide).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / size;
            println!("{dtype:?}: {apart:.1e}");
            assert!(apart > 0.0 && apart < bound, "{dtype:?}: {apart}");
            if dtype == DType::F16 {
                let bright = resident.moments(picture(1e5), SIDE).unwrap();
                assert_eq!(bright, exact.moments(picture(1e5), SIDE).unwrap());
            }
        }
        assert!(exact.moments(vec![f32::NAN; 3 * SIDE * SIDE], SIDE).unwrap().iter().all(|m| !m.is_finite()));
    }
}

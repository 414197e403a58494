//! Latents -> pictures: the VAE's decoder, one picture at a time, in overlapping tiles where a picture is large, and
//! once more in fp32 where a narrower precision overflowed.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use super::tiles::{Plane, Tiles};
use crate::device::{Compute, on_host};
use crate::model::{self, Component, VaeConfig};
use crate::pipeline::{Frozen, PipelineWeights};
use crate::segment::SlotId;
use crate::zero::Tiers;

/// Whether pictures are decoded in tiles, which takes less memory and changes them a little.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tiling {
    /// Where the largest activation of a whole picture would take more than [`LARGE_ACTIVATION`].
    #[default]
    Auto,
    On,
    Off,
}

/// From here on `Tiling::Auto` decodes in tiles, in bytes: Stable Diffusion's decoder gets there beyond 1024 x 1024
/// pixels.
pub const LARGE_ACTIVATION: usize = 1 << 30;

/// The decoder, whole on every rank as all frozen networks are: running it is no collective.
pub struct Decoder<'w> {
    config: VaeConfig,
    weights: &'w PipelineWeights,
    device: Device,
    tiers: Tiers,
    tiling: Tiling,
    network: Network,
    /// The same in fp32, once it was needed.
    wide: Option<Network>,
}

struct Network {
    frozen: Frozen,
    dtype: DType,
    latents: SlotId,
    pixels: SlotId,
}

impl Network {
    fn load(config: &VaeConfig, weights: &PipelineWeights, dtype: DType, tiers: &Tiers) -> Result<Self> {
        let decoder = model::vae_decoder(config);
        let frozen = Frozen::load(decoder.graph, dtype, tiers, weights)?;
        Ok(Network { frozen, dtype, latents: decoder.latents, pixels: decoder.pixels })
    }

    /// (1, C, h, w) -> pixels.
    fn run(&self, latents: Plane, device: &Device) -> Result<Plane> {
        let shape = (1, latents.channels, latents.height, latents.width);
        let input = Tensor::from_vec(latents.values, shape, device)?.to_dtype(self.dtype)?;
        let output = self.frozen.run(vec![(self.latents, input)], self.pixels)?;
        let (_, channels, height, width) = output.dims4()?;
        let values = on_host(&output)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Plane { channels, height, width, values })
    }
}

impl<'w> Decoder<'w> {
    /// Reads the decoder into the device's memory of `tiers`, in `compute`'s precision unless the VAE's configuration says that it overflows in fp16
    /// (`force_upcast`, also where it says nothing).
    ///
    /// # Errors
    /// A [`Refusal`](crate::Refusal) if the weights do not fit the configuration.
    pub fn load(
        config: &VaeConfig,
        weights: &'w PipelineWeights,
        compute: &Compute,
        tiers: Tiers,
        tiling: Tiling,
    ) -> Result<Self> {
        check_weights(config, weights)?;
        let dtype = if config.force_upcast { DType::F32 } else { compute.dtype };
        let network = Network::load(config, weights, dtype, &tiers)?;
        let (config, device) = (config.clone(), compute.device.clone());
        Ok(Decoder { config, weights, device, tiers, tiling, network, wide: None })
    }

    /// The picture of latents (C, h, w) as the denoising network knows them, that is scaled and shifted. Pixels are
    /// rounded as the peer's image processor does.
    pub fn picture(&mut self, latents: &[f32], (height, width): (usize, usize)) -> Result<RgbImage> {
        let plane = self.decode(latents, (height, width))?;
        let (pixels, plane_len) = (&plane.values, plane.height * plane.width);
        let level = |x: f32| ((x / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
        let rgb = (0..plane_len).flat_map(|i| [0, 1, 2].map(|c| level(pixels[c * plane_len + i]))).collect();
        RgbImage::from_raw(plane.width as u32, plane.height as u32, rgb)
            .ok_or_else(|| anyhow::anyhow!("a picture of {} x {} pixels is too large", plane.width, plane.height))
    }

    /// Pixels (3, H, W) from -1 to 1 of latents (C, h, w).
    pub fn decode(&mut self, latents: &[f32], (height, width): (usize, usize)) -> Result<Plane> {
        let channels = self.config.latent_channels;
        ensure!(latents.len() == channels * height * width, "latents of another size than they are said to have");
        let (scale, shift) = (self.config.scaling_factor as f32, self.config.shift_factor as f32);
        let values = latents.iter().map(|x| x / scale + shift).collect();
        let plane = Plane { channels, height, width, values };
        ensure!(plane.is_finite(), "the latents are not finite (the weights, or too narrow a precision?)");
        let pixels = self.run(&self.network, &plane)?;
        if pixels.is_finite() {
            return Ok(pixels);
        }
        ensure!(self.network.dtype != DType::F32, "the VAE's decoder gives pixels that are not finite");
        if self.wide.is_none() {
            self.wide = Some(Network::load(&self.config, self.weights, DType::F32, &self.tiers)?);
        }
        // Only for this picture, so that no picture depends on those before it.
        let pixels = self.run(self.wide.as_ref().unwrap_or(&self.network), &plane)?;
        ensure!(pixels.is_finite(), "the VAE's decoder gives pixels that are not finite");
        Ok(pixels)
    }

    fn run(&self, network: &Network, latents: &Plane) -> Result<Plane> {
        let tiles = Tiles::of(self.config.sample_size, self.config.downscale());
        let tiled = tiles.are_smaller_than(latents) && self.tiles(latents, network.dtype);
        match tiled {
            true => tiles.decode(latents, |tile| network.run(tile, &self.device)),
            false => network.run(latents.clone(), &self.device),
        }
    }

    fn tiles(&self, latents: &Plane, dtype: DType) -> bool {
        match self.tiling {
            Tiling::On => true,
            Tiling::Off => false,
            Tiling::Auto => largest_activation(&self.config, latents.height, latents.width, dtype) > LARGE_ACTIVATION,
        }
    }
}

/// Refuses VAE weights that do not fit the configuration, the encoder's included.
pub fn check_weights(config: &VaeConfig, weights: &PipelineWeights) -> Result<()> {
    let mut wanted = model::wanted(&model::vae_encoder(config).graph, Component::Vae);
    wanted.extend(model::wanted(&model::vae_decoder(config).graph, Component::Vae));
    weights.component(Component::Vae).check(&wanted)
}

/// Bytes of the largest activation when latents of h x w are decoded whole: the second level's channels at full size.
fn largest_activation(config: &VaeConfig, height: usize, width: usize, dtype: DType) -> usize {
    let channels = config.channels.get(1).unwrap_or(&config.channels[0]);
    let pixels = height * width * config.downscale() * config.downscale();
    channels * pixels * dtype.size_in_bytes()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::{Path, PathBuf};

    use super::*;

    fn data(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
    }

    fn cpu(dtype: DType) -> Compute {
        Compute { device: Device::Cpu, dtype }
    }

    /// What the peer made of latents: (latents, pixels), one picture each.
    fn recorded(file: &str, latents: &str, pixels: &str) -> Vec<(Plane, Plane)> {
        let tensors: HashMap<String, Tensor> =
            candle_core::safetensors::load(data(&format!("vae/{file}.safetensors")), &Device::Cpu).unwrap();
        let planes = |name: &str| -> Vec<Plane> {
            let (pictures, channels, height, width) = tensors[name].dims4().unwrap();
            let values = |i: usize| tensors[name].get(i).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            (0..pictures).map(|i| Plane { channels, height, width, values: values(i) }).collect()
        };
        planes(latents).into_iter().zip(planes(pixels)).collect()
    }

    fn apart(got: &Plane, want: &Plane) -> f32 {
        assert_eq!((got.channels, got.height, got.width), (want.channels, want.height, want.width));
        got.values.iter().zip(&want.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn pixels_are_the_peers_whole_and_in_tiles() {
        let cases = [
            ("sd15", "latents", "pixels", Tiling::Auto),
            ("sd21v", "latents", "pixels", Tiling::On),
            ("sd15", "large_latents", "tiled_pixels", Tiling::On),
        ];
        for (model, latents, pixels, tiling) in cases {
            let folder = data(&format!("models/{model}"));
            let config = VaeConfig::read(&folder.join("vae")).unwrap();
            let weights = PipelineWeights::open(&folder, "").unwrap();
            let mut decoder =
                Decoder::load(&config, &weights, &cpu(DType::BF16), Tiers::on_device().unwrap(), tiling).unwrap();
            assert_eq!(decoder.network.dtype, DType::F32, "the configuration says so");
            for (latents, pixels) in recorded(model, latents, pixels) {
                let got = decoder.decode(&latents.values, (latents.height, latents.width)).unwrap();
                let apart = apart(&got, &pixels);
                println!("{model}: {apart:.1e}");
                assert!(apart < 2e-5, "{model}, {tiling:?}: {apart}");
            }
        }
    }

    #[test]
    fn what_overflows_in_half_precision_is_decoded_in_fp32_and_nothing_else() {
        let folder = data("models/sd15");
        let config = VaeConfig { force_upcast: false, ..VaeConfig::read(&folder.join("vae")).unwrap() };
        let weights = PipelineWeights::open(&folder, "").unwrap();
        let load =
            |dtype| Decoder::load(&config, &weights, &cpu(dtype), Tiers::on_device().unwrap(), Tiling::Auto).unwrap();
        let (mut half, mut wide) = (load(DType::F16), load(DType::F32));
        let (latents, _) = recorded("sd15", "latents", "pixels").remove(0);
        let size = (latents.height, latents.width);
        let small = half.decode(&latents.values, size).unwrap();
        assert!(
            half.wide.is_none() && (1e-6..0.1).contains(&apart(&small, &wide.decode(&latents.values, size).unwrap()))
        );
        let large: Vec<f32> = latents.values.iter().map(|x| x * 1e5).collect();
        assert_eq!(half.decode(&large, size).unwrap(), wide.decode(&large, size).unwrap());
        assert_eq!(half.decode(&latents.values, size).unwrap(), small);
        assert!(wide.decode(&[f32::NAN; 140], size).unwrap_err().to_string().contains("latents are not finite"));
    }

    #[test]
    fn only_pictures_beyond_a_megapixel_are_tiled_by_themselves() {
        let bytes = |side: usize| largest_activation(&VaeConfig::sd_shape(), side / 8, side / 8, DType::F32);
        assert!(bytes(1024) <= LARGE_ACTIVATION && bytes(1032) > LARGE_ACTIVATION);
    }
}

//! The whole VAE as one trainable graph: encoder, bottleneck, decoder. Fine-tuning leaves the VAE alone; this is for
//! making a new one, as the embedded demo's was.

use candle_core::{Result, Tensor};

use super::config::VaeConfig;
use super::layers::take;
use super::vae::append_encoder;
use super::vae_decoder::append_decoder;
use crate::ops;
use crate::segment::{GraphBuilder, Segment, SegmentGraph, SlotId};

/// Pixels -> latents -> pixels.
pub struct Autoencoder {
    pub graph: SegmentGraph,
    /// Input: (B, 3, H, W), from -1 to 1.
    pub pixels: SlotId,
    /// Input: (B, latent_channels, h, w), added to the means: a posterior whose deviation does not depend on the picture.
    pub noise: SlotId,
    /// The latents' means and log-variances; the latter do not train.
    pub moments: SlotId,
    /// Output: (B, 3, H, W).
    pub reconstruction: SlotId,
}

/// `pull`: the weight of half the means' squares (the part of the Kullback-Leibler divergence that depends on them) in
/// the loss, per element.
pub fn autoencoder(config: &VaeConfig, pull: f64) -> Autoencoder {
    let mut b = GraphBuilder::new();
    let (pixels, noise) = (b.input("pixels"), b.input("noise"));
    let moments = append_encoder(&mut b, config, pixels, true);
    let channels = config.latent_channels;
    let [latents] = b.segment("vae.bottleneck", "vae", true, &[moments, noise], ["vae.bottleneck"], |_| {
        Box::new(Bottleneck { channels, pull })
    });
    let reconstruction = append_decoder(&mut b, config, latents, true);
    Autoencoder { graph: b.finish(), pixels, noise, moments, reconstruction }
}

/// [moments (B, 2C, h, w), noise (B, C, h, w)] -> [latents (B, C, h, w)].
struct Bottleneck {
    channels: usize,
    pull: f64,
}

impl Segment for Bottleneck {
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [moments, noise] = take(inputs)?;
        let (channels, pull) = (self.channels, self.pull);
        let means = moments.narrow(1, 0, channels)?.contiguous()?;
        let latents = (&means + noise)?;
        // The means are pulled to zero: the gradient of pull/2 of their squares is added on the way back.
        let back = move |dy: &Tensor| {
            let of_means = (dy + means.affine(pull, 0.0)?)?;
            Ok(vec![Some(of_means.pad_with_zeros(1, 0, channels)?), Some(dy.clone())])
        };
        Ok(vec![ops::noted(&[moments, noise], latents, back)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{vae_decoder, vae_encoder};

    #[test]
    fn it_is_the_encoder_and_the_decoder() {
        let config = VaeConfig::sd_shape();
        let both = vae_encoder(&config).graph.parameters() + vae_decoder(&config).graph.parameters();
        let whole = autoencoder(&config, 0.0).graph;
        assert_eq!(whole.parameters(), both);
        assert!(whole.nodes.iter().all(|node| node.grads.is_some()));
    }
}

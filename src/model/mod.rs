//! Row 3: the networks of Stable Diffusion 1.x and 2.x as segment graphs, and their weights on disk.
//!
//! A graph is built from a component's `config.json` without allocating anything: layers declare their tensors and
//! keep references. Tensor names are diffusers' and transformers' own with the component in front
//! (`unet.conv_in.weight`, `text_encoder.text_model.final_layer_norm.bias`); [`ComponentWeights`] finds them in a
//! model's files whatever spelling these use, [`ComponentWriter`] writes them back as they were read.
//! Nothing here knows ranks, noise schedules or tokenizers.

mod autoencoder;
mod clip;
mod codec;
pub mod config;
mod denoiser;
mod export;
mod layers;
mod names;
#[cfg(test)]
mod parity;
mod pipeline;
mod resnet;
mod tensor_file;
mod time;
mod transformer;
mod unet;
mod vae;
mod vae_decoder;
mod weight_files;
mod weights;

pub use autoencoder::{Autoencoder, autoencoder};
pub use clip::{TextEncoder, TextSlots, text_encoder};
pub use config::{Level, TextConfig, UnetConfig, VaeConfig};
pub use denoiser::{Conditioning, Denoiser, DenoiserSlots, check_text_width, denoiser};
pub use export::ComponentWriter;
pub use names::Component;
pub use pipeline::PipelineExport;
pub use time::time_features;
pub use vae::{VaeEncoder, vae_encoder};
pub use vae_decoder::{VaeDecoder, vae_decoder};
pub(crate) use weight_files::{WeightName, is_pickle};
pub use weights::{ComponentWeights, wanted};

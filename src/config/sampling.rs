//! Whether the pictures that a run makes can be made: class images that are missing, and those of `[validation]`.

use std::path::Path;

use anyhow::Result;

use super::check::Inspection;
use super::output_folder::can_write;
use crate::data;
use crate::diffusion::sampler::{SamplerConfig, SamplerKind};
use crate::model::{UnetConfig, VaeConfig};
use crate::pipeline::PipelineWeights;
use crate::sample;

/// The folder of class images holds enough of them, or they can be made. Returns how many there will be.
pub(super) fn class_images(inspection: &mut Inspection) -> Option<usize> {
    let Some(prior) = inspection.plan.prior.clone() else { return Some(0) };
    let (dir, wanted) = (prior.class_dir.as_path(), prior.num_class_images);
    if dir.as_os_str().is_empty() {
        return None;
    }
    let there = match data::list_pictures(dir, false) {
        Ok(pictures) => pictures.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
        Err(error) => {
            let why = match error.kind() {
                std::io::ErrorKind::NotADirectory => "this is not a folder".to_string(),
                _ => format!("this folder cannot be read ({error})"),
            };
            inspection.problem("prior", "class_dir", &format!("{why}: name a folder for pictures of the class"));
            return None;
        }
    };
    inspection.facts.class_images = there.min(wanted);
    if there < wanted {
        inspection.facts.class_images_made = wanted - there;
        inspection.absorb("prior", "class_dir", can_write(dir));
    }
    Some(wanted)
}

/// What the model must have for pictures to be made of it.
pub(super) fn inspect(inspection: &mut Inspection) {
    let Some(folder) = inspection.facts.model_dir.clone() else { return };
    let mut uses: Vec<(&str, Option<SamplerKind>, usize)> = Vec::new();
    if inspection.facts.class_images_made > 0
        && let Some(prior) = &inspection.plan.prior
    {
        uses.push(("prior", prior.sampler, prior.steps));
    }
    if let Some(validation) = &inspection.plan.validation {
        uses.push(("validation", validation.sampler, validation.steps));
    }
    if uses.is_empty() {
        return;
    }
    let variant = inspection.plan.model.variant.clone().unwrap_or_default();
    inspection.absorb("model", "path", decoder(&folder, &variant));
    let config = SamplerConfig::read(&folder.join("scheduler/scheduler_config.json"));
    let Some(config) = inspection.absorb("model", "path", config) else { return };
    for (section, sampler, steps) in uses {
        let kind = match sampler {
            Some(kind) => Ok(kind),
            None => config.default_kind(),
        };
        let key = if sampler.is_some() { "sampler" } else { "steps" };
        inspection.absorb(section, key, kind.and_then(|kind| config.build(kind, steps)));
    }
}

/// The VAE's decoder is whole and of the UNet's latents.
fn decoder(folder: &Path, variant: &str) -> Result<()> {
    let vae = VaeConfig::read(&folder.join("vae"))?;
    sample::check_weights(&vae, &PipelineWeights::open(folder, variant)?)?;
    let unet = UnetConfig::read(&folder.join("unet"))?;
    match unet.in_channels == vae.latent_channels {
        true => Ok(()),
        false => Err(crate::Refusal::error(format!(
            "unet/config.json: in_channels = {}, but vae/config.json: latent_channels = {}: pictures can be made of text alone \
             (no inpainting) yet: leave out [validation], and put the class images there",
            unet.in_channels, vae.latent_channels
        ))),
    }
}

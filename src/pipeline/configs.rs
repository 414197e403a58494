//! The configurations of a pipeline's networks.

use std::path::Path;

use anyhow::Result;

use crate::model::{self, TextConfig, UnetConfig, VaeConfig};

/// The configurations of a pipeline's components.
pub struct Configs {
    pub unet: UnetConfig,
    pub text: TextConfig,
    pub vae: VaeConfig,
}

impl Configs {
    pub fn read(model_dir: &Path) -> Result<Self> {
        let unet = UnetConfig::read(&model_dir.join("unet"))?;
        let text = TextConfig::read(&model_dir.join("text_encoder"))?;
        let vae = VaeConfig::read(&model_dir.join("vae"))?;
        model::check_text_width(&unet, &text)?;
        Ok(Configs { unet, text, vae })
    }
}

//! `--latents` and `--save-latents`: a sampler's random numbers, and what it makes of them.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};

use super::counted;
use crate::Refusal;
use crate::sample::GivenNoise;

/// (pictures, C, h, w).
pub type Shape = [usize; 4];

/// Reads the start and the noise of `stochastic` steps. A [`Refusal`] if anything is missing or of another shape.
pub fn read(file: &Path, shape: Shape, stochastic: usize) -> Result<GivenNoise> {
    let shown = file.display();
    let refused = |what: String| Refusal::error(format!("--latents {shown}: {what}"));
    if !file.is_file() {
        return Err(refused("there is no such file: name a safetensors file".to_string()));
    }
    let tensors = candle_core::safetensors::load(file, &Device::Cpu).map_err(|error| {
        refused(format!("it is no safetensors file ({error}): write it with safetensors' save_file"))
    })?;
    let known: Vec<&str> = tensors.keys().map(String::as_str).collect();
    if !tensors.contains_key("latents") {
        let known = if known.is_empty() { "nothing".to_string() } else { known.join(", ") };
        return Err(refused(format!(
            "it has no tensor latents (but {known}): add the start, standard normal, {shape:?}"
        )));
    }
    let mut problems = Vec::new();
    let start = values(&tensors, "latents", shape, &mut problems);
    let missing: Vec<String> =
        (0..stochastic).map(|step| format!("noise.{step}")).filter(|name| !tensors.contains_key(name)).collect();
    if let (Some(first), Some(last)) = (missing.first(), missing.last()) {
        let names = if missing.len() == 1 { first.clone() } else { format!("{first} … {last}") };
        problems.push(format!(
            "{stochastic} steps of this sampler take noise, and {} are missing ({names}): add them, or choose a sampler that draws none",
            missing.len()
        ));
    }
    let mut steps = BTreeMap::new();
    for step in 0..stochastic {
        let name = format!("noise.{step}");
        if tensors.contains_key(&name)
            && let Some(values) = values(&tensors, &name, shape, &mut problems)
        {
            steps.insert(step, values);
        }
    }
    match start {
        Some(start) if problems.is_empty() => Ok(GivenNoise { start, steps }),
        _ => {
            Err(Refusal { problems: problems.iter().map(|what| format!("--latents {shown}: {what}")).collect() }.into())
        }
    }
}

fn values(tensors: &HashMap<String, Tensor>, name: &str, shape: Shape, problems: &mut Vec<String>) -> Option<Vec<f32>> {
    let tensor = tensors.get(name)?;
    if tensor.dims() != shape {
        let [pictures, channels, height, width] = shape;
        problems.push(format!(
            "{name} has shape {:?}, and {shape:?} is wanted: {} of {channels} x {height} x {width} latents; change the \
             file, or the number of prompts, --num, --height and --width",
            tensor.dims(),
            counted(pictures, "picture")
        ));
        return None;
    }
    let read = || tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    match read() {
        Ok(values) if values.iter().all(|x| x.is_finite()) => Some(values),
        Ok(_) => {
            problems.push(format!("{name} holds numbers that are not finite: write it again"));
            None
        }
        Err(error) => {
            problems.push(format!("{name} cannot be read as numbers ({error}): write it as fp32"));
            None
        }
    }
}

/// Writes `latents`, whole or not at all.
pub fn write(path: &Path, latents: &[f32], shape: Shape) -> Result<()> {
    let writing = || format!("writing {}", path.display());
    let bytes: &[u8] = bytemuck::cast_slice(latents);
    let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes).with_context(writing)?;
    let data = safetensors::serialize([("latents", view)], None).with_context(writing)?;
    let aside = path.with_file_name(".writing-latents.safetensors");
    fs::write(&aside, data).and_then(|()| fs::rename(&aside, path)).with_context(writing)
}

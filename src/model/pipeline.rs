//! The rest of a pipeline beside what was trained: copied so that the output folder is a whole pipeline again.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::export::{sync_folder, write_json};
use super::names::Component;
use super::weight_files::{WeightName, file_names, is_pickle};
use crate::Refusal;

/// Which pipeline is exported, and what of it.
#[derive(Clone, Copy, Debug)]
pub struct PipelineExport<'a> {
    /// The pipeline that was loaded.
    pub model_dir: &'a Path,
    /// The variant that was loaded; empty: none.
    pub variant: &'a str,
    /// Components that a [`ComponentWriter`](super::ComponentWriter) writes.
    pub trained: &'a [Component],
    /// Leave the text encoder out: `[null, null]` in `model_index.json`.
    pub skip_text_encoder: bool,
}

/// A file to copy, and its name in the new folder.
type Copy = (PathBuf, String);

impl PipelineExport<'_> {
    /// Everything that would stop [`write_skeleton`](Self::write_skeleton), to be asked before anything is spent:
    /// a component that is not there, or whose weights are only there as pickles. Errors are [`Refusal`]s.
    pub fn check(&self) -> Result<()> {
        let mut problems = Vec::new();
        for folder in self.copied(&self.model_index()?) {
            let dir = self.model_dir.join(&folder);
            match dir.is_dir() {
                true => problems.extend(self.plan(&dir)?.err()),
                false => problems.push(format!("{}: no such folder, but model_index.json names it.", dir.display())),
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(Refusal { problems }.into()) }
    }

    /// Writes `model_index.json` and every component that was not trained: variant suffixes dropped, pickles left out,
    /// a scheduler's learned variance set to `fixed_small` (as the peer does).
    pub fn write_skeleton(&self, out: &Path) -> Result<()> {
        self.check()?;
        let mut index = self.model_index()?;
        for folder in self.copied(&index) {
            let (from, to) = (self.model_dir.join(&folder), out.join(&folder));
            std::fs::create_dir_all(&to).with_context(|| to.display().to_string())?;
            let copies = self.plan(&from)?.map_err(Refusal::error)?;
            for (source, name) in copies {
                copy(&source, &to.join(name))?;
            }
            sync_folder(&to)?;
        }
        if self.skip_text_encoder && index.get(Component::TextEncoder.name()).is_some() {
            index[Component::TextEncoder.name()] = json!([null, null]);
        }
        write_json(&out.join("model_index.json"), &index)?;
        sync_folder(out)
    }

    fn model_index(&self) -> Result<Value> {
        let path = self.model_dir.join("model_index.json");
        let shown = path.display();
        if !path.is_file() {
            return Err(Refusal::error(format!(
                "{shown}: no such file. model.path must be a pipeline's folder in diffusers layout."
            )));
        }
        let text = std::fs::read_to_string(&path).with_context(|| shown.to_string())?;
        let index: Value = serde_json::from_str(&text)
            .map_err(|e| Refusal::error(format!("{shown}: not valid JSON ({e}). Restore the model's own file.")))?;
        if index.is_object() { Ok(index) } else { Err(Refusal::error(format!("{shown}: not a JSON object."))) }
    }

    /// The components that are copied: named by `model_index.json` with a class, not trained, not left out.
    fn copied(&self, index: &Value) -> Vec<String> {
        let text_encoder = Component::TextEncoder.name();
        let left_out = |name: &str| {
            self.trained.iter().any(|c| c.name() == name) || (self.skip_text_encoder && name == text_encoder)
        };
        let named = |class: &Value| class.as_array().is_some_and(|c| c.len() == 2 && c.iter().all(Value::is_string));
        let entries = index.as_object().into_iter().flatten();
        entries.filter(|(name, class)| named(class) && !left_out(name)).map(|(name, _)| name.clone()).collect()
    }

    /// What to copy of a component's folder; Err is why it cannot be copied.
    fn plan(&self, dir: &Path) -> Result<std::result::Result<Vec<Copy>, String>> {
        let names = file_names(dir)?;
        let weights: Vec<WeightName> = names.iter().filter_map(|name| WeightName::parse(name)).collect();
        let variants: BTreeSet<&str> = weights.iter().map(|w| w.variant.as_str()).collect();
        let folder = dir.display();
        let variant = match (variants.contains(self.variant), variants.contains(""), variants.first()) {
            (true, ..) => self.variant,
            (_, true, _) => "",
            (_, _, Some(only)) if variants.len() == 1 => only,
            (_, _, Some(_)) => {
                let known: Vec<_> = variants.into_iter().collect();
                let known = known.join(", ");
                return Ok(Err(format!("{folder}: weights in several variants ({known}). Set model.variant to one.")));
            }
            (_, _, None) => match names.iter().find(|name| is_pickle(name)) {
                Some(pickle) => {
                    return Ok(Err(format!(
                        "{folder}: the weights are only there as a pickle ({pickle}), which is not copied. Convert them \
                         to safetensors with the component's from_pretrained and save_pretrained in Python."
                    )));
                }
                None => "",
            },
        };
        let mut copies = Vec::new();
        for name in &names {
            let source = dir.join(name);
            match WeightName::parse(name) {
                Some(weight) if weight.variant == variant => copies.push((source, weight.plain())),
                Some(_) => {}
                None if source.is_file() && !is_pickle(name) => copies.push((source, name.clone())),
                None => {}
            }
        }
        Ok(Ok(copies))
    }
}

/// Copies one file; indices and schedulers change on the way.
fn copy(source: &Path, target: &Path) -> Result<()> {
    let shown = || format!("{} -> {}", source.display(), target.display());
    let name = target.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let is_index = WeightName::parse(name).is_some_and(|w| w.index);
    if name != "scheduler_config.json" && !is_index {
        // Not `fs::copy`, which makes the copy of a read-only file read-only.
        let mut file = File::create(target).with_context(shown)?;
        std::io::copy(&mut File::open(source).with_context(shown)?, &mut file).with_context(shown)?;
        return file.sync_all().with_context(shown);
    }
    let text = std::fs::read_to_string(source).with_context(shown)?;
    let mut json: Value = serde_json::from_str(&text).with_context(shown)?;
    if let Some(variance) = json.get_mut("variance_type")
        && variance.as_str().is_some_and(|v| v.starts_with("learned"))
    {
        *variance = "fixed_small".into();
    }
    if let Some(map) = json.get_mut("weight_map").and_then(Value::as_object_mut) {
        for file in map.values_mut() {
            if let Some(plain) = file.as_str().and_then(WeightName::parse) {
                *file = plain.plain().into();
            }
        }
    }
    write_json(target, &json)
}

#[cfg(test)]
mod tests {
    use super::super::weights::tests::write_file;
    use super::*;

    /// A pipeline of a UNet (trained), a frozen VAE with two variants, a text encoder in one, and a scheduler.
    fn pipeline() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let classes = json!({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
            "scheduler": ["diffusers", "DDPMScheduler"], "safety_checker": [null, null]});
        std::fs::write(dir.path().join("model_index.json"), classes.to_string()).unwrap();
        for folder in ["unet", "vae", "text_encoder", "scheduler"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let path = |file: &str| dir.path().join(file);
        std::fs::write(path("unet/diffusion_pytorch_model.bin"), "").unwrap();
        std::fs::write(path("vae/config.json"), "{}").unwrap();
        std::fs::write(path("vae/diffusion_pytorch_model.bin"), "").unwrap();
        write_file(&path("vae/diffusion_pytorch_model.safetensors"), &[("wide", &[2])]);
        write_file(&path("vae/diffusion_pytorch_model.fp16.safetensors"), &[("narrow", &[2])]);
        write_file(&path("text_encoder/model.fp16-00001-of-00001.safetensors"), &[("a", &[2])]);
        let index = json!({"weight_map": {"a": "model.fp16-00001-of-00001.safetensors"}});
        std::fs::write(path("text_encoder/model.safetensors.index.fp16.json"), index.to_string()).unwrap();
        let scheduler = json!({"variance_type": "learned_range", "beta_end": 0.02});
        std::fs::write(path("scheduler/scheduler_config.json"), scheduler.to_string()).unwrap();
        dir
    }

    fn export<'a>(dir: &'a tempfile::TempDir, variant: &'a str, skip_text_encoder: bool) -> PipelineExport<'a> {
        PipelineExport { model_dir: dir.path(), variant, trained: &[Component::Unet], skip_text_encoder }
    }

    #[test]
    fn frozen_parts_are_copied_without_variants_and_pickles() {
        let (from, to) = (pipeline(), tempfile::tempdir().unwrap());
        export(&from, "fp16", false).write_skeleton(to.path()).unwrap();
        assert!(!to.path().join("unet").exists());
        assert_eq!(file_names(&to.path().join("vae")).unwrap(), ["config.json", "diffusion_pytorch_model.safetensors"]);
        let narrow = std::fs::read(to.path().join("vae/diffusion_pytorch_model.safetensors")).unwrap();
        assert!(String::from_utf8_lossy(&narrow).contains("narrow"));
        let shard = "model-00001-of-00001.safetensors";
        assert_eq!(file_names(&to.path().join("text_encoder")).unwrap(), [shard, "model.safetensors.index.json"]);
        let read = |file: &str| std::fs::read_to_string(to.path().join(file)).unwrap();
        assert!(read("text_encoder/model.safetensors.index.json").contains(shard));
        assert!(read("scheduler/scheduler_config.json").contains("fixed_small"));
        assert!(read("model_index.json").contains("CLIPTextModel"));
    }

    #[test]
    fn the_text_encoder_can_be_left_out() {
        let (from, to) = (pipeline(), tempfile::tempdir().unwrap());
        export(&from, "", true).write_skeleton(to.path()).unwrap();
        assert!(!to.path().join("text_encoder").exists());
        let index: Value =
            serde_json::from_str(&std::fs::read_to_string(to.path().join("model_index.json")).unwrap()).unwrap();
        assert_eq!(index["text_encoder"], json!([null, null]));
        let wide = std::fs::read(to.path().join("vae/diffusion_pytorch_model.safetensors")).unwrap();
        assert!(String::from_utf8_lossy(&wide).contains("wide"));
    }

    #[test]
    fn what_cannot_be_exported_is_known_before() {
        let from = pipeline();
        export(&from, "", false).check().unwrap();
        std::fs::remove_dir_all(from.path().join("scheduler")).unwrap();
        for file in ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"] {
            std::fs::remove_file(from.path().join("vae").join(file)).unwrap();
        }
        let refusal = export(&from, "", false).check().unwrap_err().downcast::<Refusal>().unwrap();
        let text = refusal.to_string();
        assert_eq!(refusal.problems.len(), 2, "{text}");
        assert!(text.contains("scheduler: no such folder") && text.contains("pickle"), "{text}");
    }
}

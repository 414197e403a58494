//! `[model]`: which pipeline, from where, and on which device.

use std::path::PathBuf;

use super::plan::Writer;
use super::reader::Reader;

#[derive(Clone, Debug, PartialEq)]
pub struct ModelPlan {
    pub source: ModelSource,
    /// Weight files of this variant (`….fp16.safetensors`) are preferred.
    pub variant: Option<String>,
    pub train_text_encoder: bool,
    pub device: DeviceKind,
}

/// Where a pipeline in diffusers' layout is.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelSource {
    Folder(PathBuf),
    /// `owner/name` on the Hub; `hub::fetch` makes a folder of it.
    Hub {
        id: String,
        /// A branch, tag or commit; the main branch if none.
        revision: Option<String>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    Cpu,
    Cuda,
}

impl ModelPlan {
    pub(super) fn read(section: &Reader) -> Self {
        let remedy = "write path = \"…\" under [model], a folder in diffusers' layout or a model's id on the Hub";
        let path = section.required_path("path", remedy);
        let revision = section.text("revision").filter(|text| !text.is_empty());
        Self {
            source: ModelSource::of(path, revision),
            variant: section.text("variant").filter(|text| !text.is_empty()),
            train_text_encoder: section.flag("train_text_encoder", false),
            device: device(section),
        }
    }

    pub(super) fn write(&self) -> toml::Table {
        let section = match &self.source {
            ModelSource::Folder(path) => Writer::default().put_path("path", path),
            ModelSource::Hub { id, revision } => {
                Writer::default().put("path", id.clone()).put_some("revision", revision.clone())
            }
        };
        section
            .put_some("variant", self.variant.clone())
            .put("train_text_encoder", self.train_text_encoder)
            .put(
                "device",
                match self.device {
                    DeviceKind::Cpu => "cpu",
                    DeviceKind::Cuda => "cuda",
                },
            )
            .finish()
    }
}

impl ModelSource {
    /// A path that exists is itself; one that begins with `.`, `/` or `~`, or has more parts than `owner/name`, can
    /// only be a folder; what is left may be a Hub id.
    pub fn of(path: PathBuf, revision: Option<String>) -> Self {
        let text = path.to_string_lossy();
        let is_name = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        let looks_like_id = text.split('/').count() <= 2 && text.split('/').all(is_name);
        if looks_like_id && !path.exists() {
            return ModelSource::Hub { id: text.into_owned(), revision };
        }
        ModelSource::Folder(path)
    }
}

/// "auto" is a GPU if this build can use one and one is there, else the CPU.
fn device(section: &Reader) -> DeviceKind {
    let asked = section.text("device").unwrap_or_else(|| "auto".to_string());
    match asked.as_str() {
        "auto" if crate::device::gpu(0).is_ok() => DeviceKind::Cuda,
        "auto" => DeviceKind::Cpu,
        "cuda" => match crate::device::gpu(0) {
            Ok(_) => DeviceKind::Cuda,
            Err(why) => {
                section.reject("device", &format!("{why}. \"cpu\" and \"auto\" work everywhere"));
                DeviceKind::Cpu
            }
        },
        _ => section
            .pick(
                "device",
                &asked,
                &[("auto", Ok(DeviceKind::Cpu)), ("cpu", Ok(DeviceKind::Cpu)), ("cuda", Ok(DeviceKind::Cuda))],
            )
            .unwrap_or(DeviceKind::Cpu),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_hub_ids_are_told_apart() {
        let source = |text: &str| ModelSource::of(PathBuf::from(text), None);
        let hub = |id: &str| ModelSource::Hub { id: id.to_string(), revision: None };
        assert_eq!(
            source("stable-diffusion-v1-5/stable-diffusion-v1-5"),
            hub("stable-diffusion-v1-5/stable-diffusion-v1-5")
        );
        assert_eq!(source("gpt2"), hub("gpt2"));
        for folder in ["./x", "/no/where", "a/b/c", "../m", "~/m", "a b/c", "src", "src/config", ""] {
            assert_eq!(source(folder), ModelSource::Folder(PathBuf::from(folder)), "{folder}");
        }
    }
}

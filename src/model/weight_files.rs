//! Names of weight files: variants, shards and indices.

use std::path::Path;

use anyhow::{Context, Result};

/// What a safetensors file's or index's name says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WeightName {
    pub stem: String,
    pub variant: String,
    /// `00001-of-00002`
    pub shard: Option<String>,
    /// The JSON index of a sharded model.
    pub index: bool,
}

impl WeightName {
    /// None if `file` is neither a safetensors file nor the index of some.
    pub fn parse(file: &str) -> Option<Self> {
        if let Some(rest) = file.strip_suffix(".json") {
            // `model.safetensors.index`, `model.safetensors.index.fp16`, `model.fp16.safetensors.index`
            let (base, after) = rest.split_once(".safetensors.index")?;
            let name = Self::parse(&format!("{base}.safetensors"))?;
            let variant = after.strip_prefix('.').map_or(name.variant, str::to_string);
            return Some(WeightName { variant, index: true, ..name });
        }
        // `model`, `model.fp16`, `model-00001-of-00002`, `model.fp16-00001-of-00002`, `model-00001-of-00002.fp16`
        let base = file.strip_suffix(".safetensors")?;
        let (stem, variant) = base.split_once('.').unwrap_or((base, ""));
        let (stem, shard_of_stem) = split_shard(stem);
        let (variant, shard_of_variant) = split_shard(variant);
        let shard = shard_of_stem.or(shard_of_variant).map(str::to_string);
        Some(WeightName { stem: stem.into(), variant: variant.into(), shard, index: false })
    }

    /// The file's name without the variant.
    pub fn plain(&self) -> String {
        let shard = self.shard.as_ref().map_or(String::new(), |s| format!("-{s}"));
        let end = if self.index { ".index.json" } else { "" };
        format!("{}{shard}.safetensors{end}", self.stem)
    }
}

/// `model-00001-of-00002` -> `model`, `00001-of-00002`
fn split_shard(name: &str) -> (&str, Option<&str>) {
    let digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    if let Some(at) = name.len().checked_sub(15)
        && let Some((stem, tail)) = name.split_at_checked(at)
        && let Some((number, total)) = tail.strip_prefix('-').and_then(|t| t.split_once("-of-"))
        && digits(number)
        && digits(total)
    {
        return (stem, Some(&tail[1..]));
    }
    (name, None)
}

/// Weights as Python pickles (or other frameworks' formats), which we neither read nor copy.
pub(crate) fn is_pickle(file: &str) -> bool {
    let file = file.strip_suffix(".index.json").unwrap_or(file);
    [".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5"].iter().any(|end| file.ends_with(end))
}

/// The names of the files in a folder, sorted.
pub(super) fn file_names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let entry = entry.with_context(|| dir.display().to_string())?;
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        for (file, stem, variant, plain) in [
            ("model.safetensors", "model", "", "model.safetensors"),
            ("model.fp16.safetensors", "model", "fp16", "model.safetensors"),
            ("a.non_ema.safetensors", "a", "non_ema", "a.safetensors"),
            ("a-00001-of-00002.safetensors", "a", "", "a-00001-of-00002.safetensors"),
            ("a.fp16-00001-of-00002.safetensors", "a", "fp16", "a-00001-of-00002.safetensors"),
            ("a-00001-of-00002.fp16.safetensors", "a", "fp16", "a-00001-of-00002.safetensors"),
            ("a.safetensors.index.json", "a", "", "a.safetensors.index.json"),
            ("a.safetensors.index.fp16.json", "a", "fp16", "a.safetensors.index.json"),
            ("a.fp16.safetensors.index.json", "a", "fp16", "a.safetensors.index.json"),
        ] {
            let name = WeightName::parse(file).unwrap();
            assert_eq!((name.stem.as_str(), name.variant.as_str()), (stem, variant), "{file}");
            assert_eq!(name.plain(), plain, "{file}");
            assert_eq!(name.index, file.ends_with(".json"));
        }
        assert_eq!(WeightName::parse("config.json"), None);
        assert!(is_pickle("pytorch_model.bin") && is_pickle("pytorch_model.bin.index.json") && !is_pickle("a.json"));
    }
}

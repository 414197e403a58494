//! Which files of a repository training needs, by their names alone.

use std::collections::HashSet;
use std::path::Path;

use serde_json::Value;

use crate::config::model_files::{
    COMPONENTS, Weights, choose_weights, other_variant_problem, pickle_problem, shards_of,
};

/// What training needs of a repository.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Wanted {
    pub files: Vec<String>,
    /// Weight indices; what they name is needed too.
    pub indices: Vec<String>,
    /// Whether all weights are of the variant that was asked for.
    pub exact: bool,
}

/// Picks from the repository's files `names`. A pipeline class that cannot be trained needs nothing but its
/// model_index.json, from which that can be said. Err: what is wrong, with remedies; `MODEL` stands for the model.
pub(super) fn wanted(names: &HashSet<String>, index: &Value, variant: Option<&str>) -> Result<Wanted, Vec<String>> {
    let mut wanted = Wanted { files: vec!["model_index.json".to_string()], exact: true, ..Wanted::default() };
    if index["_class_name"] != "StableDiffusionPipeline" {
        return Ok(wanted);
    }
    let mut problems = Vec::new();
    // Small, and part of what diffusers expects beside the weights; the safety checker is not fetched.
    let extra = "feature_extractor/preprocessor_config.json".to_string();
    wanted.files.extend(names.contains(&extra).then_some(extra));
    for (component, _, stem) in COMPONENTS {
        let prefix = format!("{component}/");
        let mut inside: Vec<String> =
            names.iter().filter_map(|name| name.strip_prefix(&prefix)).map(String::from).collect();
        inside.sort();
        let small = |name: &&String| match component {
            "tokenizer" => [".json", ".txt", ".model"].iter().any(|end| name.ends_with(end)),
            "scheduler" => *name == "scheduler_config.json",
            _ => *name == "config.json",
        };
        let has = |name: &str| inside.iter().any(|there| there == name);
        let complete = match component {
            "tokenizer" => has("tokenizer.json") || (has("vocab.json") && has("merges.txt")),
            "scheduler" => has("scheduler_config.json"),
            _ => has("config.json"),
        };
        if !complete {
            problems.push(format!("its folder {component} lacks its configuration: name a whole model"));
        }
        wanted.files.extend(inside.iter().filter(small).map(|name| format!("{prefix}{name}")));
        let Some(stem) = stem else { continue };
        let chosen = choose_weights(&inside, stem, variant);
        if let (Some(variant), Weights::Whole(name) | Weights::Index(name)) = (variant, &chosen) {
            wanted.exact &= name.contains(&format!(".{variant}."));
        }
        match chosen {
            Weights::Whole(name) => wanted.files.push(format!("{prefix}{name}")),
            Weights::Index(name) => wanted.indices.push(format!("{prefix}{name}")),
            Weights::Pickle(name) => problems.push(pickle_problem(&format!("{prefix}{name}"), "MODEL")),
            Weights::OtherVariant(name) => problems.push(other_variant_problem(&format!("{prefix}{name}"), &name)),
            Weights::Missing => {
                problems.push(format!("it has no {prefix}{stem}.safetensors: name a model that has one"))
            }
        }
    }
    wanted.files.extend(wanted.indices.iter().cloned());
    if problems.is_empty() { Ok(wanted) } else { Err(problems) }
}

/// The files that the index `name` with the text `index` names, from the repository's root.
pub(super) fn beside(name: &str, index: &str) -> Option<Vec<String>> {
    let (folder, _) = name.rsplit_once('/')?;
    Some(shards_of(index)?.into_iter().map(|shard| format!("{folder}/{shard}")).collect())
}

/// The files in `folder` and its folders, as the Hub names them.
pub(super) fn names_in(folder: &Path) -> HashSet<String> {
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let inside = entries(folder).flat_map(|path| if path.is_dir() { entries(&path).collect() } else { vec![path] });
    // `exists` follows links: a link into the cache whose file is gone is no file.
    inside
        .filter(|path| path.exists())
        .filter_map(|path| Some(path.strip_prefix(folder).ok()?.to_str()?.to_string()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: [&str; 14] = [
        "README.md",
        "model_index.json",
        "feature_extractor/preprocessor_config.json",
        "safety_checker/model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ];

    fn of(names: &[&str], variant: Option<&str>) -> Result<Wanted, Vec<String>> {
        let index = serde_json::json!({"_class_name": "StableDiffusionPipeline"});
        wanted(&names.iter().map(|name| name.to_string()).collect(), &index, variant)
    }

    #[test]
    fn only_what_training_needs_is_wanted() {
        let plain = of(&WHOLE, None).unwrap();
        assert_eq!(plain.indices, ["unet/diffusion_pytorch_model.safetensors.index.json"]);
        assert!(plain.exact && plain.files.len() == 11, "{:?}", plain.files);
        assert!(
            !plain.files.iter().any(|name| name.starts_with("safety") || name.contains("fp16") || name == "README.md")
        );
        let half = of(&WHOLE, Some("fp16")).unwrap();
        assert!(half.indices.is_empty() && !half.exact);
        assert!(half.files.contains(&"unet/diffusion_pytorch_model.fp16.safetensors".to_string()));
    }

    #[test]
    fn what_is_not_whole_or_a_pickle_is_told() {
        let mut names = WHOLE.to_vec();
        names.retain(|name| !name.starts_with("text_encoder/model") && *name != "scheduler/scheduler_config.json");
        names.push("text_encoder/pytorch_model.bin");
        let problems = of(&names, None).unwrap_err();
        assert_eq!(problems.len(), 2);
        assert!(problems[0].contains("text_encoder/pytorch_model.bin") && problems[0].contains("save_pretrained"));
        assert!(problems[1].contains("scheduler"));
    }

    #[test]
    fn a_class_that_cannot_be_trained_needs_no_download() {
        let index = serde_json::json!({"_class_name": "FluxPipeline"});
        assert_eq!(wanted(&HashSet::new(), &index, None).unwrap().files, ["model_index.json"]);
    }
}

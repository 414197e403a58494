//! Which files of a repository training needs, by their names alone.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use serde_json::Value;

use crate::model::{WeightName, is_pickle};

/// What training needs of a repository.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Wanted {
    pub files: Vec<String>,
    /// Those of `files` that are weight indices; what they name is needed too.
    pub indices: Vec<String>,
}

/// Picks from the repository's files `names`: of every component that the pipeline's `index` names, the small files
/// and the safetensors of `variant` (empty: none). All components, since the trained pipeline will hold them all. A
/// pipeline class that cannot be trained needs nothing but its model_index.json, from which that can be said. Err: what
/// is wrong, with remedies; `MODEL` stands for the model.
pub(super) fn wanted(names: &HashSet<String>, index: &Value, variant: &str) -> Result<Wanted, Vec<String>> {
    let mut wanted = Wanted { files: vec!["model_index.json".to_string()], ..Wanted::default() };
    if index["_class_name"] != "StableDiffusionPipeline" {
        return Ok(wanted);
    }
    let mut problems = Vec::new();
    let components = index.as_object().into_iter().flatten().filter(|(_, class)| class[1].is_string());
    for (component, _) in components {
        let prefix = format!("{component}/");
        let inside: BTreeSet<&str> = names.iter().filter_map(|name| name.strip_prefix(&prefix)).collect();
        if inside.is_empty() {
            problems
                .push(format!("it has no folder {component}, which its model_index.json names: name a whole model"));
            continue;
        }
        let is_small = |name: &str| {
            let end = [".json", ".txt", ".model"].iter().any(|end| name.ends_with(end));
            end && !name.contains('/') && WeightName::parse(name).is_none() && !is_pickle(name)
        };
        wanted.files.extend(inside.iter().filter(|name| is_small(name)).map(|name| format!("{prefix}{name}")));
        match weights(&inside, variant, ["unet", "vae", "text_encoder"].contains(&component.as_str())) {
            Ok(None) => {}
            Ok(Some(file)) => {
                let path = format!("{prefix}{file}");
                if file.ends_with(".json") {
                    wanted.indices.push(path.clone());
                }
                wanted.files.push(path);
            }
            Err(why) => problems.push(format!("{component}: {why}")),
        }
    }
    if problems.is_empty() { Ok(wanted) } else { Err(problems) }
}

/// The weight file or index of one component; none where it has no weights. Where `strict`, only `variant` will do,
/// else another is taken in its place: the one without a name, or the only one.
fn weights<'a>(inside: &BTreeSet<&'a str>, variant: &str, strict: bool) -> Result<Option<&'a str>, String> {
    let parsed = |name: &&'a str| Some((WeightName::parse(name)?, *name));
    // What diffusers and transformers call weights; a file of another stem is something else.
    let ours = |(name, _): &(WeightName, &str)| ["diffusion_pytorch_model", "model"].contains(&name.stem.as_str());
    let found: Vec<(WeightName, &str)> = inside.iter().filter_map(parsed).filter(ours).collect();
    let variants: BTreeSet<&str> = found.iter().map(|(name, _)| name.variant.as_str()).collect();
    let variant = match variants.first() {
        _ if variants.contains(variant) => variant,
        Some(only) if !strict && (only.is_empty() || variants.len() == 1) => only,
        Some(_) => {
            let known: Vec<_> = variants.iter().map(|name| format!("variant = \"{name}\"")).collect();
            return Err(format!("no weights of variant \"{variant}\": write {} under [model]", known.join(" or ")));
        }
        None => match inside.iter().find(|name| is_pickle(name)) {
            Some(pickle) => return Err(pickle_problem(pickle)),
            None if strict => return Err("there are no weights: name a whole model".to_string()),
            None => return Ok(None),
        },
    };
    let of = |index: bool| {
        found.iter().find(|(name, _)| name.variant == variant && name.index == index && name.shard.is_none())
    };
    // The single file where there is both: then there is nothing to put together.
    match of(false).or_else(|| of(true)) {
        Some((_, file)) => Ok(Some(file)),
        None => Err("its weights are in pieces, and the index of these is missing: name a whole model".to_string()),
    }
}

/// Why a pickle is not fetched, and how the model becomes one that is.
fn pickle_problem(file: &str) -> String {
    format!(
        "the weights are only there as a Python pickle ({file}), which can run code when it is read, so only safetensors \
         are: convert the model once with python -c \"from diffusers import DiffusionPipeline as D; \
         D.from_pretrained('MODEL').save_pretrained('converted')\" and give that folder as model.path"
    )
}

/// The files that the weight index `name` with the text `index` names, from the repository's root, each once. None if
/// it is no such index, or names something outside its folder.
pub(super) fn beside(name: &str, index: &str) -> Option<Vec<String>> {
    let (folder, _) = name.rsplit_once('/')?;
    let index: Value = serde_json::from_str(index).ok()?;
    let shards: Option<BTreeSet<&str>> = index.get("weight_map")?.as_object()?.values().map(Value::as_str).collect();
    let shards = shards?;
    let plain = |name: &&str| !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\']);
    shards.iter().all(plain).then(|| shards.iter().map(|shard| format!("{folder}/{shard}")).collect())
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

    const WHOLE: [&str; 15] = [
        "README.md",
        "model_index.json",
        "feature_extractor/preprocessor_config.json",
        "safety_checker/config.json",
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

    fn of(names: &[&str], variant: &str) -> Result<Wanted, Vec<String>> {
        let mut index = serde_json::json!({"_class_name": "StableDiffusionPipeline", "image_encoder": [null, null]});
        for name in ["feature_extractor", "safety_checker", "scheduler", "tokenizer", "text_encoder", "unet", "vae"] {
            index[name] = serde_json::json!(["library", "Class"]);
        }
        wanted(&names.iter().map(|name| name.to_string()).collect(), &index, variant)
    }

    #[test]
    fn only_what_training_needs_is_wanted() {
        let plain = of(&WHOLE, "").unwrap();
        assert_eq!(plain.indices, ["unet/diffusion_pytorch_model.safetensors.index.json"]);
        let left_out: Vec<&str> = WHOLE.into_iter().filter(|name| !plain.files.contains(&name.to_string())).collect();
        assert_eq!(left_out, ["README.md", "unet/diffusion_pytorch_model.fp16.safetensors"]);
    }

    #[test]
    fn a_variant_is_wanted_where_training_reads_it_and_replaced_elsewhere() {
        let problems = of(&WHOLE, "fp16").unwrap_err();
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(
            problems[0].starts_with("text_encoder: no weights of variant \"fp16\"")
                && problems[0].contains("variant = \"\"")
        );
        let mut names = WHOLE.to_vec();
        names.extend(["text_encoder/model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"]);
        let half = of(&names, "fp16").unwrap();
        assert!(half.indices.is_empty());
        assert!(half.files.contains(&"safety_checker/model.safetensors".to_string()));
        assert!(half.files.contains(&"vae/diffusion_pytorch_model.fp16.safetensors".to_string()));
        assert!(!half.files.contains(&"vae/diffusion_pytorch_model.safetensors".to_string()));
    }

    #[test]
    fn what_is_not_whole_or_a_pickle_is_told() {
        let mut names = WHOLE.to_vec();
        names.retain(|name| !name.starts_with("text_encoder/model") && !name.starts_with("scheduler/"));
        names.push("text_encoder/pytorch_model.bin");
        let problems = of(&names, "").unwrap_err();
        assert_eq!(problems.len(), 2);
        assert!(problems[0].contains("no folder scheduler"), "{problems:?}");
        assert!(problems[1].contains("pytorch_model.bin") && problems[1].contains("save_pretrained"), "{problems:?}");
    }

    #[test]
    fn a_class_that_cannot_be_trained_needs_no_download() {
        let index = serde_json::json!({"_class_name": "FluxPipeline", "unet": ["diffusers", "X"]});
        assert_eq!(wanted(&HashSet::new(), &index, "").unwrap().files, ["model_index.json"]);
    }

    #[test]
    fn an_index_names_each_shard_once_and_none_outside_the_folder() {
        let index = r#"{"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}"#;
        assert_eq!(beside("unet/i.json", index).unwrap(), ["unet/m-1.safetensors", "unet/m-2.safetensors"]);
        assert_eq!(beside("unet/i.json", r#"{"weight_map": {"a": "../m.safetensors"}}"#), None);
        assert_eq!(beside("unet/i.json", "[]"), None);
    }
}

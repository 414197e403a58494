//! What can be said about a pipeline folder in diffusers' layout without reading its weights: the classes it names,
//! the files they need, and from the weight files' headers how many parameters there are. Shapes and names of tensors
//! are the model's own business.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::model_files::{COMPONENTS, Weights, choose_weights, other_variant_problem, pickle_problem, shards_of};

/// What was learnt of a pipeline folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelFacts {
    pub class: String,
    pub unet_parameters: u64,
    pub text_encoder_parameters: u64,
    /// Bytes of all weight files.
    pub weight_bytes: u64,
}

/// Looks through `folder`; what is missing or wrong is added to `problems`, each naming the file.
pub(crate) fn inspect(folder: &Path, variant: Option<&str>, problems: &mut Vec<String>) -> ModelFacts {
    let mut facts = ModelFacts::default();
    let index_path = folder.join("model_index.json");
    let index = match read_json(&index_path) {
        Ok(index) => index,
        Err(why) => {
            problems.push(format!(
                "{why}: a model is a folder in diffusers' layout, with model_index.json and a folder for each part; \
                 diffusers' scripts/convert_original_stable_diffusion_to_diffusers.py makes one of a single checkpoint file"
            ));
            return facts;
        }
    };
    facts.class = index["_class_name"].as_str().unwrap_or_default().to_string();
    if facts.class != "StableDiffusionPipeline" {
        problems.push(format!(
            "{}: this is a {}, and only StableDiffusionPipeline (Stable Diffusion 1.x and 2.x) can be trained yet: use such a model",
            index_path.display(),
            if facts.class.is_empty() { "folder that names no pipeline class" } else { &facts.class }
        ));
        return facts;
    }
    let mut of_variant = false;
    for (name, classes, stem) in COMPONENTS {
        let class = index[name][1].as_str();
        if class.is_none_or(|class| !classes.is_empty() && !classes.contains(&class)) {
            problems.push(format!(
                "{}: its {name} is {}, and {} is what can be trained: use a model that has one",
                index_path.display(),
                class.unwrap_or("missing"),
                if classes.is_empty() { "a scheduler of diffusers".to_string() } else { classes.join(" or ") }
            ));
            continue;
        }
        component_files(folder, name, problems);
        if let Some(stem) = stem {
            let files = weight_files(folder, name, stem, variant, problems);
            of_variant |= variant.is_some_and(|variant| files.iter().any(|file| is_of(file, variant)));
            for file in files {
                match count_elements(&file) {
                    Ok((elements, bytes)) => {
                        facts.weight_bytes += bytes;
                        match name {
                            "unet" => facts.unet_parameters += elements,
                            "text_encoder" => facts.text_encoder_parameters += elements,
                            _ => {}
                        }
                    }
                    Err(why) => problems.push(format!("{}: {why}: copy or download the file again", file.display())),
                }
            }
        }
    }
    if let Some(variant) = variant.filter(|_| !of_variant && problems.is_empty()) {
        problems.push(format!(
            "{}: no weight file of this model is of variant \"{variant}\": leave variant out, or use one that is there",
            folder.display()
        ));
    }
    facts
}

fn is_of(file: &Path, variant: &str) -> bool {
    file.file_name().is_some_and(|name| name.to_string_lossy().contains(&format!(".{variant}")))
}

/// The small files a component cannot do without.
fn component_files(folder: &Path, name: &str, problems: &mut Vec<String>) {
    let folder = folder.join(name);
    let have = |file: &str| folder.join(file).is_file();
    let missing = match name {
        "tokenizer" if have("tokenizer.json") || (have("vocab.json") && have("merges.txt")) => None,
        "tokenizer" => Some("tokenizer.json, nor vocab.json with merges.txt"),
        "scheduler" if have("scheduler_config.json") => None,
        "scheduler" => Some("scheduler_config.json"),
        _ if have("config.json") => match read_json(&folder.join("config.json")) {
            Ok(_) => None,
            Err(why) => {
                problems.push(format!("{why}: copy or download the file again"));
                None
            }
        },
        _ => Some("config.json"),
    };
    if let Some(missing) = missing {
        let what = if folder.is_dir() { format!("has no {missing}") } else { "does not exist".to_string() };
        problems.push(format!(
            "{}: this part of the model {what}: copy or download the whole model again",
            folder.display()
        ));
    }
}

/// The weight files of one component, all of which exist.
fn weight_files(
    folder: &Path,
    name: &str,
    stem: &str,
    variant: Option<&str>,
    problems: &mut Vec<String>,
) -> Vec<PathBuf> {
    let part = folder.join(name);
    let names: Vec<String> = std::fs::read_dir(&part)
        .map(|entries| entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    let files = match choose_weights(&names, stem, variant) {
        Weights::Whole(file) => vec![file],
        Weights::Index(index) => {
            let shards = std::fs::read_to_string(part.join(&index)).ok().and_then(|text| shards_of(&text));
            match shards {
                Some(shards) => shards,
                None => {
                    let index = part.join(index);
                    problems.push(format!(
                        "{}: this is not an index of weight files: copy or download the file again",
                        index.display()
                    ));
                    return Vec::new();
                }
            }
        }
        Weights::Pickle(file) => {
            problems.push(pickle_problem(&part.join(file).display().to_string(), &folder.display().to_string()));
            return Vec::new();
        }
        Weights::OtherVariant(file) => {
            problems.push(other_variant_problem(&part.join(&file).display().to_string(), &file));
            return Vec::new();
        }
        Weights::Missing => {
            if part.is_dir() {
                problems.push(format!(
                    "{}: no weights here ({stem}.safetensors, or an index of several): copy or download the whole model again",
                    part.display()
                ));
            }
            return Vec::new();
        }
    };
    let (there, missing): (Vec<_>, Vec<_>) = files.iter().map(|file| part.join(file)).partition(|file| file.is_file());
    for file in missing {
        problems.push(format!(
            "{}: the index names this weight file, and it is not there: copy or download it",
            file.display()
        ));
    }
    there
}

/// Elements and bytes of a safetensors file by its header; an error says what is wrong with the file as a whole.
fn count_elements(path: &Path) -> Result<(u64, u64), String> {
    let broken = "this is not a safetensors file".to_string();
    let unreadable = |error: std::io::Error| format!("this weight file cannot be read ({error})");
    let mut file = File::open(path).map_err(unreadable)?;
    let bytes = file.metadata().map_err(unreadable)?.len();
    let mut length = [0u8; 8];
    file.read_exact(&mut length).map_err(|_| broken.clone())?;
    let length = u64::from_le_bytes(length);
    if length > bytes.saturating_sub(8) || length > 100 << 20 {
        return Err(broken);
    }
    let mut header = vec![0u8; length as usize];
    file.read_exact(&mut header).map_err(unreadable)?;
    let header: Value = serde_json::from_slice(&header).map_err(|_| broken.clone())?;
    let (mut elements, mut end) = (0u64, 0u64);
    for (_, tensor) in header.as_object().ok_or(broken.clone())?.iter().filter(|(name, _)| *name != "__metadata__") {
        let numbers =
            |key: &str| tensor[key].as_array().map(|list| list.iter().filter_map(Value::as_u64).collect::<Vec<_>>());
        let (shape, offsets) = numbers("shape").zip(numbers("data_offsets")).ok_or(broken.clone())?;
        elements += shape.iter().fold(1u64, |product, side| product.saturating_mul(*side));
        end = end.max(offsets.last().copied().unwrap_or(0));
    }
    let whole = end.saturating_add(8 + length);
    if whole > bytes {
        return Err(format!("this weight file is cut short ({bytes} bytes of {whole})"));
    }
    Ok((elements, bytes))
}

fn read_json(path: &Path) -> Result<Value, String> {
    let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => format!("{}: there is no such file", path.display()),
        _ => format!("{}: this file cannot be read ({error})", path.display()),
    })?;
    serde_json::from_str(&text).map_err(|error| format!("{}: this is not JSON ({error})", path.display()))
}

//! Which files a pipeline in diffusers' layout has, by name: for a folder here and for a repository on the Hub.

use serde_json::Value;

/// Parts of a pipeline that training needs: folder, class, the stem of its weight files (if it has weights).
pub(crate) const COMPONENTS: [(&str, &[&str], Option<&str>); 5] = [
    ("unet", &["UNet2DConditionModel"], Some("diffusion_pytorch_model")),
    ("vae", &["AutoencoderKL"], Some("diffusion_pytorch_model")),
    ("text_encoder", &["CLIPTextModel"], Some("model")),
    ("tokenizer", &["CLIPTokenizer", "CLIPTokenizerFast"], None),
    ("scheduler", &[], None),
];

/// What a component's folder offers as weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Weights {
    /// One file.
    Whole(String),
    /// An index, which names the files ([`shards_of`]).
    Index(String),
    /// Only files that run code when they are read; this is one of them.
    Pickle(String),
    /// Only safetensors of a variant that was not asked for; this is one of them.
    OtherVariant(String),
    Missing,
}

/// Picks the weight files among the names in a component's folder: `stem.VARIANT.safetensors`, then that variant's
/// index, then the same without a variant (diffusers' names; `diffusion_pytorch_model.safetensors.index.fp16.json` is
/// how it spells the index of a variant).
pub(crate) fn choose_weights(names: &[String], stem: &str, variant: Option<&str>) -> Weights {
    let there = |name: String| names.contains(&name).then_some(name);
    let of_variant = variant.and_then(|variant| {
        let whole = there(format!("{stem}.{variant}.safetensors")).map(Weights::Whole);
        let index = || there(format!("{stem}.safetensors.index.{variant}.json"));
        let older = || there(format!("{stem}.{variant}.safetensors.index.json"));
        whole.or_else(|| index().or_else(older).map(Weights::Index))
    });
    of_variant
        .or_else(|| there(format!("{stem}.safetensors")).map(Weights::Whole))
        .or_else(|| there(format!("{stem}.safetensors.index.json")).map(Weights::Index))
        .unwrap_or_else(|| {
            let find = |is: &dyn Fn(&str) -> bool| names.iter().find(|name| is(name)).cloned();
            let of_stem = |name: &str| name.starts_with(&format!("{stem}.")) && name.ends_with(".safetensors");
            let pickle = |name: &str| [".bin", ".ckpt", ".pt", ".pth"].iter().any(|end| name.ends_with(end));
            let other = find(&of_stem).map(Weights::OtherVariant);
            other.or_else(|| find(&pickle).map(Weights::Pickle)).unwrap_or(Weights::Missing)
        })
}

/// The files that a weight index names, sorted, each once. None if `index` is not such an index; a name that would
/// leave the folder makes it none.
pub(crate) fn shards_of(index: &str) -> Option<Vec<String>> {
    let index: Value = serde_json::from_str(index).ok()?;
    let mut names: Vec<String> = index
        .get("weight_map")?
        .as_object()?
        .values()
        .map(|name| name.as_str().map(String::from))
        .collect::<Option<_>>()?;
    names.sort();
    names.dedup();
    names.iter().all(|name| is_plain_name(name)).then_some(names)
}

/// Whether `name` is a file's name and nothing that leads elsewhere.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\'])
}

/// Why `file` is not read, and how `model` becomes one that is.
pub(crate) fn pickle_problem(file: &str, model: &str) -> String {
    format!(
        "{file}: these weights are a Python pickle, which can run code when it is read, so only safetensors are: convert the \
         model once with python -c \"from diffusers import DiffusionPipeline as D; \
         D.from_pretrained('{model}').save_pretrained('converted')\" and give that folder as model.path"
    )
}

/// Which variant to ask for, when `name` (at `file`) is the only kind of weights there.
pub(crate) fn other_variant_problem(file: &str, name: &str) -> String {
    let variant = name.trim_end_matches(".safetensors").split_once('.').map_or("", |(_, variant)| variant);
    format!("{file}: the weights here are of variant \"{variant}\" only: write variant = \"{variant}\" under [model]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_chosen_as_diffusers_names_them() {
        let choose = |names: &[&str], variant| {
            choose_weights(&names.iter().map(|name| name.to_string()).collect::<Vec<_>>(), "model", variant)
        };
        let plain = Weights::Whole("model.safetensors".to_string());
        let half = Weights::Whole("model.fp16.safetensors".to_string());
        let both = ["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"];
        assert_eq!(choose(&both, None), plain);
        assert_eq!(choose(&both, Some("fp16")), half);
        assert_eq!(choose(&both[..1], Some("fp16")), plain);
        assert_eq!(choose(&both[1..], None), Weights::OtherVariant("model.fp16.safetensors".to_string()));
        assert_eq!(choose(&both[2..], None), Weights::Pickle("pytorch_model.bin".to_string()));
        assert_eq!(choose(&["config.json"], None), Weights::Missing);
        let index = "model.safetensors.index.fp16.json";
        assert_eq!(choose(&[index], Some("fp16")), Weights::Index(index.to_string()));
    }

    #[test]
    fn an_index_names_each_shard_once_and_none_outside_the_folder() {
        let index = r#"{"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}"#;
        assert_eq!(shards_of(index).unwrap(), ["m-1.safetensors", "m-2.safetensors"]);
        assert_eq!(shards_of(r#"{"weight_map": {"a": "../m.safetensors"}}"#), None);
        assert_eq!(shards_of("[]"), None);
    }
}

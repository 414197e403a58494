//! A component's `config.json` -> what its graph is built from, with the defaults of diffusers' and transformers' own
//! classes for absent keys. What we do not build is refused with file, key and value, all problems of a file at once.

mod text;
mod unet;
mod vae;

pub use text::TextConfig;
pub use unet::{Level, UnetConfig};
pub use vae::VaeConfig;

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::Refusal;

/// Counts beyond these are damage: building what they ask for would take all memory.
const MOST: usize = 1 << 24;
const MOST_LAYERS: usize = 1000;

/// A number for all blocks, or one each.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

/// Reads one `config.json` key by key and collects what is wrong with it.
pub(super) struct Reader {
    file: String,
    map: Map<String, Value>,
    problems: Vec<String>,
}

impl Reader {
    /// `dir` is the component's folder. Errors are [`Refusal`]s.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let file = path.display().to_string();
        if !path.is_file() {
            return Err(Refusal::error(format!(
                "{file}: no such file. model.path must be a folder in diffusers layout, with one folder for each component."
            )));
        }
        let text = std::fs::read_to_string(&path).with_context(|| file.clone())?;
        match serde_json::from_str(&text) {
            Ok(Value::Object(map)) => Ok(Reader { file, map, problems: Vec::new() }),
            Ok(_) => Err(Refusal::error(format!("{file}: not a JSON object. Restore the model's own file."))),
            Err(e) => Err(Refusal::error(format!("{file}: not readable as JSON ({e}). Restore the model's own file."))),
        }
    }

    /// The value of `key`; `default` if it is absent or null.
    pub(super) fn get<T: DeserializeOwned>(&mut self, key: &str, default: T) -> T {
        self.optional(key).unwrap_or(default)
    }

    /// The value of `key`, if it is there and not null.
    pub(super) fn optional<T: DeserializeOwned>(&mut self, key: &str) -> Option<T> {
        let value = self.map.get(key).filter(|v| !v.is_null())?.clone();
        match serde_json::from_value(value) {
            Ok(value) => Some(value),
            Err(e) => {
                self.refuse(key, &format!("is not of the expected kind ({e})"));
                None
            }
        }
    }

    /// A width or a number of entries: at least one, and not more than any model has.
    pub(super) fn count(&mut self, key: &str, default: usize) -> usize {
        let n = self.get(key, default);
        if !(1..=MOST).contains(&n) {
            self.refuse(key, &format!("must be 1 to {MOST}"));
        }
        n.clamp(1, MOST)
    }

    /// A number of layers.
    pub(super) fn layers(&mut self, key: &str, default: usize) -> usize {
        self.layers_of(key, default, 1)[0]
    }

    /// Numbers of layers, for `n` blocks.
    pub(super) fn layers_of(&mut self, key: &str, default: usize, n: usize) -> Vec<usize> {
        let layers = self.each(key, default, n);
        if layers.iter().any(|layers| !(1..=MOST_LAYERS).contains(layers)) {
            self.refuse(key, &format!("must be 1 to {MOST_LAYERS}"));
        }
        layers.into_iter().map(|layers| layers.clamp(1, MOST_LAYERS)).collect()
    }

    /// `key` as one value for each of `n` blocks.
    pub(super) fn each<T: DeserializeOwned + Clone>(&mut self, key: &str, default: T, n: usize) -> Vec<T> {
        match self.get(key, OneOrMany::One(default.clone())) {
            OneOrMany::One(value) => vec![value; n],
            OneOrMany::Many(values) if values.len() == n => values,
            OneOrMany::Many(_) => {
                self.refuse(key, &format!("must have {n} entries, one for each block"));
                vec![default; n]
            }
        }
    }

    /// Counts, each at least one, for `n` blocks.
    pub(super) fn counts(&mut self, key: &str, default: usize, n: usize) -> Vec<usize> {
        let counts = self.each(key, default, n);
        if counts.iter().any(|count| !(1..=MOST).contains(count)) {
            self.refuse(key, &format!("must be 1 to {MOST}"));
        }
        counts.into_iter().map(|count| count.clamp(1, MOST)).collect()
    }

    /// Refuses any value of `key` but the `supported` ones. An absent key is supported; null is if `supported` has it.
    pub(super) fn only(&mut self, key: &str, supported: &[Value]) {
        let Some(value) = self.map.get(key) else { return };
        // 1 and 1.0 are the same setting.
        let same = |s: &Value| s == value || s.as_f64().zip(value.as_f64()).is_some_and(|(a, b)| a == b);
        if !supported.iter().any(same) {
            let known: Vec<_> = supported.iter().map(Value::to_string).collect();
            self.refuse(key, &format!("is not supported; supported: {}", known.join(", ")));
        }
    }

    /// Notes a problem with `key`; its value is added.
    pub(super) fn refuse(&mut self, key: &str, why: &str) {
        let value = self.map.get(key).map_or("absent".to_string(), Value::to_string);
        self.problems.push(format!("{}: {key} = {value}: {why}.", self.file));
    }

    /// The value, or everything that was wrong with the file.
    pub(super) fn finish<T>(self, value: T) -> Result<T> {
        if self.problems.is_empty() { Ok(value) } else { Err(Refusal { problems: self.problems }.into()) }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A component's folder with this configuration.
    pub(in crate::model) fn folder(config: Value) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        dir
    }

    #[test]
    fn every_problem_names_file_key_and_value() {
        let dir =
            folder(serde_json::json!({"layers": 0, "heads": [1, 2], "kind": "fancy", "scale": 1.0, "deep": 1_000_000}));
        let mut reader = Reader::open(dir.path()).unwrap();
        reader.count("layers", 2);
        reader.counts("heads", 1, 3);
        reader.only("kind", &["plain".into()]);
        reader.only("scale", &[1.into()]);
        reader.only("absent", &[1.into()]);
        reader.layers("deep", 1);
        let refusal = reader.finish(()).unwrap_err().downcast::<Refusal>().unwrap();
        assert_eq!(refusal.problems.len(), 4, "{refusal}");
        for (problem, (key, value)) in
            refusal.problems.iter().zip([("layers", "0"), ("heads", "[1,2]"), ("kind", "fancy"), ("deep", "1000000")])
        {
            assert!(problem.contains("config.json") && problem.contains(key) && problem.contains(value), "{problem}");
        }
    }
}

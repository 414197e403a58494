//! The weights of one component on disk: finding the files, checking them against a graph, reading ranges of tensors.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::codec;
use super::names::Component;
use super::tensor_file::{TensorFile, TensorRecord};
use super::weight_files::{WeightName, file_names, is_pickle};
use crate::Refusal;
use crate::segment::SegmentGraph;

/// A component's weight files, opened and checked in themselves. Tensors go by canonical names: the current spelling
/// of diffusers and transformers (CLIP's with `text_model.`) with the component in front.
pub struct ComponentWeights {
    pub(super) component: Component,
    pub(super) dir: PathBuf,
    pub(super) files: Vec<TensorFile>,
    /// The index of a sharded model.
    pub(super) index: Option<Value>,
    /// Canonical name -> (file, tensor).
    places: HashMap<String, (usize, usize)>,
}

impl ComponentWeights {
    /// Opens the safetensors files of `dir`, single or sharded. `variant` (such as `fp16`; empty: none) is the middle
    /// of the files' names. Errors are [`Refusal`]s with everything that is wrong.
    pub fn open(dir: &Path, variant: &str, component: Component) -> Result<Self> {
        let (paths, index) = find_files(dir, variant, component)?;
        let (mut files, mut problems) = (Vec::new(), Vec::new());
        for path in paths {
            match TensorFile::open(&path) {
                Ok(file) => files.push(file),
                Err(what) => problems.extend(what),
            }
        }
        let mut places = HashMap::new();
        for (f, file) in files.iter().enumerate() {
            for (t, tensor) in file.tensors.iter().enumerate() {
                if places.insert(component.canonical(&tensor.name), (f, t)).is_some() {
                    let path = file.path.display();
                    problems.push(format!("{path}: tensor {}: is there twice. Restore the file.", tensor.name));
                }
            }
        }
        if problems.is_empty() {
            Ok(ComponentWeights { component, dir: dir.to_path_buf(), files, index, places })
        } else {
            Err(Refusal { problems }.into())
        }
    }

    pub fn component(&self) -> Component {
        self.component
    }

    /// The tensor's name in the model's own file, without the component.
    pub fn name_in_file(&self, canonical: &str) -> Option<&str> {
        Some(&self.find(canonical)?.1.name)
    }

    /// Refuses missing tensors, wrong shapes, dtypes that we cannot read and tensors that nobody asked for, all at
    /// once. `wanted` are canonical names with shapes; [`wanted`] makes them from a graph.
    pub fn check(&self, wanted: &[(String, Vec<usize>)]) -> Result<()> {
        let mut problems = Vec::new();
        let folder = self.dir.display();
        for (name, shape) in wanted {
            let Some((file, tensor)) = self.find(name) else {
                problems.push(format!(
                    "{folder}: tensor {name} is missing. Weights and config.json do not belong together."
                ));
                continue;
            };
            let path = file.path.display();
            if !self.component.same_shape(name, &tensor.shape, shape) {
                problems.push(format!(
                    "{path}: tensor {} has shape {:?}, config.json asks for {shape:?}. \
                     Weights and config.json do not belong together.",
                    tensor.name, tensor.shape
                ));
            } else if !codec::supported(tensor.dtype) {
                problems.push(format!(
                    "{path}: tensor {} is {:?}; supported are F32, F16 and BF16. Convert the model to one of these.",
                    tensor.name, tensor.dtype
                ));
            }
        }
        let known: BTreeSet<&str> = wanted.iter().map(|(name, _)| name.as_str()).collect();
        for file in &self.files {
            for tensor in &file.tensors {
                let name = self.component.canonical(&tensor.name);
                if !known.contains(name.as_str()) && !self.component.is_extra(&name) {
                    let path = file.path.display();
                    problems.push(format!(
                        "{path}: tensor {} is not part of the network that config.json describes. \
                         Weights and config.json do not belong together.",
                        tensor.name
                    ));
                }
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(Refusal { problems: shortened(problems) }.into()) }
    }

    /// Elements `range` of a tensor, as fp32. Errors name file and tensor.
    pub fn read(&self, canonical: &str, range: Range<usize>, dst: &mut [f32]) -> Result<()> {
        let Some((file, tensor)) = self.find(canonical) else { bail!("{}: no tensor {canonical}", self.dir.display()) };
        if !codec::supported(tensor.dtype) || range.end > tensor.len() || range.len() != dst.len() {
            let (path, name, len) = (file.path.display(), &tensor.name, tensor.len());
            bail!("{path}: tensor {name}: elements {range:?} of {len} were asked for, {} are wanted", dst.len());
        }
        file.read(tensor, range.start, dst).with_context(|| format!("tensor {}", tensor.name))
    }

    /// A whole tensor, as fp32.
    pub fn read_all(&self, canonical: &str) -> Result<Vec<f32>> {
        let len = self.find(canonical).map_or(0, |(_, tensor)| tensor.len());
        let mut values = vec![0.0; len];
        self.read(canonical, 0..len, &mut values)?;
        Ok(values)
    }

    fn find(&self, canonical: &str) -> Option<(&TensorFile, &TensorRecord)> {
        let &(file, tensor) = self.places.get(canonical)?;
        let file = &self.files[file];
        Some((file, &file.tensors[tensor]))
    }
}

/// The tensors of `component` that a graph declares, with their shapes.
pub fn wanted(graph: &SegmentGraph, component: Component) -> Vec<(String, Vec<usize>)> {
    let entries = graph.nodes.iter().flat_map(|node| &node.params.layout().entries);
    let ours = entries.filter(|e| Component::of(&e.name) == Some(component));
    ours.map(|e| (e.name.clone(), e.shape.clone())).collect()
}

/// A wrong file has hundreds of problems of one kind; the first ones say it all.
fn shortened(mut problems: Vec<String>) -> Vec<String> {
    const SHOWN: usize = 20;
    if problems.len() > SHOWN {
        let more = problems.len() - SHOWN;
        problems.truncate(SHOWN);
        problems.push(format!("... and {more} more problems with these weights."));
    }
    problems
}

/// The files to read, and the index if there are several.
fn find_files(dir: &Path, variant: &str, component: Component) -> Result<(Vec<PathBuf>, Option<Value>)> {
    let folder = dir.display();
    if !dir.is_dir() {
        return Err(Refusal::error(format!(
            "{folder}: no such folder. model.path must be a folder in diffusers layout, with one folder for each component."
        )));
    }
    let files = file_names(dir)?;
    let ours: Vec<(WeightName, &String)> = files
        .iter()
        .filter_map(|file| Some((WeightName::parse(file)?, file)))
        .filter(|(name, _)| name.stem == component.stem())
        .collect();
    let of_variant = |index: bool| {
        ours.iter().find(|(name, _)| name.variant == variant && name.index == index && name.shard.is_none())
    };
    let (index, single) = (of_variant(true), of_variant(false));
    // With both, diffusers takes the shards and transformers the single file.
    let single_first = component == Component::TextEncoder || index.is_none();
    match (single, index) {
        (Some((_, file)), _) if single_first => Ok((vec![dir.join(file)], None)),
        (_, Some((_, file))) => shards(dir, file),
        _ => Err(Refusal::error(nothing_found(dir, variant, component, &ours, &files))),
    }
}

/// The shards that an index lists.
fn shards(dir: &Path, index: &str) -> Result<(Vec<PathBuf>, Option<Value>)> {
    let path = dir.join(index);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let shown = path.display();
    let broken = |why: &str| Refusal::error(format!("{shown}: {why}. Restore the model's own file."));
    let json: Value = serde_json::from_str(&text).map_err(|e| broken(&format!("not valid JSON ({e})")))?;
    let map = json.get("weight_map").and_then(Value::as_object).ok_or_else(|| broken("has no weight_map"))?;
    let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    if names.is_empty() || names.iter().any(|name| name.contains(['/', '\\'])) {
        return Err(broken("its weight_map names no files of this folder"));
    }
    let missing: Vec<String> = names
        .iter()
        .filter(|name| !dir.join(name).is_file())
        .map(|name| format!("{shown}: the shard {name} is missing. Download it too."))
        .collect();
    if !missing.is_empty() {
        return Err(Refusal { problems: missing }.into());
    }
    let paths = names.iter().map(|name| dir.join(name)).collect();
    Ok((paths, Some(json)))
}

/// Why there is nothing to read, and what to do.
fn nothing_found(
    dir: &Path,
    variant: &str,
    component: Component,
    ours: &[(WeightName, &String)],
    files: &[String],
) -> String {
    let folder = dir.display();
    let stem = component.stem();
    let wanted = match variant {
        "" => format!("{stem}.safetensors"),
        variant => format!("{stem}.{variant}.safetensors"),
    };
    if ours.iter().any(|(name, _)| name.variant == variant && name.shard.is_some()) {
        return format!(
            "{folder}: the shards of {wanted} are there, their index ({stem}.safetensors.index.json) is not. Download it too."
        );
    }
    let variants: BTreeSet<&str> = ours.iter().map(|(name, _)| name.variant.as_str()).collect();
    if !variants.is_empty() {
        let known: Vec<_> = variants.iter().map(|v| format!("\"{v}\"")).collect();
        return format!("{folder}: no {wanted}. Set model.variant to what is there: {}.", known.join(" or "));
    }
    let (library, class) = component.class();
    match files.iter().find(|file| is_pickle(file)) {
        Some(pickle) => format!(
            "{folder}: the weights are only there as a pickle ({pickle}), which can run code when read. Convert them with \
             Python: from {library} import {class}; {class}.from_pretrained(\"{folder}\").save_pretrained(\"{folder}\")"
        ),
        None => format!("{folder}: no {wanted}. Download the component's weights as safetensors."),
    }
}

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
    let text = crate::input_file::text(&path).with_context(|| path.display().to_string())?;
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;

    /// A safetensors file of fp32 zeros, ones, twos ... with these names and shapes.
    pub(in crate::model) fn write_file(path: &Path, tensors: &[(&str, &[usize])]) {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (i, (name, shape)) in tensors.iter().enumerate() {
            let begin = data.len();
            let len: usize = shape.iter().product();
            data.extend((0..len).flat_map(|x| ((i * 100 + x) as f32).to_le_bytes()));
            header
                .insert(name.to_string(), json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]}));
        }
        let header = Value::from(header).to_string();
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
        std::fs::write(path, bytes).unwrap();
    }

    fn refusal<T>(result: Result<T>) -> Refusal {
        let Err(error) = result else { panic!("it was accepted") };
        error.downcast::<Refusal>().unwrap()
    }

    fn named(names: &[(&str, &[usize])]) -> Vec<(String, Vec<usize>)> {
        names.iter().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect()
    }

    #[test]
    fn single_and_sharded_files_and_variants_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = |file: &str| dir.path().join(file);
        let open = |variant| ComponentWeights::open(dir.path(), variant, Component::Unet);
        write_file(&path("diffusion_pytorch_model.fp16.safetensors"), &[("a", &[2])]);
        let problem = refusal(open("")).to_string();
        assert!(problem.contains("model.variant") && problem.contains("\"fp16\""), "{problem}");
        assert_eq!(open("fp16").unwrap().read_all("unet.a").unwrap(), [0.0, 1.0]);

        write_file(&path("diffusion_pytorch_model-00001-of-00002.safetensors"), &[("b", &[2])]);
        write_file(&path("diffusion_pytorch_model-00002-of-00002.safetensors"), &[("x", &[1]), ("c", &[3])]);
        assert!(refusal(open("")).to_string().contains("index"));
        let shard = |n| format!("diffusion_pytorch_model-0000{n}-of-00002.safetensors");
        let index = json!({"metadata": {}, "weight_map": {"b": shard(1), "x": shard(2), "c": shard(2)}});
        std::fs::write(path("diffusion_pytorch_model.safetensors.index.json"), index.to_string()).unwrap();
        let mut two = [0.0; 2];
        open("").unwrap().read("unet.c", 1..3, &mut two).unwrap();
        assert_eq!(two, [101.0, 102.0]);
        std::fs::remove_file(path(&shard(2))).unwrap();
        assert!(refusal(open("")).to_string().contains(&shard(2)));
    }

    #[test]
    fn pickles_are_refused_with_the_way_to_convert_them() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
        let problem = refusal(ComponentWeights::open(dir.path(), "", Component::TextEncoder)).to_string();
        assert!(
            problem.contains("pytorch_model.bin") && problem.contains("CLIPTextModel.from_pretrained"),
            "{problem}"
        );
        let problem = refusal(ComponentWeights::open(&dir.path().join("none"), "", Component::Vae)).to_string();
        assert!(problem.contains("no such folder"), "{problem}");
    }

    #[test]
    fn every_wrong_tensor_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let tensors: [(&str, &[usize]); 4] =
            [("embeddings.position_ids", &[1, 3]), ("a", &[2, 3]), ("unknown", &[1]), ("b", &[4])];
        write_file(&dir.path().join("model.safetensors"), &tensors);
        let weights = ComponentWeights::open(dir.path(), "", Component::TextEncoder).unwrap();
        let name = |n: &str| format!("text_encoder.text_model.{n}");
        let (a, b, c) = (name("a"), name("b"), name("c"));
        let problems = refusal(weights.check(&named(&[(&a, &[3, 2]), (&b, &[4]), (&c, &[1])]))).problems;
        assert_eq!(problems.len(), 3, "{problems:?}");
        for (problem, parts) in
            problems.iter().zip([["a has shape [2, 3]", "[3, 2]"], [&c, "missing"], ["unknown", "not part"]])
        {
            assert!(parts.iter().all(|part| problem.contains(part)), "{problem}");
        }
        assert_eq!(weights.name_in_file(&a), Some("a"));
        assert!(weights.read(&a, 5..7, &mut [0.0; 2]).is_err());
    }

    #[test]
    fn damaged_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("diffusion_pytorch_model.safetensors");
        write_file(&path, &[("a", &[2]), ("b", &[300])]);
        let whole = std::fs::read(&path).unwrap();
        let open = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            refusal(ComponentWeights::open(dir.path(), "", Component::Vae)).to_string()
        };
        let cut = open(&whole[..whole.len() - 4]);
        assert!(cut.contains("truncated: tensor b") && cut.contains(path.to_str().unwrap()), "{cut}");
        assert!(open(&whole[..40]).contains("truncated: its header"));
        assert!(open(&whole[..3]).contains("truncated"));
        assert!(open(&[&whole[..], &[0]].concat()).contains("longer"));
        assert!(open(&[0xff; 100]).contains("not a safetensors file"));
        let text = |from: &str, to: &str| String::from_utf8_lossy(&whole).replace(from, to).into_bytes();
        assert!(open(&text("[300]", "[200]")).contains("tensor b: bytes"));
        assert!(open(&text("\"F32\"", "\"F99\"")).contains("unknown dtype"));
        std::fs::write(&path, &whole).unwrap();
        assert!(ComponentWeights::open(dir.path(), "", Component::Vae).is_ok());
    }
}

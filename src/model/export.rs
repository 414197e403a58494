//! Writing a trained component back: names, order and shards as they were read, dtype as asked for.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use anyhow::{Context, Result, bail};
use candle_core::DType;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::codec;
use super::names::Component;
use super::tensor_file::{TensorFile, TensorRecord};
use super::weight_files::WeightName;
use super::weights::ComponentWeights;

/// A component's folder being written. Tensors may come in any order, whole or in ranges, from several threads.
pub struct ComponentWriter {
    dir: PathBuf,
    dtype: Dtype,
    files: Vec<File>,
    places: HashMap<String, Place>,
}

/// A trained tensor in the new files.
struct Place {
    file: usize,
    /// From the beginning of the file, in bytes.
    begin: u64,
    len: usize,
    /// Elements written so far.
    written: AtomicUsize,
}

/// Bytes copied or encoded at a time.
const CHUNK: usize = 1 << 18;

impl ComponentWriter {
    /// Creates `dir` with `config.json` and weight files as those that were read, without a variant in their names.
    /// What the graph does not declare (`position_ids`, a VAE's decoder) is copied byte for byte; everything else is
    /// to be written. `save_dtype`: F32, F16 or BF16.
    pub fn create(dir: &Path, weights: &ComponentWeights, save_dtype: DType) -> Result<Self> {
        let dtype = match save_dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            other => bail!("weights cannot be saved as {other:?}"),
        };
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let mut writer = ComponentWriter { dir: dir.into(), dtype, files: Vec::new(), places: HashMap::new() };
        let mut total = 0;
        for source in &weights.files {
            total += writer.lay_out(source, weights.component)?;
        }
        if let Some(index) = &weights.index {
            writer.write_index(index, weights.component, total)?;
        }
        write_config(&weights.dir, dir, weights.component, save_dtype)?;
        Ok(writer)
    }

    /// Makes the new file for `source`, with its header and what is only copied. Returns its tensors' bytes.
    fn lay_out(&mut self, source: &TensorFile, component: Component) -> Result<u64> {
        let name = plain_name(&source.path)?;
        let mut tensors: Vec<(&TensorRecord, Dtype, bool)> = source
            .tensors
            .iter()
            .map(|t| match component.is_extra(&component.canonical(&t.name)) {
                true => (t, t.dtype, true),
                false => (t, self.dtype, false),
            })
            .collect();
        // Wide numbers first, so that every tensor is aligned to its own; the library's own files are so already.
        tensors.sort_by_key(|(_, dtype, _)| std::cmp::Reverse(dtype.bitsize()));
        let mut header = Map::new();
        let mut metadata = source.metadata.clone();
        metadata.entry("format").or_insert_with(|| "pt".into());
        header.insert("__metadata__".into(), metadata.into());
        let mut end = 0;
        let mut begins = Vec::with_capacity(tensors.len());
        for (tensor, dtype, _) in &tensors {
            let begin = end;
            end += (tensor.len() * dtype.bitsize() / 8) as u64;
            let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]});
            header.insert(tensor.name.clone(), entry);
            begins.push(begin);
        }
        let mut header = Value::from(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let data = 8 + header.len() as u64;

        let path = self.dir.join(name);
        let shown = || path.display().to_string();
        let file = File::create(&path).with_context(shown)?;
        file.write_all_at(&(header.len() as u64).to_le_bytes(), 0).with_context(shown)?;
        file.write_all_at(&header, 8).with_context(shown)?;
        file.set_len(data + end).with_context(shown)?;
        for ((tensor, _, copied), begin) in tensors.into_iter().zip(begins) {
            if copied {
                copy_bytes(source, tensor, &file, data + begin).with_context(shown)?;
            } else {
                let written = AtomicUsize::new(0);
                let place = Place { file: self.files.len(), begin: data + begin, len: tensor.len(), written };
                self.places.insert(component.canonical(&tensor.name), place);
            }
        }
        self.files.push(file);
        Ok(end)
    }

    fn write_index(&self, index: &Value, component: Component, total: u64) -> Result<()> {
        let mut index = index.clone();
        if let Some(metadata) = index.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.insert("total_size".into(), total.into());
        }
        if let Some(map) = index.get_mut("weight_map").and_then(Value::as_object_mut) {
            for file in map.values_mut() {
                *file = plain_name(Path::new(file.as_str().unwrap_or_default()))?.into();
            }
        }
        let path = self.dir.join(format!("{}.safetensors.index.json", component.stem()));
        write_json(&path, &index)
    }

    /// Writes elements of a tensor from `start` on.
    pub fn write(&self, canonical: &str, start: usize, values: &[f32]) -> Result<()> {
        let Some(place) = self.places.get(canonical) else { bail!("{}: no tensor {canonical}", self.dir.display()) };
        if start + values.len() > place.len {
            let (end, len) = (start + values.len(), place.len);
            bail!("{}: tensor {canonical}: elements {start} to {end} of {len}", self.dir.display());
        }
        let size = self.dtype.bitsize() / 8;
        let mut bytes = vec![0; CHUNK.min(values.len() * size)];
        let mut at = place.begin + (start * size) as u64;
        for chunk in values.chunks(CHUNK / size) {
            let bytes = &mut bytes[..chunk.len() * size];
            codec::encode(self.dtype, chunk, bytes);
            let written = self.files[place.file].write_all_at(bytes, at);
            written.with_context(|| format!("{}: writing tensor {canonical}", self.dir.display()))?;
            at += bytes.len() as u64;
        }
        place.written.fetch_add(values.len(), Relaxed);
        Ok(())
    }

    /// Makes sure that everything was written and is on the disk.
    pub fn finish(self) -> Result<()> {
        let folder = self.dir.display();
        let mut open: Vec<_> = self.places.iter().filter(|(_, p)| p.written.load(Relaxed) != p.len).collect();
        open.sort_by_key(|(name, _)| *name);
        if let Some((name, place)) = open.first() {
            let (done, len) = (place.written.load(Relaxed), place.len);
            bail!("{folder}: tensor {name}: {done} of {len} elements were written; {} tensors are so", open.len());
        }
        for file in &self.files {
            file.sync_all().with_context(|| folder.to_string())?;
        }
        sync_folder(&self.dir)
    }
}

/// A weight file's name without its variant.
fn plain_name(path: &Path) -> Result<String> {
    let name = path.file_name().and_then(|n| n.to_str()).and_then(WeightName::parse);
    Ok(name.with_context(|| format!("{}: not the name of a weight file", path.display()))?.plain())
}

fn copy_bytes(source: &TensorFile, tensor: &TensorRecord, file: &File, to: u64) -> Result<()> {
    let mut bytes = vec![0; CHUNK.min(tensor.bytes as usize)];
    let mut done = 0;
    while done < tensor.bytes {
        let n = bytes.len().min((tensor.bytes - done) as usize);
        source.read_bytes(tensor.begin + done, &mut bytes[..n])?;
        file.write_all_at(&bytes[..n], to + done)?;
        done += n as u64;
    }
    Ok(())
}

/// Copies `config.json`. Loaders of text encoders believe the dtype that it names, so it names the one that is saved.
fn write_config(from: &Path, to: &Path, component: Component, dtype: DType) -> Result<()> {
    let source = from.join("config.json");
    let text = std::fs::read_to_string(&source).with_context(|| source.display().to_string())?;
    let mut config: Value = serde_json::from_str(&text).with_context(|| source.display().to_string())?;
    let mut changed = false;
    if let (Component::TextEncoder, Some(config)) = (component, config.as_object_mut()) {
        let name = match dtype {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            _ => "float32",
        };
        for key in ["dtype", "torch_dtype"] {
            if let Some(value) = config.get_mut(key).filter(|value| *value != name) {
                *value = name.into();
                changed = true;
            }
        }
    }
    let path = to.join("config.json");
    if changed {
        return write_json(&path, &config);
    }
    write_synced(&path, text.as_bytes())
}

pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    write_synced(path, text.as_bytes())
}

/// Writes a small file and waits until it is on the disk.
fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let shown = || path.display().to_string();
    let file = File::create(path).with_context(shown)?;
    file.write_all_at(bytes, 0).with_context(shown)?;
    file.sync_all().with_context(shown)
}

/// Makes a folder's new entries last.
pub(super) fn sync_folder(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).with_context(|| dir.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::super::weights::tests::write_file;
    use super::*;

    #[test]
    fn a_component_comes_back_as_it_was_read() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(from.path().join("config.json"), r#"{"torch_dtype": "float16", "vocab_size": 3}"#).unwrap();
        let tensors: [(&str, &[usize]); 3] =
            [("z", &[3]), ("embeddings.position_ids", &[1, 5]), ("a.weight", &[70, 1000])];
        write_file(&from.path().join("model.fp16.safetensors"), &tensors);
        let source = ComponentWeights::open(from.path(), "fp16", Component::TextEncoder).unwrap();
        let (z, a) = ("text_encoder.text_model.z", "text_encoder.text_model.a.weight");
        let values: Vec<f32> = (0..70_000).map(|i| (i % 512) as f32 / 8.0).collect();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let writer = ComponentWriter::create(to.path(), &source, dtype).unwrap();
            writer.write(a, 50_000, &values[50_000..]).unwrap();
            writer.write(z, 0, &[1.0, 2.0, 3.0]).unwrap();
            assert!(writer.write(z, 2, &[1.0, 2.0]).is_err() && writer.write("text_encoder.b", 0, &[]).is_err());
            writer.write(a, 0, &values[..50_000]).unwrap();
            writer.finish().unwrap();
            let back = ComponentWeights::open(to.path(), "", Component::TextEncoder).unwrap();
            assert_eq!(back.read_all(z).unwrap(), [1.0, 2.0, 3.0]);
            let read = back.read_all(a).unwrap();
            // All values have eleven bits or fewer: only bf16 rounds them.
            let exact = |(x, y): (&f32, &f32)| if dtype == DType::BF16 { (x - y).abs() <= y / 256.0 } else { x == y };
            assert!(read.iter().zip(&values).all(exact));
            let positions = "text_encoder.text_model.embeddings.position_ids";
            assert_eq!(back.read_all(positions).unwrap(), source.read_all(positions).unwrap());
            assert_eq!(back.name_in_file(a), Some("a.weight"));
            assert_eq!(back.files[0].metadata["format"], "pt");
        }
        let config = std::fs::read_to_string(to.path().join("config.json")).unwrap();
        assert!(config.contains("\"bfloat16\"") && config.contains("vocab_size"), "{config}");
    }

    #[test]
    fn shards_stay_shards_and_forgotten_tensors_are_named() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(from.path().join("config.json"), "{ }").unwrap();
        let shard = |n| format!("diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors");
        write_file(&from.path().join(shard(1)), &[("a", &[2])]);
        write_file(&from.path().join(shard(2)), &[("b", &[2])]);
        let index = json!({"metadata": {"total_size": 1}, "weight_map": {"a": shard(1), "b": shard(2)}});
        let index_path = from.path().join("diffusion_pytorch_model.safetensors.index.fp16.json");
        std::fs::write(index_path, index.to_string()).unwrap();
        let source = ComponentWeights::open(from.path(), "fp16", Component::Unet).unwrap();
        let writer = ComponentWriter::create(to.path(), &source, DType::F32).unwrap();
        writer.write("unet.a", 0, &[1.0, 2.0]).unwrap();
        let forgotten = writer.finish().unwrap_err().to_string();
        assert!(forgotten.contains("unet.b"), "{forgotten}");
        let back = ComponentWeights::open(to.path(), "", Component::Unet).unwrap();
        assert_eq!(back.read_all("unet.a").unwrap(), [1.0, 2.0]);
        assert_eq!(back.files.len(), 2);
        assert_eq!(back.index.as_ref().unwrap()["metadata"]["total_size"], 16);
        assert_eq!(std::fs::read_to_string(to.path().join("config.json")).unwrap(), "{ }");
    }
}

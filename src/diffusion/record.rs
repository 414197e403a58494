//! A file of recorded draws: safetensors with tensors `KKKKKK.name`, one set a micro-batch, which a run replays instead
//! of drawing. Everything about the file is checked when it is opened; values are read when asked for, row by row, so
//! that a rank reads only its own. What the draws are used for is not here.

use crate::Refusal;
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An opened record.
#[derive(Debug)]
pub struct Record {
    source: Arc<Source>,
    micros: Vec<Micro>,
}

/// The draws of one micro-batch over all ranks; R = `rows()` rows: instances first, then their class rows, if any.
#[derive(Clone, Debug)]
pub struct MicroRecord {
    /// The items of the data set, B.
    pub index: Vec<i64>,
    /// R time steps, as recorded; whether they fit the schedule is the caller's to check.
    pub timesteps: Vec<i64>,
    /// (R, C, h, w); absent where the model has no VAE.
    pub vae_eps: Option<Rows>,
    /// (R, C, h, w).
    pub noise: Rows,
    /// (R, C, 1, 1).
    pub offset_noise: Option<Rows>,
    /// Top and left of each row's crop in the resized image; absent where nothing is cropped at random.
    pub crop: Option<Vec<(usize, usize)>>,
    /// (R, 3, H, W), what the peer's image pipeline gave.
    pub pixel_values: Option<Rows>,
}

/// An f32 tensor of a record whose first dimension counts rows.
#[derive(Clone, Debug)]
pub struct Rows {
    source: Arc<Source>,
    tensor: Tensor,
}

#[derive(Debug)]
struct Source {
    file: File,
    path: PathBuf,
}

#[derive(Clone, Debug)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    /// From the start of the file.
    offset: u64,
}

#[derive(Debug, Default)]
struct Micro {
    tensors: HashMap<String, Tensor>,
}

impl MicroRecord {
    /// R: the number of items, or twice that under prior preservation.
    pub fn rows(&self) -> usize {
        self.timesteps.len()
    }

    /// B: the number of items.
    pub fn items(&self) -> usize {
        self.index.len()
    }

    pub fn has_class_rows(&self) -> bool {
        self.rows() > self.items()
    }
}

impl Rows {
    /// All dimensions, rows first.
    pub fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    /// The number of values of one row.
    pub fn row_len(&self) -> usize {
        self.tensor.shape[1..].iter().product()
    }

    /// The values of row `r`.
    ///
    /// # Errors
    /// The file cannot be read any more. A row beyond the last is a programming error and panics.
    pub fn row(&self, r: usize) -> Result<Vec<f32>> {
        assert!(r < self.tensor.shape[0], "row {r} of {} rows", self.tensor.shape[0]);
        let bytes = self.source.read(&self.tensor, r * self.row_len() * 4, self.row_len() * 4)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }
}

/// What a run takes from a record.
#[derive(Clone, Copy, Debug)]
pub struct RecordUse {
    /// Whether items have a class row, too.
    pub class_rows: bool,
    /// (C, h, w).
    pub latent: [usize; 3],
    /// The side of an image in pixels.
    pub resolution: usize,
    /// T: time steps are below it.
    pub timesteps: usize,
    pub offset_noise: bool,
}

impl Record {
    /// Opens and checks a record.
    ///
    /// # Errors
    /// A [`Refusal`] naming the file, the tensor and the remedy.
    pub fn open(path: &Path) -> Result<Record> {
        let refuse = |what: String| {
            Refusal::error(format!(
                "the recorded draws in {} cannot be replayed: {what}. Set replay.draws to a whole record.",
                path.display()
            ))
        };
        let file = File::open(path).map_err(|e| refuse(e.to_string()))?;
        let tensors = header(&file).map_err(|e| refuse(format!("{e:#}")))?;
        let micros = group(tensors).map_err(|e| refuse(format!("{e:#}")))?;
        for (k, micro) in micros.iter().enumerate() {
            micro.check(k).map_err(|e| refuse(format!("{e:#}")))?;
        }
        Ok(Record { source: Arc::new(Source { file, path: path.to_owned() }), micros })
    }

    /// The number of micro-batches whose draws are all there. (A record may hold one more batch that was only loaded.)
    pub fn len(&self) -> usize {
        self.micros.len()
    }

    pub fn is_empty(&self) -> bool {
        self.micros.is_empty()
    }

    /// The number of items of micro-batch `k`.
    pub fn items(&self, k: usize) -> usize {
        self.micros[k].tensors.get("index").map_or(0, Tensor::len)
    }

    /// Whether a run can replay all of the record.
    ///
    /// # Errors
    /// A [`Refusal`] that names the first tensor that is of no use to the run, and the remedy.
    pub fn check(&self, wanted: RecordUse) -> Result<()> {
        let remedy = "Replay with the model and the settings that were recorded, or name their record.";
        for k in 0..self.len() {
            self.check_micro(k, wanted).map_err(|what| {
                let path = self.source.path.display();
                Refusal::error(format!("the recorded draws in {path} are not this run's: {what:#}. {remedy}"))
            })?;
        }
        Ok(())
    }

    fn check_micro(&self, k: usize, wanted: RecordUse) -> Result<()> {
        let micro = self.micro(k)?;
        let rows = micro.items() * if wanted.class_rows { 2 } else { 1 };
        let [channels, height, width] = wanted.latent;
        let name = |name: &str| format!("{k:06}.{name}");
        if micro.noise.shape() != [rows, channels, height, width] {
            let prior = if wanted.class_rows { "with" } else { "without" };
            anyhow::bail!(
                "{} has the shape {:?}, and {prior} prior preservation, for this model and resolution, it is {:?}",
                name("noise"),
                micro.noise.shape(),
                [rows, channels, height, width]
            );
        }
        anyhow::ensure!(micro.vae_eps.is_some(), "the tensor {} is missing", name("vae_eps"));
        let offset = micro.offset_noise.is_some() || !wanted.offset_noise;
        anyhow::ensure!(offset, "the tensor {} is missing, which train.offset_noise needs", name("offset_noise"));
        if let Some(pixels) = &micro.pixel_values {
            let side = wanted.resolution;
            let (shape, name) = (pixels.shape(), name("pixel_values"));
            anyhow::ensure!(
                shape[2..] == [side, side],
                "{name} has the shape {shape:?}, and data.resolution is {side}"
            );
        }
        let outside = micro.timesteps.iter().find(|&&t| !(0..wanted.timesteps as i64).contains(&t));
        if let Some(t) = outside {
            anyhow::bail!("{} holds {t}, and the model has {} time steps", name("timesteps"), wanted.timesteps);
        }
        anyhow::ensure!(micro.index.iter().all(|&i| i >= 0), "{} holds a negative number", name("index"));
        Ok(())
    }

    /// The draws of micro-batch `k`, counted from 0 over the whole run; `k` must be below [`Self::len`].
    pub fn micro(&self, k: usize) -> Result<MicroRecord> {
        let tensors = &self.micros[k].tensors;
        let rows = |name: &str| tensors.get(name).map(|t| Rows { source: Arc::clone(&self.source), tensor: t.clone() });
        let integers = |name: &str| -> Result<Option<Vec<i64>>> {
            let Some(tensor) = tensors.get(name) else { return Ok(None) };
            let bytes = self.source.read(tensor, 0, tensor.len() * 8)?;
            Ok(Some(bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect()))
        };
        let missing = |name: &str| format!("tensor {k:06}.{name}");
        let crop = integers("crop")?
            .map(|flat| {
                let offsets = flat.as_chunks::<2>().0.iter();
                offsets.map(|&[top, left]| Some((usize::try_from(top).ok()?, usize::try_from(left).ok()?))).collect()
            })
            .map(|offsets: Option<Vec<_>>| {
                offsets.ok_or_else(|| {
                    Refusal::error(format!("{}: {k:06}.crop holds a negative offset.", self.source.path.display()))
                })
            })
            .transpose()?;
        Ok(MicroRecord {
            index: integers("index")?.with_context(|| missing("index"))?,
            timesteps: integers("timesteps")?.with_context(|| missing("timesteps"))?,
            vae_eps: rows("vae_eps"),
            noise: rows("noise").with_context(|| missing("noise"))?,
            offset_noise: rows("offset_noise"),
            crop,
            pixel_values: rows("pixel_values"),
        })
    }
}

impl Source {
    fn read(&self, tensor: &Tensor, from: usize, bytes: usize) -> Result<Vec<u8>> {
        let mut buffer = vec![0u8; bytes];
        self.file
            .read_exact_at(&mut buffer, tensor.offset + from as u64)
            .with_context(|| format!("reading {} of {}", tensor.name, self.path.display()))?;
        Ok(buffer)
    }
}

impl Tensor {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Micro {
    /// Whether dtypes and shapes are those of the contract.
    fn check(&self, k: usize) -> Result<()> {
        let get = |name: &str| self.tensors.get(name).with_context(|| format!("the tensor {k:06}.{name} is missing"));
        let (index, noise) = (get("index")?, get("noise")?);
        let items = index.len();
        let rows = noise.shape.first().copied().unwrap_or(0);
        if noise.shape.len() != 4 || items == 0 || (rows != items && rows != 2 * items) {
            anyhow::bail!(
                "{} has the shape {:?}; with {items} items in {} it must have {items} or {} rows and four dimensions",
                noise.name,
                noise.shape,
                index.name,
                2 * items
            );
        }
        let latent = noise.shape.clone();
        expect(index, "I64", &[items])?;
        expect(noise, "F32", &latent)?;
        expect(get("timesteps")?, "I64", &[rows])?;
        for tensor in self.tensors.values() {
            match tensor.name.split_once('.').map(|(_, name)| name) {
                Some("vae_eps") => expect(tensor, "F32", &latent)?,
                Some("offset_noise") => expect(tensor, "F32", &[rows, latent[1], 1, 1])?,
                Some("crop") => expect(tensor, "I64", &[rows, 2])?,
                Some("pixel_values") => {
                    let side = |i: usize| tensor.shape.get(i).copied().unwrap_or(0);
                    expect(tensor, "F32", &[rows, 3, side(2), side(3)])?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn expect(tensor: &Tensor, dtype: &str, shape: &[usize]) -> Result<()> {
    anyhow::ensure!(
        tensor.dtype == dtype && tensor.shape == shape,
        "{} is {} {:?} where {dtype} {shape:?} is needed",
        tensor.name,
        tensor.dtype,
        tensor.shape
    );
    Ok(())
}

/// The header of a safetensors file: its length in 8 bytes, then JSON, then the data, whose extents are checked.
fn header(file: &File) -> Result<Vec<Tensor>> {
    const LARGEST: u64 = 100_000_000;
    let size = file.metadata()?.len();
    let mut length = [0u8; 8];
    file.read_exact_at(&mut length, 0).context("it is not a safetensors file")?;
    let length = u64::from_le_bytes(length);
    anyhow::ensure!(length <= LARGEST && length + 8 <= size, "it is not a safetensors file, or it is truncated");
    let mut text = vec![0u8; length as usize];
    file.read_exact_at(&mut text, 8)?;
    let json: serde_json::Map<String, Value> = serde_json::from_slice(&text).context("its header is damaged")?;
    let mut tensors = Vec::new();
    for (name, entry) in json.into_iter().filter(|(name, _)| name != "__metadata__") {
        let damaged = || format!("the header's entry {name} is damaged");
        let integers =
            |key: &str| -> Option<Vec<u64>> { entry.get(key)?.as_array()?.iter().map(Value::as_u64).collect() };
        let dtype = entry.get("dtype").and_then(Value::as_str).with_context(damaged)?.to_owned();
        let shape = integers("shape").with_context(damaged)?;
        let offsets = integers("data_offsets").filter(|o| o.len() == 2 && o[0] <= o[1]).with_context(damaged)?;
        let width = match dtype.as_str() {
            "F32" => 4u64,
            "I64" => 8,
            other => anyhow::bail!("{name} is {other} where F32 or I64 is needed"),
        };
        let bytes = shape.iter().try_fold(width, |n, &d| n.checked_mul(d)).with_context(damaged)?;
        anyhow::ensure!(bytes == offsets[1] - offsets[0], damaged());
        let end = offsets[1].checked_add(8 + length).with_context(damaged)?;
        anyhow::ensure!(end <= size, "it is truncated: {name} ends at byte {end}, the file has {size}");
        let shape = shape.into_iter().map(|d| d as usize).collect();
        tensors.push(Tensor { name, dtype, shape, offset: 8 + length + offsets[0] });
    }
    Ok(tensors)
}

/// Sorts tensors by micro-batch; drops a last batch that was loaded but not trained.
fn group(tensors: Vec<Tensor>) -> Result<Vec<Micro>> {
    let mut micros: Vec<Micro> = Vec::new();
    for tensor in tensors {
        let Some((k, name)) = tensor.name.split_once('.').and_then(|(k, n)| Some((k.parse::<usize>().ok()?, n))) else {
            anyhow::bail!("the tensor {} is not named KKKKKK.name", tensor.name);
        };
        anyhow::ensure!(k < 10_000_000, "the tensor {} has an impossible number", tensor.name);
        if micros.len() <= k {
            micros.resize_with(k + 1, Micro::default);
        }
        let name = name.to_owned();
        micros[k].tensors.insert(name, tensor);
    }
    if micros.last().is_some_and(|m| !m.tensors.contains_key("noise") && !m.tensors.contains_key("timesteps")) {
        micros.pop();
    }
    anyhow::ensure!(!micros.is_empty(), "it holds no micro-batch");
    Ok(micros)
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;
    use safetensors::tensor::{TensorView, serialize};

    type Stored = (&'static str, Dtype, Vec<usize>, Vec<u8>);

    fn floats(name: &'static str, shape: &[usize]) -> Stored {
        let n: usize = shape.iter().product();
        (name, Dtype::F32, shape.to_vec(), (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect())
    }

    fn integers(name: &'static str, shape: &[usize], values: &[i64]) -> Stored {
        (name, Dtype::I64, shape.to_vec(), values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    fn whole() -> Vec<Stored> {
        vec![
            integers("000000.index", &[2], &[4, 1]),
            integers("000000.timesteps", &[4], &[10, 20, 30, 40]),
            integers("000000.crop", &[4, 2], &[0, 1, 2, 3, 4, 5, 6, 7]),
            floats("000000.noise", &[4, 2, 3, 1]),
            floats("000000.vae_eps", &[4, 2, 3, 1]),
            floats("000000.offset_noise", &[4, 2, 1, 1]),
            floats("000000.pixel_values", &[4, 3, 8, 8]),
            integers("000001.index", &[1], &[0]),
            floats("000001.pixel_values", &[2, 3, 8, 8]),
        ]
    }

    fn written(tensors: &[Stored]) -> tempfile::NamedTempFile {
        let views = tensors.iter().map(|(n, d, s, b)| (*n, TensorView::new(*d, s.clone(), b).unwrap()));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), serialize(views, None).unwrap()).unwrap();
        file
    }

    #[test]
    fn a_record_is_read_row_by_row() {
        let file = written(&whole());
        let record = Record::open(file.path()).unwrap();
        assert_eq!(record.len(), 1, "the batch that was only loaded does not count");
        let micro = record.micro(0).unwrap();
        assert_eq!((micro.items(), micro.rows(), micro.has_class_rows()), (2, 4, true));
        assert_eq!(micro.index, [4, 1]);
        assert_eq!(micro.timesteps, [10, 20, 30, 40]);
        assert_eq!(micro.crop.as_deref(), Some(&[(0, 1), (2, 3), (4, 5), (6, 7)][..]));
        assert_eq!(micro.noise.shape(), [4, 2, 3, 1]);
        assert_eq!(micro.noise.row(2).unwrap(), [12.0, 13.0, 14.0, 15.0, 16.0, 17.0]);
        assert_eq!(micro.offset_noise.unwrap().row(3).unwrap(), [6.0, 7.0]);
        assert_eq!(micro.pixel_values.unwrap().row_len(), 192);
    }

    #[test]
    fn a_record_of_another_run_is_told() {
        let right = RecordUse { class_rows: true, latent: [2, 3, 1], resolution: 8, timesteps: 41, offset_noise: true };
        let check = |tensors: &[Stored], wanted| Record::open(written(tensors).path()).unwrap().check(wanted);
        check(&whole(), right).unwrap();
        for (wanted, words) in [
            (RecordUse { class_rows: false, ..right }, "without prior preservation"),
            (RecordUse { latent: [2, 3, 2], ..right }, "000000.noise has the shape [4, 2, 3, 1]"),
            (RecordUse { resolution: 16, ..right }, "data.resolution is 16"),
            (RecordUse { timesteps: 40, ..right }, "000000.timesteps holds 40"),
        ] {
            let error = check(&whole(), wanted).unwrap_err();
            assert!(error.is::<Refusal>() && error.to_string().contains(words), "{error}");
        }
        let mut tensors = whole();
        tensors.retain(|tensor| tensor.0 != "000000.offset_noise");
        check(&tensors, RecordUse { offset_noise: false, ..right }).unwrap();
        assert!(check(&tensors, right).unwrap_err().to_string().contains("train.offset_noise"));
        tensors.retain(|tensor| tensor.0 != "000000.vae_eps");
        assert!(check(&tensors, right).unwrap_err().to_string().contains("000000.vae_eps is missing"));
    }

    #[test]
    fn what_is_missing_or_misshapen_is_named() {
        let broken = |change: fn(&mut Vec<Stored>)| {
            let mut tensors = whole();
            change(&mut tensors);
            let error = Record::open(written(&tensors).path()).unwrap_err();
            assert!(error.is::<Refusal>());
            error.to_string()
        };
        assert!(broken(|t| t.retain(|t| t.0 != "000000.timesteps")).contains("000000.timesteps is missing"));
        assert!(broken(|t| t.retain(|t| t.0 != "000000.noise")).contains("000000.noise is missing"));
        assert!(broken(|t| t[1] = integers("000000.timesteps", &[2], &[1, 2])).contains("000000.timesteps is I64 [2]"));
        assert!(broken(|t| t[4] = floats("000000.vae_eps", &[4, 2, 1, 3])).contains("000000.vae_eps"));
        assert!(broken(|t| t[0] = integers("000000.index", &[3], &[1, 2, 3])).contains("3 or 6 rows"));
        assert!(broken(|t| t.push(floats("noise", &[1]))).contains("noise is not named"));
        assert!(broken(|t| t.push(integers("000003.timesteps", &[1], &[1]))).contains("000001.noise is missing"));
    }

    #[test]
    fn other_files_and_truncated_ones_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "no tensors").unwrap();
        assert!(Record::open(file.path()).unwrap_err().to_string().contains("not a safetensors file"));
        let bytes = std::fs::read(written(&whole()).path()).unwrap();
        std::fs::write(file.path(), &bytes[..bytes.len() - 10]).unwrap();
        assert!(Record::open(file.path()).unwrap_err().to_string().contains("truncated"));
        assert!(Record::open(Path::new("no/such")).unwrap_err().is::<Refusal>());
    }
}

//! One safetensors file: its table of contents, checked against the file's length, and reads at an offset.
//!
//! Tensors are read with positioned reads and not through a mapping: what a rank reads then never counts as its
//! memory, and a file that is cut short under us is an error instead of a signal.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::codec;

/// A tensor in its file.
#[derive(Clone, Debug)]
pub(super) struct TensorRecord {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// From the beginning of the file, in bytes.
    pub begin: u64,
    pub bytes: u64,
}

impl TensorRecord {
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// An open safetensors file.
pub(super) struct TensorFile {
    pub path: PathBuf,
    file: File,
    /// In the order in which they lie in the file.
    pub tensors: Vec<TensorRecord>,
    /// The header's `__metadata__`.
    pub metadata: Map<String, Value>,
}

/// Longest header that is believed (as in the safetensors library).
const MAX_HEADER: u64 = 100_000_000;
/// Elements converted at a time.
const CHUNK: usize = 1 << 16;

impl TensorFile {
    /// Err is what is wrong with the file, one sentence a problem, each naming it.
    pub fn open(path: &Path) -> std::result::Result<Self, Vec<String>> {
        let shown = path.display();
        let one = |what: String| vec![format!("{shown}: {what} Restore or download the file again.")];
        let file = crate::input_file::open(path).map_err(|e| one(format!("cannot be opened ({e}).")))?;
        let length = file.metadata().map_err(|e| one(format!("cannot be examined ({e}).")))?.len();
        let mut size = [0; 8];
        if length < 8 || file.read_exact_at(&mut size, 0).is_err() {
            return Err(one(format!("truncated: {length} bytes, too short for a safetensors file.")));
        }
        let header_len = u64::from_le_bytes(size);
        if header_len > MAX_HEADER {
            return Err(one("not a safetensors file.".into()));
        }
        if header_len > length - 8 {
            return Err(one(format!("truncated: its header ends at byte {}, the file at {length}.", header_len + 8)));
        }
        let mut header = vec![0; header_len as usize];
        file.read_exact_at(&mut header, 8).map_err(|e| one(format!("cannot be read ({e}).")))?;
        let mut header: Map<String, Value> =
            serde_json::from_slice(&header).map_err(|e| one(format!("its header is not valid JSON ({e}).")))?;
        let metadata = match header.shift_remove("__metadata__") {
            Some(Value::Object(metadata)) => metadata,
            _ => Map::new(),
        };
        let (mut tensors, mut problems) = (Vec::with_capacity(header.len()), Vec::new());
        for (name, entry) in &header {
            match record(name, entry, 8 + header_len) {
                Ok(tensor) => tensors.push(tensor),
                Err(why) => problems.extend(one(format!("tensor {name}: {why}."))),
            }
        }
        tensors.sort_by_key(|t| t.begin);
        let mut end = 8 + header_len;
        for tensor in &tensors {
            if tensor.begin != end && problems.is_empty() {
                problems.extend(one(format!("tensor {}: overlaps another or leaves a gap.", tensor.name)));
            }
            end = tensor.begin + tensor.bytes;
            if end > length {
                let TensorRecord { name, .. } = tensor;
                problems.extend(one(format!("truncated: tensor {name} ends at byte {end}, the file at {length}.")));
                break;
            }
        }
        if problems.is_empty() && end < length {
            problems.extend(one(format!("{} bytes longer than its tensors.", length - end)));
        }
        if problems.is_empty() { Ok(TensorFile { path: path.into(), file, tensors, metadata }) } else { Err(problems) }
    }

    /// Bytes of the file from `begin`.
    pub fn read_bytes(&self, begin: u64, bytes: &mut [u8]) -> Result<()> {
        self.file
            .read_exact_at(bytes, begin)
            .with_context(|| format!("{}: reading at byte {begin}", self.path.display()))
    }

    /// Elements from `start` of a tensor of fp32, fp16 or bf16.
    pub fn read(&self, tensor: &TensorRecord, start: usize, dst: &mut [f32]) -> Result<()> {
        let size = tensor.dtype.bitsize() / 8;
        let mut bytes = vec![0; CHUNK.min(dst.len()) * size];
        let mut at = tensor.begin + (start * size) as u64;
        for chunk in dst.chunks_mut(CHUNK) {
            let bytes = &mut bytes[..chunk.len() * size];
            self.read_bytes(at, bytes)?;
            codec::decode(tensor.dtype, bytes, chunk);
            at += bytes.len() as u64;
        }
        Ok(())
    }
}

/// One entry of the header; `data` is where the tensors' bytes begin.
fn record(name: &str, entry: &Value, data: u64) -> std::result::Result<TensorRecord, String> {
    let field = |key: &str| entry.get(key).cloned().ok_or_else(|| format!("has no {key}"));
    let dtype: Dtype = serde_json::from_value(field("dtype")?).map_err(|e| format!("unknown dtype ({e})"))?;
    let shape: Vec<usize> = serde_json::from_value(field("shape")?).map_err(|e| format!("bad shape ({e})"))?;
    let [begin, end]: [u64; 2] =
        serde_json::from_value(field("data_offsets")?).map_err(|e| format!("bad data_offsets ({e})"))?;
    let bits = shape.iter().try_fold(dtype.bitsize() as u64, |n, &d| n.checked_mul(d as u64));
    let same = bits.is_some_and(|bits| bits % 8 == 0 && begin.checked_add(bits / 8) == Some(end));
    let Some(begin) = data.checked_add(begin).filter(|_| same) else {
        return Err(format!("bytes {begin} to {end} do not hold {dtype:?} of shape {shape:?}"));
    };
    let bytes = end - (begin - data);
    Ok(TensorRecord { name: name.to_string(), dtype, shape, begin, bytes })
}

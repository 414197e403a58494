//! One rank's file: flat tensors in safetensors format, written in one pass and read in place.

use std::fs::File;
use std::hash::Hasher;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use candle_core::DType;
use memmap2::Mmap;
use serde_json::{Map, Value, json};
use twox_hash::XxHash3_64;

pub fn file_name(rank: usize, world_size: usize) -> String {
    format!("rank-{rank:05}-of-{world_size:05}.safetensors")
}

/// A tensor that is to be written.
pub struct Flat {
    pub name: String,
    /// fp32 or u8.
    pub dtype: DType,
    pub len: usize,
}

impl Flat {
    fn bytes(&self) -> usize {
        self.len * self.dtype.size_in_bytes()
    }
}

/// Writes tensors whose lengths are known beforehand; `fill` puts the bytes of the n-th in order. Returns the file's
/// xxh3. Synced to disk on return.
pub fn write(
    path: &Path,
    tensors: &[Flat],
    mut fill: impl FnMut(usize, &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
) -> Result<u64> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let mut out = Hashed { out: BufWriter::with_capacity(1 << 20, file), hash: XxHash3_64::new() };
    let header = header(tensors);
    let writing = || format!("writing {}", path.display());
    out.put(&(header.len() as u64).to_le_bytes()).with_context(writing)?;
    out.put(&header).with_context(writing)?;
    for (i, tensor) in tensors.iter().enumerate() {
        let mut written = 0;
        fill(i, &mut |bytes: &[u8]| {
            written += bytes.len();
            out.put(bytes).with_context(writing)
        })?;
        assert_eq!(written, tensor.bytes(), "{}: wrong length", tensor.name);
    }
    let file = out.out.into_inner().map_err(|e| e.into_error()).with_context(writing)?;
    file.sync_all().with_context(|| format!("syncing {}", path.display()))?;
    Ok(out.hash.finish())
}

fn header(tensors: &[Flat]) -> Vec<u8> {
    let mut map = Map::new();
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.bytes();
        let dtype = if tensor.dtype == DType::U8 { "U8" } else { "F32" };
        let place = json!({ "dtype": dtype, "shape": [tensor.len], "data_offsets": [offset, end] });
        map.insert(tensor.name.clone(), place);
        offset = end;
    }
    let mut bytes = Value::Object(map).to_string().into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    bytes
}

struct Hashed {
    out: BufWriter<File>,
    hash: XxHash3_64,
}

impl Hashed {
    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.hash.write(bytes);
        self.out.write_all(bytes)
    }
}

/// A rank's file, mapped.
pub struct ShardFile {
    path: PathBuf,
    map: Mmap,
    tensors: Map<String, Value>,
    data_from: usize,
}

impl ShardFile {
    /// Maps the file and verifies its checksum: a damaged file is never taken for a good one. An error says what is
    /// wrong, without naming the file.
    pub fn open(path: &Path, checksum: &str) -> Result<Self> {
        const DAMAGED: &str = "it is damaged (it is not what the manifest says)";
        let file = crate::input_file::open(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => anyhow!("there is no such file, and the manifest names it"),
            _ => anyhow!("it cannot be opened ({error})"),
        })?;
        if file.metadata()?.len() < 8 {
            bail!(DAMAGED);
        }
        let map = crate::device::map_file(&file).context("it cannot be mapped")?;
        if format!("{:016x}", XxHash3_64::oneshot(&map)) != checksum {
            bail!(DAMAGED);
        }
        let header_len = u64::from_le_bytes(map[..8].try_into().context(DAMAGED)?) as usize;
        let header = map[8..].get(..header_len).context(DAMAGED)?;
        let tensors = serde_json::from_slice(header).context(DAMAGED)?;
        Ok(ShardFile { path: path.to_path_buf(), map, tensors, data_from: 8 + header_len })
    }

    /// Elements `from..from + into.len()` of an fp32 tensor.
    pub fn read(&self, name: &str, from: usize, into: &mut [f32]) -> Result<()> {
        let bytes = self.bytes(name, 4 * from, 4 * into.len())?;
        for (to, raw) in into.iter_mut().zip(bytes.chunks_exact(4)) {
            *to = f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
        }
        Ok(())
    }

    /// `len` bytes of a tensor from its byte `from` on.
    pub fn bytes(&self, name: &str, from: usize, len: usize) -> Result<&[u8]> {
        let missing = || format!("{}: tensor {name} is missing or short", self.path.display());
        let offsets = self.tensors.get(name).and_then(|t| t["data_offsets"].as_array()).with_context(missing)?;
        let start = offsets.first().and_then(Value::as_u64).with_context(missing)? as usize;
        let end = offsets.get(1).and_then(Value::as_u64).with_context(missing)? as usize;
        if start + from + len > end {
            bail!(missing());
        }
        let from = self.data_from + start + from;
        self.map.get(from..from + len).with_context(missing)
    }
}

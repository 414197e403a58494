//! Reading a checkpoint written by any number of ranks.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::DType;

use super::manifest::{Manifest, SegmentRecord};
use super::shard_file::{self, ShardFile};
use crate::Refusal;
use crate::device::{BucketLayout, Buffer};
use crate::optim::RecordLayout;
use crate::zero::{Partition, WeightSource};

/// All whole checkpoints of a run, oldest first.
pub fn all(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(output_dir) else { return Ok(found) };
    for entry in entries {
        let entry = entry.with_context(|| format!("reading {}", output_dir.display()))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(step) = super::save::number(&name)
            && entry.path().join("manifest.json").is_file()
        {
            found.push((step, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// The newest whole checkpoint, if there is one.
pub fn latest(output_dir: &Path) -> Result<Option<PathBuf>> {
    Ok(all(output_dir)?.pop().map(|(_, path)| path))
}

/// An opened checkpoint.
pub struct Checkpoint {
    pub path: PathBuf,
    pub manifest: Manifest,
    files: Vec<ShardFile>,
    /// Tensor name -> (segment, offset in its bucket).
    places: HashMap<String, (usize, usize)>,
}

impl Checkpoint {
    /// Opens a checkpoint and verifies all of it. A [`Refusal`] naming the file if anything is missing or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let manifest_path = path.join("manifest.json");
        let refused = |file: &Path, what: String| {
            Refusal::error(format!("{}: {what}: go on from another checkpoint (checkpoint.resume)", file.display()))
        };
        let text = crate::input_file::bytes(&manifest_path).map_err(|error| {
            let what = match error.kind() {
                std::io::ErrorKind::NotFound => "there is no such file, so the folder is no checkpoint".to_string(),
                _ => format!("it cannot be read ({error})"),
            };
            refused(&manifest_path, what)
        })?;
        let manifest = Manifest::from_json(&text).map_err(|error| refused(&manifest_path, format!("{error:#}")))?;
        let files = manifest.checksums.iter().enumerate().map(|(rank, checksum)| {
            let file = path.join(shard_file::file_name(rank, manifest.world_size));
            ShardFile::open(&file, checksum).map_err(|error| refused(&file, format!("{error:#}")))
        });
        let files = files.collect::<Result<Vec<_>>>()?;
        let places = places(&manifest.segments);
        Ok(Checkpoint { path: path.to_path_buf(), manifest, files, places })
    }

    /// Refuses a checkpoint of another model: every segment that trains must be there, with the same tensors.
    pub fn check(&self, wanted: &[SegmentRecord]) -> Result<()> {
        let tensors = |segments: &[SegmentRecord]| -> Vec<(String, Vec<usize>)> {
            segments.iter().flat_map(|segment| segment.tensors.clone()).collect()
        };
        let (theirs, ours) = (tensors(&self.manifest.segments), tensors(wanted));
        let shapes = |of: &[(String, Vec<usize>)]| of.iter().cloned().collect::<HashMap<_, _>>();
        let (their_shapes, our_shapes) = (shapes(&theirs), shapes(&ours));
        let difference = ours
            .iter()
            .find_map(|(name, shape)| match their_shapes.get(name) {
                None => Some(format!("it has no tensor {name}")),
                Some(other) if other != shape => Some(format!("its {name} has shape {other:?}, the model's {shape:?}")),
                Some(_) => None,
            })
            .or_else(|| {
                let more = theirs.iter().find(|(name, _)| !our_shapes.contains_key(name))?;
                Some(format!("it also has {}", more.0))
            });
        if difference.is_none() && self.manifest.segments == wanted {
            return Ok(());
        }
        Err(Refusal::error(format!(
            "{} is a checkpoint of another model or of other trained parts: {}. Resume with the configuration that wrote it, or set checkpoint.resume = \"\".",
            self.path.display(),
            difference.unwrap_or_else(|| "its tensors are grouped differently".into())
        )))
    }

    /// Elements `range` of segment `segment`'s fp32 weights, whoever wrote them; past the end is zero.
    fn read_weights(&self, segment: &str, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        into.fill(0.0);
        for (file, shard) in self.shards(segment)? {
            let (from, to) = (shard.start.max(range.start), shard.end.min(range.end));
            if from < to {
                let part = &mut into[from - range.start..to - range.start];
                file.read(&format!("{segment}.master"), from - shard.start, part)?;
            }
        }
        Ok(())
    }

    /// Each rank's file, with the elements of the segment's bucket that are in it.
    fn shards(&self, segment: &str) -> Result<impl Iterator<Item = (&ShardFile, Range<usize>)>> {
        let padded_len = self.layout(segment)?.padded_len(self.manifest.world_size);
        let shard = move |rank| Partition::new(rank, self.manifest.world_size).shard(padded_len);
        Ok(self.files.iter().enumerate().map(move |(rank, file)| (file, shard(rank))))
    }

    fn layout(&self, segment: &str) -> Result<BucketLayout> {
        let record = self.manifest.segments.iter().find(|s| s.name == segment);
        let record = record.with_context(|| format!("{} has no segment {segment}", self.path.display()))?;
        Ok(BucketLayout::new(record.tensors.clone()))
    }

    /// One record of segment `segment`'s optimizer state, whoever wrote its parts. State that was written in another
    /// kind is converted.
    pub fn read_state(&self, segment: &str, layout: &RecordLayout, record: &mut [u8]) -> Result<()> {
        let theirs = self.manifest.state.kind();
        if theirs == layout.kind() {
            return self.read_parts(segment, layout, record);
        }
        let small_from = self.layout(segment)?.small_from;
        let their_layout = RecordLayout::new(theirs, layout.start(), layout.elements(), small_from);
        let mut their_record = Buffer::unbudgeted(DType::U8, their_layout.bytes())?;
        their_layout.initialise(their_record.bytes_mut());
        self.read_parts(segment, &their_layout, their_record.bytes_mut())?;
        let (mut m, mut v) = (vec![0f32; layout.elements()], vec![0f32; layout.elements()]);
        their_layout.read_moments_f32(their_record.bytes(), &mut m, &mut v);
        layout.write_moments_f32(record, &m, &v);
        Ok(())
    }

    fn read_parts(&self, segment: &str, layout: &RecordLayout, record: &mut [u8]) -> Result<()> {
        let small_from = self.layout(segment)?.small_from;
        for (file, shard) in self.shards(segment)? {
            let theirs = RecordLayout::new(layout.kind(), shard.start, shard.len(), small_from).parts();
            for part in layout.parts() {
                let Some(their_part) = theirs.iter().find(|p| p.name == part.name) else { continue };
                let from = part.elements.start.max(their_part.elements.start);
                let to = part.elements.end.min(their_part.elements.end);
                if from < to {
                    let bytes = their_part.bytes_of(from..to);
                    let name = format!("{segment}.{}", part.name);
                    let read = file.bytes(&name, bytes.start - their_part.bytes.start, bytes.len())?;
                    record[part.bytes_of(from..to)].copy_from_slice(read);
                }
            }
        }
        Ok(())
    }
}

fn places(segments: &[SegmentRecord]) -> HashMap<String, (usize, usize)> {
    let mut places = HashMap::new();
    for (i, segment) in segments.iter().enumerate() {
        for entry in BucketLayout::new(segment.tensors.clone()).entries {
            places.insert(entry.name, (i, entry.offset));
        }
    }
    places
}

impl WeightSource for Checkpoint {
    fn read(&self, name: &str, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        let &(segment, offset) =
            self.places.get(name).with_context(|| format!("{} has no tensor {name}", self.path.display()))?;
        let segment = &self.manifest.segments[segment].name;
        self.read_weights(segment, range.start + offset..range.end + offset, into)
    }
}

//! What a checkpoint says of itself, in `manifest.json`.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::device::BucketLayout;
use crate::optim::{ScaleState, StateKind};

/// Raised when older programs can no longer read what newer ones write.
pub const FORMAT: u32 = 1;

/// Where the run stands. Randomness is stateless, so this is all there is to restore beside weights and moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Optimizer steps made.
    pub step: u64,
    /// Micro-batches run.
    pub micro_step: u64,
    pub epoch: u64,
    /// Items of this epoch already used.
    pub items_in_epoch: u64,
}

/// One segment's bucket: names and places, so that a checkpoint of another model is recognised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentRecord {
    pub name: String,
    /// Elements before padding.
    pub len: usize,
    pub tensors: Vec<(String, Vec<usize>)>,
}

impl SegmentRecord {
    pub fn new(name: &str, layout: &BucketLayout) -> Self {
        let tensors = layout.entries.iter().map(|e| (e.name.clone(), e.shape.clone())).collect();
        SegmentRecord { name: name.to_string(), len: layout.len, tensors }
    }
}

/// What moments are written in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StateName {
    #[default]
    F32,
    /// Codes and scales, as they are in memory.
    Bits8,
}

impl StateName {
    pub fn of(kind: StateKind) -> Self {
        match kind {
            StateKind::F32 => StateName::F32,
            StateKind::Bits8 => StateName::Bits8,
        }
    }

    pub fn kind(self) -> StateKind {
        match self {
            StateName::F32 => StateKind::F32,
            StateName::Bits8 => StateKind::Bits8,
        }
    }
}

/// `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub program: String,
    pub position: Position,
    pub seed: u64,
    pub world_size: usize,
    /// For the reader's eyes; loading does not depend on it.
    pub stage: u8,
    /// The configured rate, before the schedule; resuming with another one is said.
    pub learning_rate: f64,
    /// What the optimizer's moments are written in.
    #[serde(default)]
    pub state: StateName,
    /// Of a run in fp16; checkpoints from before there was fp16 have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<ScaleState>,
    pub segments: Vec<SegmentRecord>,
    /// xxh3 of every rank's file, in rank order, as hexadecimal.
    pub checksums: Vec<String>,
}

/// The last entry of the file: the xxh3 of all bytes before it.
const SEAL: &str = ",\n  \"own_checksum\": \"";

impl Manifest {
    /// The file's contents.
    pub fn to_json(&self) -> Result<String> {
        let text = serde_json::to_string_pretty(self)?;
        let body = text.strip_suffix("\n}").context("an object ends with a brace")?;
        Ok(format!("{body}{SEAL}{:016x}\"\n}}\n", XxHash3_64::oneshot(body.as_bytes())))
    }

    /// Reads a manifest from its file's contents. An error says what is wrong with it, without naming the file.
    pub fn from_json(text: &[u8]) -> Result<Manifest> {
        // The format first: a newer one may have other fields.
        let format = serde_json::from_slice::<Format>(text).context("it is not a checkpoint's manifest")?;
        if format.format != FORMAT {
            bail!(
                "{} wrote it in format {}, and this program reads format {FORMAT}",
                format.program.as_deref().unwrap_or("another program"),
                format.format
            );
        }
        let manifest: Manifest = serde_json::from_slice(text).context("it is not a checkpoint's manifest")?;
        let body = std::str::from_utf8(text)?.rsplit_once(SEAL);
        let whole =
            body.is_some_and(|(body, sum)| sum == format!("{:016x}\"\n}}\n", XxHash3_64::oneshot(body.as_bytes())));
        if !whole || manifest.checksums.len() != manifest.world_size {
            bail!("it is damaged, or was changed by hand");
        }
        Ok(manifest)
    }
}

/// What every format has.
#[derive(Deserialize)]
struct Format {
    format: u32,
    program: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_manifest_is_told_from_a_whole_one() {
        let manifest = Manifest {
            format: FORMAT,
            program: "dblaunch".into(),
            position: Position { step: 3, micro_step: 7, epoch: 1, items_in_epoch: 2 },
            seed: u64::MAX,
            world_size: 1,
            stage: 2,
            learning_rate: 1.0 / 3.0,
            state: StateName::Bits8,
            loss_scale: Some(ScaleState { scale: 0.5, good_steps: 7, skipped: 2, skipped_in_a_row: 0 }),
            segments: vec![SegmentRecord { name: "a".into(), len: 6, tensors: vec![("a.w".into(), vec![2, 3])] }],
            checksums: vec!["00".into()],
        };
        let text = manifest.to_json().unwrap();
        let read = Manifest::from_json(text.as_bytes()).unwrap();
        assert_eq!((read.position, read.seed, &read.segments), (manifest.position, manifest.seed, &manifest.segments));
        assert_eq!(read.loss_scale, manifest.loss_scale);
        let older = Manifest { loss_scale: None, ..manifest.clone() }.to_json().unwrap();
        assert!(!older.contains("loss_scale") && Manifest::from_json(older.as_bytes()).unwrap().loss_scale.is_none());
        for (from, to, words) in [
            ("\"step\": 3", "\"step\": 4", "damaged"),
            ("\"format\": 1", "\"format\": 9", "dblaunch wrote it in format 9"),
            ("{", "", "not a checkpoint's manifest"),
        ] {
            let error = Manifest::from_json(text.replacen(from, to, 1).as_bytes()).unwrap_err();
            assert!(format!("{error:#}").contains(words), "{error:#}");
        }
    }
}

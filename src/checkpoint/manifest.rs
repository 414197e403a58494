//! What a checkpoint says of itself, in `manifest.json`.

use serde::{Deserialize, Serialize};

use crate::device::BucketLayout;

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
    /// The rate the last step used; resuming with another one is said.
    pub learning_rate: f64,
    pub segments: Vec<SegmentRecord>,
    /// xxh3 of every rank's file, in rank order, as hexadecimal.
    pub checksums: Vec<String>,
}

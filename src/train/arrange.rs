//! Where a run's states rest and what its segments leave behind, from what the configuration and the planner say to the
//! tiers that a network is built on.

use anyhow::Result;
use candle_core::DType;

use crate::config::{GradAccumDtype, MasterDtype, MixedPrecision, OptimizerKind, RunPlan};
use crate::device::{BucketLayout, Memory, Place, StateFile, StateFileOptions};
use crate::optim::{RecordLayout, StateKind};
use crate::segment::SegmentGraph;
use crate::zero::{Partition, Placement, Ranks, Stage, Tiers, pieces};

/// What the states of a run are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Formats {
    /// Of activations, and of the parameters that ops read.
    pub compute: DType,
    /// Of what the optimizer computes with.
    pub master: DType,
    /// Of sums of gradients at rest.
    pub gradients: DType,
    pub state: StateKind,
}

impl Formats {
    pub fn of(plan: &RunPlan, compute: DType) -> Self {
        Formats {
            compute,
            master: match plan.optimizer.master_dtype {
                MasterDtype::F32 => DType::F32,
                MasterDtype::Bf16 => DType::BF16,
            },
            gradients: match plan.zero.grad_accum_dtype {
                GradAccumDtype::F32 => DType::F32,
                GradAccumDtype::Bf16 => DType::BF16,
            },
            state: match plan.optimizer.kind {
                OptimizerKind::AdamW => StateKind::F32,
                OptimizerKind::AdamW8bit => StateKind::Bits8,
            },
        }
    }

    /// What parameters rest in.
    pub fn parameters(&self) -> DType {
        if self.master == DType::BF16 { DType::BF16 } else { self.compute }
    }

    /// Whether there are fp32 masters beside the parameters.
    pub fn has_masters(&self) -> bool {
        self.master == DType::F32 && self.parameters() != DType::F32
    }
}

/// What ops compute in.
pub fn compute_dtype(plan: &RunPlan) -> DType {
    match plan.train.mixed_precision {
        MixedPrecision::No => DType::F32,
        MixedPrecision::Bf16 => DType::BF16,
        MixedPrecision::Fp16 => DType::F16,
    }
}

/// Bytes of a rank's file on the drive: everything of `segments` (layout, and whether it trains) that rests there, each
/// in whole pages.
pub fn drive_bytes<'a>(
    segments: impl Iterator<Item = (&'a BucketLayout, bool)>,
    partition: Partition,
    stage: Stage,
    placement: Placement,
    formats: Formats,
) -> u64 {
    let of = |(layout, trains): (&BucketLayout, bool)| {
        let padded_len = layout.padded_len(partition.world_size);
        let owned = if stage.partitions_optimizer() { partition.shard(padded_len) } else { 0..padded_len };
        let values = |dtype: DType| StateFile::room(owned.len() * dtype.size_in_bytes());
        let parameters = if placement.parameters == Place::Nvme { values(formats.parameters()) } else { 0 };
        if !trains || placement.optimizer != Place::Nvme {
            return parameters;
        }
        let masters = if formats.has_masters() { values(DType::F32) } else { 0 };
        let record = |piece: std::ops::Range<usize>| {
            let layout = RecordLayout::new(formats.state, owned.start + piece.start, piece.len(), layout.small_from);
            StateFile::room(layout.bytes())
        };
        parameters + masters + pieces(owned.len()).map(record).sum::<u64>()
    };
    segments.map(of).sum()
}

/// The tiers of a network within a rank's memory. Opens the run's file where something rests on the drive in `folder`:
/// a [`crate::Refusal`] if the folder is missing, read-only or too small.
pub fn tiers(
    graph: &SegmentGraph,
    ranks: &Ranks,
    placement: Placement,
    formats: Formats,
    memory: &Memory,
    folder: Option<&std::path::Path>,
) -> Result<Tiers> {
    let drive = match (placement.uses_drive(), folder) {
        (true, Some(folder)) => {
            let segments = graph.nodes.iter().map(|n| (n.params.layout(), n.grads.is_some()));
            let bytes = drive_bytes(segments, ranks.partition(), ranks.stage, placement, formats);
            Some(StateFile::create(StateFileOptions::new(folder, ranks.comm.rank(), bytes))?)
        }
        _ => None,
    };
    let tiers = Tiers::within(memory.clone(), placement, drive, None)?;
    Ok(Tiers { master: formats.master, gradients: formats.gradients, ..tiers })
}

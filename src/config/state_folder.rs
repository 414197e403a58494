//! Whether the run's state files can be where `zero.nvme_dir` says: a folder that can be written, with room for what
//! will rest there on all ranks.

use std::path::Path;

use super::check::Inspection;
use super::output_folder::can_write;
use crate::device::nvme::{StateFile, left_by_dead_runs};
use crate::device::{BucketLayout, Place, free_disk_bytes};
use crate::train::arrange::{self, Formats};
use crate::zero::Partition;

/// The folder for the state files, if one is named.
pub(super) fn inspect(inspection: &mut Inspection) {
    let zero = &inspection.plan.zero;
    let Some(dir) = zero.nvme_dir.clone() else { return };
    if zero.places().iter().all(|(_, place)| place.is_some_and(|place| place != Place::Nvme)) {
        let what =
            format!("zero.nvme_dir is {}, and no offload_… key says \"nvme\": nothing goes there", dir.display());
        return inspection.facts.notes.push(what);
    }
    let what = match std::fs::metadata(&dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => "there is no such folder",
        Err(_) => "this folder cannot be read",
        Ok(found) if !found.is_dir() => "this is not a folder",
        Ok(_) => {
            let bytes = bytes(inspection);
            inspection.facts.state_bytes = bytes;
            if let Some(what) = too_small(&dir, bytes) {
                return inspection.problem("zero", "nvme_dir", &what);
            }
            inspection.absorb("zero", "nvme_dir", can_write(&dir));
            return;
        }
    };
    inspection.problem(
        "zero",
        "nvme_dir",
        &format!("{what}: name a folder on a fast drive that this program may write in"),
    );
}

/// Bytes of the state files of all ranks; 0 where nothing is decided yet, or nothing goes there.
fn bytes(inspection: &Inspection) -> u64 {
    let (plan, world_size) = (&inspection.plan, inspection.world_size);
    let Some(decision) = inspection.facts.decision.as_ref().filter(|decision| decision.placement.uses_drive()) else {
        return 0;
    };
    let (stage, placement) = (decision.zero_stage(), decision.placement);
    let layouts: Vec<BucketLayout> =
        inspection.facts.model.segments.iter().map(|segment| BucketLayout::new(segment.tensors.clone())).collect();
    let formats = Formats::of(plan, arrange::compute_dtype(plan));
    let of = |rank| {
        let segments = layouts.iter().map(|layout| (layout, true));
        let partition = Partition::new(rank, world_size);
        StateFile::size(arrange::drive_bytes(segments, partition, stage, placement, formats))
    };
    (0..world_size).map(of).sum()
}

/// What is wrong if `dir` has no room for `bytes`. What dead runs have left there goes before anything comes.
fn too_small(dir: &Path, bytes: u64) -> Option<String> {
    // Where nobody can tell how much is free, the run will find out, before its first step.
    let free = free_disk_bytes(dir).ok()?.saturating_add(left_by_dead_runs(dir));
    if free >= bytes {
        return None;
    }
    let size = |bytes: u64| bytesize::ByteSize(bytes).display().iec();
    Some(format!(
        "the run's state needs {} there, all ranks together, and {} are free: make room, name a folder on a larger drive, \
         or let less rest there (offload_optimizer, offload_params under [zero])",
        size(bytes),
        size(free)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_room_is_told_with_both_sizes() {
        let home = tempfile::tempdir().unwrap();
        assert_eq!(too_small(home.path(), 0), None);
        let told = too_small(home.path(), 1 << 60).unwrap();
        assert!(told.contains("needs 1.0 EiB there") && told.contains("are free: make room"), "{told}");
    }
}

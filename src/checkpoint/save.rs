//! Writing a checkpoint: aside, synced, named, and only then are old ones deleted.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::DType;

use super::manifest::{FORMAT, Manifest, Position, SegmentRecord, StateName};
use super::shard_file::{self, Flat};
use crate::comm::{Communicator, CommunicatorExt};
use crate::optim::{Part, RecordLayout, ScaleState, StateKind};
use crate::zero::{self, ParamStore};

/// Whoever has the optimizer's state, in records, one after another for each segment.
pub trait OptimizerState {
    /// What its moments rest in.
    fn kind(&self) -> StateKind;
    /// Shows the records of segment `i` in order.
    fn records(&self, i: usize, show: &mut dyn FnMut(&RecordLayout, &[u8]) -> Result<()>) -> Result<()>;
}

/// What goes into a checkpoint.
pub struct Saving<'a> {
    pub output_dir: &'a Path,
    pub store: &'a ParamStore,
    pub optimizer: &'a dyn OptimizerState,
    pub position: Position,
    pub seed: u64,
    pub stage: u8,
    /// As configured, before the schedule.
    pub learning_rate: f64,
    /// Under fp16.
    pub loss_scale: Option<ScaleState>,
    /// How many checkpoints stay, this one included; None: all.
    pub keep: Option<usize>,
}

/// Writes `checkpoint-N/`; a collective. On an error nothing that looks like a checkpoint is left. Weights that are not
/// finite are an error: nobody could go on from them, and the checkpoint before might have to go for this one.
pub fn save(comm: &dyn Communicator, saving: &Saving) -> Result<PathBuf> {
    let name = format!("checkpoint-{}", saving.position.step);
    let target = saving.output_dir.join(&name);
    let aside = saving.output_dir.join(format!(".writing-{name}"));
    let settled = (0..saving.store.len()).try_for_each(|i| saving.store.settle(i));
    comm.agree(settled.and_then(|()| prepare(comm, &aside)))?;
    let written = comm.agree(write_shard(comm, saving, &aside)).inspect_err(|_| discard(comm, &aside))?;
    let checksums = comm.gather_strings(&format!("{written:016x}"))?;
    let finished = match comm.rank() {
        0 => finish(saving, &aside, &target, comm.world_size(), checksums),
        _ => Ok(()),
    };
    comm.agree(finished).inspect_err(|_| discard(comm, &aside))?;
    Ok(target)
}

fn prepare(comm: &dyn Communicator, aside: &Path) -> Result<()> {
    if comm.rank() == 0 {
        if aside.exists() {
            fs::remove_dir_all(aside).with_context(|| format!("removing {}", aside.display()))?;
        }
        fs::create_dir_all(aside).with_context(|| format!("creating {}", aside.display()))?;
    }
    Ok(())
}

/// One tensor of this rank's file.
struct Saved {
    segment: usize,
    /// A part of the optimizer's state; None: the fp32 weights.
    part: Option<Part>,
}

/// This rank's tensors: weights and the parts of the optimizer's state of its shard of every segment that trains.
fn saved(saving: &Saving) -> Vec<Saved> {
    let store = saving.store;
    let of = |i: usize| {
        let (shard, small_from) = (store.shard(i), store.layout(i).small_from);
        let parts = RecordLayout::new(saving.optimizer.kind(), shard.start, shard.len(), small_from).parts();
        [None].into_iter().chain(parts.into_iter().map(Some)).map(move |part| Saved { segment: i, part })
    };
    (0..store.len()).filter(|&i| store.trains(i)).flat_map(of).collect()
}

fn write_shard(comm: &dyn Communicator, saving: &Saving, aside: &Path) -> Result<u64> {
    let store = saving.store;
    let path = aside.join(shard_file::file_name(comm.rank(), comm.world_size()));
    let saved = saved(saving);
    let flat = |saved: &Saved| {
        let name = store.name(saved.segment);
        match &saved.part {
            None => Flat { name: format!("{name}.master"), dtype: DType::F32, len: store.shard(saved.segment).len() },
            Some(part) => Flat { name: format!("{name}.{}", part.name), dtype: part.dtype, len: part.len() },
        }
    };
    shard_file::write(&path, &saved.iter().map(flat).collect::<Vec<_>>(), |tensor, put| {
        let Saved { segment, part } = &saved[tensor];
        match part {
            None => write_weights(store, *segment, put),
            Some(part) => write_part(saving.optimizer, *segment, part, put),
        }
    })
}

fn write_weights(store: &ParamStore, i: usize, put: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let shard = store.shard(i);
    for piece in zero::pieces(shard.len()) {
        let mut weights = vec![0f32; piece.len()];
        store.read_master(i, shard.start + piece.start..shard.start + piece.end, &mut weights)?;
        ensure!(all_finite(&weights), "the weights of {} are not finite", store.name(i));
        // The machine's own (little-endian) bytes are safetensors'.
        put(bytemuck::cast_slice(&weights))?;
    }
    Ok(())
}

/// What the optimizer's records hold of one part of the shard's state, in order.
fn write_part(
    optimizer: &dyn OptimizerState,
    i: usize,
    wanted: &Part,
    put: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    optimizer.records(i, &mut |layout, bytes| {
        let parts = layout.parts();
        let Some(part) = parts.iter().find(|part| part.name == wanted.name) else { return Ok(()) };
        let from = part.elements.start.max(wanted.elements.start);
        let to = part.elements.end.min(wanted.elements.end);
        if from < to { put(&bytes[part.bytes_of(from..to)]) } else { Ok(()) }
    })
}

/// Without branches, so that it runs at the memory's speed.
pub fn all_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    !values.iter().fold(false, |bad, x| bad | (x.to_bits() & EXPONENT == EXPONENT))
}

fn discard(comm: &dyn Communicator, aside: &Path) {
    if comm.rank() == 0 {
        // Best effort: the error that led here is the one to report.
        let _ = fs::remove_dir_all(aside);
    }
}

fn finish(saving: &Saving, aside: &Path, target: &Path, world_size: usize, checksums: Vec<String>) -> Result<()> {
    let store = saving.store;
    let trained = (0..store.len()).filter(|&i| store.trains(i));
    let manifest = Manifest {
        format: FORMAT,
        program: format!("dblaunch {}", env!("CARGO_PKG_VERSION")),
        position: saving.position,
        seed: saving.seed,
        world_size,
        stage: saving.stage,
        learning_rate: saving.learning_rate,
        state: StateName::of(saving.optimizer.kind()),
        loss_scale: saving.loss_scale,
        segments: trained.map(|i| SegmentRecord::new(store.name(i), store.layout(i))).collect(),
        checksums,
    };
    let path = aside.join("manifest.json");
    fs::write(&path, manifest.to_json()?).with_context(|| format!("writing {}", path.display()))?;
    sync(&path)?;
    sync(aside)?;
    let replaced = match target.exists() {
        // The same step again: the new one takes the old one's place, and at most a moment has neither.
        true => Some(out_of_sight(target)?),
        false => None,
    };
    fs::rename(aside, target).with_context(|| format!("naming {}", target.display()))?;
    sync(saving.output_dir)?;
    replaced.map_or(Ok(()), |doomed| remove(&doomed))?;
    delete_old(saving.output_dir, saving.keep)
}

fn sync(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    file.sync_all().with_context(|| format!("syncing {}", path.display()))
}

fn delete_old(output_dir: &Path, keep: Option<usize>) -> Result<()> {
    let Some(keep) = keep else { return Ok(()) };
    let all = super::load::all(output_dir)?;
    for (_, path) in all.iter().take(all.len().saturating_sub(keep.max(1))) {
        remove(&out_of_sight(path)?)?;
    }
    Ok(())
}

/// Takes a checkpoint's name from it, so that an interrupted deletion leaves no half checkpoint.
fn out_of_sight(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let doomed = path.with_file_name(format!(".deleting-{name}"));
    fs::rename(path, &doomed).with_context(|| format!("deleting {}", path.display()))?;
    Ok(doomed)
}

fn remove(dir: &Path) -> Result<()> {
    fs::remove_dir_all(dir).with_context(|| format!("deleting {}", dir.display()))
}

/// What an earlier run left in its output folder of no use to one that stands at `step`: what it was writing or deleting
/// when it was killed, and whole checkpoints of later steps, which are another future. Returns the checkpoints' paths.
pub fn clear_leftovers(output_dir: &Path, step: u64) -> Result<Vec<PathBuf>> {
    let half_done = |name: &str| {
        name == ".writing-pipeline"
            || [".writing-", ".deleting-"]
                .iter()
                .any(|mark| name.strip_prefix(mark).is_some_and(|n| number(n).is_some()))
    };
    let mut later = Vec::new();
    for entry in fs::read_dir(output_dir).with_context(|| format!("reading {}", output_dir.display()))? {
        let path = entry.with_context(|| format!("reading {}", output_dir.display()))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !path.is_dir() {
            continue;
        }
        if half_done(&name) {
            remove(&path)?;
        } else if number(&name).is_some_and(|n| n > step) {
            remove(&out_of_sight(&path)?)?;
            later.push(path);
        }
    }
    Ok(later)
}

/// N of `checkpoint-N`.
pub fn number(name: &str) -> Option<u64> {
    name.strip_prefix("checkpoint-")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_go_and_everything_else_stays() {
        let home = tempfile::tempdir().unwrap();
        let folders = [".writing-checkpoint-4", ".deleting-checkpoint-2", ".writing-pipeline", "checkpoint-3"];
        let others = ["checkpoint-notes", ".writing-notes", "checkpoint-2", "unet"];
        folders.iter().chain(&others).for_each(|name| fs::create_dir(home.path().join(name)).unwrap());
        fs::write(home.path().join("checkpoint-9"), "a file").unwrap();
        assert_eq!(clear_leftovers(home.path(), 2).unwrap(), [home.path().join("checkpoint-3")]);
        let mut left: Vec<String> =
            fs::read_dir(home.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, [".writing-notes", "checkpoint-2", "checkpoint-9", "checkpoint-notes", "unet"]);
    }

    #[test]
    fn nothing_infinite_passes_for_finite() {
        assert!(all_finite(&[0.0, -1e38, f32::MIN_POSITIVE, f32::MAX]) && all_finite(&[]));
        assert!([f32::NAN, f32::INFINITY, f32::NEG_INFINITY].iter().all(|&x| !all_finite(&[1.0, x, 2.0])));
    }
}

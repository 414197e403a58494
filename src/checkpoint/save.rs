//! Writing a checkpoint: aside, synced, named, and only then are old ones deleted.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::manifest::{FORMAT, Manifest, Position, SegmentRecord};
use super::shard_file;
use crate::comm::{Communicator, Slice, SliceMut};
use crate::optim::Moments;
use crate::zero::ParamStore;

/// What goes into a checkpoint.
pub struct Saving<'a> {
    pub output_dir: &'a Path,
    pub store: &'a ParamStore,
    /// One for each segment that trains.
    pub moments: &'a [Option<Moments>],
    pub position: Position,
    pub seed: u64,
    pub stage: u8,
    pub learning_rate: f64,
    /// How many checkpoints stay, this one included; None: all.
    pub keep: Option<usize>,
}

/// Names and lengths of this rank's tensors: weights and both moments of its shard of every segment that trains.
fn tensors(store: &ParamStore) -> Vec<(String, usize)> {
    let trained = (0..store.len()).filter(|&i| store.trains(i));
    trained
        .flat_map(|i| ["master", "m", "v"].map(|kind| (format!("{}.{kind}", store.name(i)), store.shard(i).len())))
        .collect()
}

/// Bytes of one checkpoint, all ranks together.
pub fn checkpoint_bytes(store: &ParamStore, world_size: usize) -> u64 {
    shard_file::byte_len(&tensors(store)) * world_size as u64
}

/// Bytes that may still be written to the disk of `dir` (or of its nearest folder that exists).
pub fn free_bytes(dir: &Path) -> Result<u64> {
    crate::device::free_disk_bytes(dir)
}

/// Writes `checkpoint-N/`; a collective. On an error nothing that looks like a checkpoint is left.
pub fn save(comm: &dyn Communicator, saving: &Saving) -> Result<PathBuf> {
    let name = format!("checkpoint-{}", saving.position.step);
    let target = saving.output_dir.join(&name);
    let aside = saving.output_dir.join(format!(".writing-{name}"));
    agree(comm, prepare(comm, &aside).map(|()| 0))?;
    let checksums = agree(comm, write_shard(comm, saving, &aside)).inspect_err(|_| discard(comm, &aside))?;
    let finished = match comm.rank() {
        0 => finish(saving, &aside, &target, comm.world_size(), checksums),
        _ => Ok(()),
    };
    agree(comm, finished.map(|()| 0)).inspect_err(|_| discard(comm, &aside))?;
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

fn write_shard(comm: &dyn Communicator, saving: &Saving, aside: &Path) -> Result<u64> {
    let store = saving.store;
    let path = aside.join(shard_file::file_name(comm.rank(), comm.world_size()));
    let trained: Vec<usize> = (0..store.len()).filter(|&i| store.trains(i)).collect();
    shard_file::write(&path, &tensors(store), |tensor, put| {
        let i = trained[tensor / 3];
        let start = store.shard(i).start - store.optimizer_range(i).start;
        let range = start..start + store.shard(i).len();
        let moments = saving.moments[i].as_ref().context("a segment that trains has moments")?;
        match tensor % 3 {
            0 => store.update(i, |mut owned| put(&owned.master()[range]))?,
            1 => put(&moments.m.as_slice::<f32>()[range]),
            _ => put(&moments.v.as_slice::<f32>()[range]),
        }
    })
}

/// Everyone's checksum, or an error on all ranks if one of them failed.
fn agree(comm: &dyn Communicator, mine: Result<u64>) -> Result<Vec<u64>> {
    // A flag beside the value, since every value is a possible checksum.
    let sent: Vec<u8> = match &mine {
        Ok(sum) => [&[1u8][..], &sum.to_le_bytes()].concat(),
        Err(_) => vec![0; 9],
    };
    let mut all = vec![0u8; 9 * comm.world_size()];
    comm.all_gather(Slice::U8(&sent), SliceMut::U8(&mut all))?;
    mine?;
    let mut sums = Vec::new();
    for (rank, part) in all.chunks_exact(9).enumerate() {
        if part[0] == 0 {
            anyhow::bail!("the checkpoint was not written: rank {rank} failed");
        }
        sums.push(u64::from_le_bytes(part[1..].try_into().context("eight bytes")?));
    }
    Ok(sums)
}

fn discard(comm: &dyn Communicator, aside: &Path) {
    if comm.rank() == 0 {
        // Best effort: the error that led here is the one to report.
        let _ = fs::remove_dir_all(aside);
    }
}

fn finish(saving: &Saving, aside: &Path, target: &Path, world_size: usize, checksums: Vec<u64>) -> Result<()> {
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
        segments: trained.map(|i| SegmentRecord::new(store.name(i), store.layout(i))).collect(),
        checksums: checksums.iter().map(|sum| format!("{sum:016x}")).collect(),
    };
    let path = aside.join("manifest.json");
    fs::write(&path, serde_json::to_vec_pretty(&manifest)?).with_context(|| format!("writing {}", path.display()))?;
    sync(&path)?;
    sync(aside)?;
    if target.exists() {
        // The same step again (an interrupt right after a regular one): the new one takes the old one's place.
        fs::remove_dir_all(target).with_context(|| format!("replacing {}", target.display()))?;
    }
    fs::rename(aside, target).with_context(|| format!("naming {}", target.display()))?;
    sync(saving.output_dir)?;
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
        // Out of sight first, so that an interrupted deletion leaves no half checkpoint.
        let doomed =
            path.with_file_name(format!(".deleting-{}", path.file_name().unwrap_or_default().to_string_lossy()));
        fs::rename(path, &doomed).with_context(|| format!("deleting {}", path.display()))?;
        fs::remove_dir_all(&doomed).with_context(|| format!("deleting {}", doomed.display()))?;
    }
    Ok(())
}

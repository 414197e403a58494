//! The run's temporary state file on a fast drive: optimizer state and parameters that neither the device nor the host
//! has room for, moved in large direct requests beside the computation. Its contents are worth nothing to another run:
//! what lasts is a checkpoint. Who moves what and when is not decided here.
//!
//! ```text
//! StateFile ─ reserve    the file: name, lock, room; what dead runs have left
//!           ─ tuning     how many pieces of which size at a time
//!           ─ Region ── area       checksums by block
//!                    ── request ── piece ── engine ── ring (io_uring) or threads
//! ```
//!
//! The peers' way of swapping (DeepSpeed's `swap_tensor`) trusts the drive: it knows neither checksums nor whose files
//! are lying about. Here a block that does not come back as it went is an error that names it.

mod area;
mod engine;
mod piece;
mod request;
mod reserve;
#[cfg(target_os = "linux")]
mod ring;
#[cfg(test)]
mod tests;
mod traffic;
mod tuning;

pub use area::STATE_BLOCK;
pub use reserve::left_by_dead_runs;
pub use traffic::{Traffic, wear_note};
pub use tuning::Tuning;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};

use super::buffer::PAGE;
use super::{Buffer, Delays, Pending};
use area::Area;
use engine::Engine;
use request::{Common, Way};
use reserve::{HEADER_BYTES, Reserved};
use traffic::Meter;

/// What a state file is to be.
#[derive(Clone, Debug)]
pub struct StateFileOptions {
    /// A folder on a fast drive.
    pub dir: PathBuf,
    pub rank: usize,
    /// All that will ever be allocated, each allocation as [`StateFile::room`] says; taken from the drive at once.
    pub bytes: u64,
    /// Makes requests late, for tests.
    pub delays: Option<Arc<Delays>>,
    /// Past the page cache: must, must not, or (`None`) if the file system can.
    pub direct: Option<bool>,
    /// By io_uring: must, must not, or (`None`) if the kernel lets us.
    pub ring: Option<bool>,
}

impl StateFileOptions {
    pub fn new(dir: impl Into<PathBuf>, rank: usize, bytes: u64) -> Self {
        StateFileOptions { dir: dir.into(), rank, bytes, delays: None, direct: None, ring: None }
    }
}

/// One rank's temporary file, locked while its process lives and removed when dropped.
pub struct StateFile {
    // Dropped in this order: what is under way ends before the file goes.
    engine: Engine,
    reserved: Reserved,
    tuning: Tuning,
    meter: Arc<Meter>,
    bytes: u64,
    allocated: Mutex<u64>,
}

/// A range of the file.
#[derive(Clone)]
pub struct Region {
    file: Arc<StateFile>,
    area: Arc<Area>,
}

impl StateFile {
    /// Removes the files of dead runs in the folder, takes all the room, and measures the drive for a moment (at most
    /// 112 MiB are written). Errors are a [`Refusal`](crate::Refusal) where the folder is missing, read-only or too small.
    pub fn create(options: StateFileOptions) -> Result<Arc<StateFile>> {
        let reserved = reserve::reserve(&options.dir, options.rank, options.bytes, options.direct)?;
        let tuning = tuning::choose(&reserved, options.bytes, options.ring)?;
        let meter = Arc::<Meter>::default();
        let common = Common { piece_bytes: tuning.block, meter: meter.clone(), delays: options.delays };
        let engine = Engine::start(&reserved.file, &tuning, common)?;
        let allocated = Mutex::new(0);
        Ok(Arc::new(StateFile { engine, reserved, tuning, meter, bytes: options.bytes, allocated }))
    }

    /// Takes `bytes` of the file for `what` (such as a segment's name), which errors name. Nothing can be read there
    /// before it was written.
    pub fn allocate(self: &Arc<Self>, bytes: usize, what: &str) -> Result<Region> {
        let mut allocated = self.allocated.lock().unwrap_or_else(|e| e.into_inner());
        let (start, end) = (*allocated, allocated.saturating_add(Self::room(bytes)));
        if end > self.bytes {
            bail!(
                "{what}: {bytes} bytes do not fit into {}: {start} of {} reserved bytes are taken",
                self.reserved.path.display(),
                self.bytes
            );
        }
        *allocated = end;
        let area = Area::new(self.reserved.path.clone(), what, HEADER_BYTES + start, bytes);
        Ok(Region { file: self.clone(), area: Arc::new(area) })
    }

    /// What an allocation of `bytes` takes of the file: whole pages.
    pub fn room(bytes: usize) -> u64 {
        bytes.next_multiple_of(PAGE) as u64
    }

    /// The whole file's size, where `bytes` are allocated in all.
    pub fn size(bytes: u64) -> u64 {
        bytes.saturating_add(HEADER_BYTES)
    }

    /// What was reserved for state.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What was moved so far, without the measurement at the start.
    pub fn traffic(&self) -> Traffic {
        self.meter.traffic()
    }

    pub fn tuning(&self) -> Tuning {
        self.tuning
    }

    pub fn path(&self) -> &Path {
        &self.reserved.path
    }
}

impl fmt::Debug for StateFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateFile").field("path", &self.path()).field("tuning", &self.tuning).finish_non_exhaustive()
    }
}

impl Region {
    /// Reads `bytes` from `at` (a multiple of [`STATE_BLOCK`]) into the first of the buffer's, which travels and comes
    /// back. Errors: what was never written; what did not come back as it was written; and the drive's own.
    pub fn read(&self, at: usize, bytes: usize, into: Buffer) -> Pending<Buffer> {
        self.file.engine.submit(&self.area, Way::Read, at, bytes, into)
    }

    /// Writes the buffer's first `bytes` to `at`: whole blocks of [`STATE_BLOCK`], or up to the region's end. To be
    /// waited for before the same blocks are read or written again.
    pub fn write(&self, at: usize, bytes: usize, from: Buffer) -> Pending<Buffer> {
        self.file.engine.submit(&self.area, Way::Write, at, bytes, from)
    }

    pub fn bytes(&self) -> usize {
        self.area.bytes
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.area.fmt(f)
    }
}

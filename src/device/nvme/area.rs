//! A range of the state file and what is known of each of its blocks: the checksum of what was written last, if
//! anything was. Only in memory: the file outlives nothing.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::{Error, Result, anyhow, bail};

/// Checksums are of this many bytes; what is read and written begins at multiples of it.
pub const STATE_BLOCK: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Area {
    /// The file, for messages.
    path: PathBuf,
    /// Whose state it is, for messages.
    pub what: String,
    /// Where in the file it begins.
    pub start: u64,
    pub bytes: usize,
    blocks: Mutex<Vec<Block>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Never,
    UnderWay,
    Failed,
    /// xxh3 of its bytes.
    Written(u64),
}

impl Area {
    pub fn new(path: PathBuf, what: &str, start: u64, bytes: usize) -> Self {
        let blocks = Mutex::new(vec![Block::Never; bytes.div_ceil(STATE_BLOCK)]);
        Area { path, what: what.to_string(), start, bytes, blocks }
    }

    /// Marks blocks as being written: what they held is gone from now on.
    pub fn begin_write(&self, blocks: Range<usize>) -> Result<()> {
        let mut known = self.blocks.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(i) = blocks.clone().find(|&i| known[i] == Block::UnderWay) {
            bail!("{}: written anew before the write before it was done", self.name(i));
        }
        known[blocks].fill(Block::UnderWay);
        Ok(())
    }

    /// The sums of `count` blocks that are written now; without sums, nobody knows what is there.
    pub fn end_write(&self, first: usize, sums: Option<&Vec<AtomicU64>>, count: usize) {
        let mut known = self.blocks.lock().unwrap_or_else(|e| e.into_inner());
        for i in 0..count {
            known[first + i] = sums.map_or(Block::Failed, |sums| Block::Written(sums[i].load(Relaxed)));
        }
    }

    /// The checksums that blocks about to be read must have.
    pub fn begin_read(&self, blocks: Range<usize>) -> Result<Vec<u64>> {
        let known = self.blocks.lock().unwrap_or_else(|e| e.into_inner());
        blocks
            .map(|i| match known[i] {
                Block::Written(sum) => Ok(sum),
                Block::Never => bail!("{}: read before it was ever written", self.name(i)),
                Block::UnderWay => bail!("{}: read before its write was done", self.name(i)),
                Block::Failed => bail!("{}: what was last written there failed to arrive. {GO_ON}", self.name(i)),
            })
            .collect()
    }

    /// The error for a block that was read with another checksum than it `should` have.
    pub fn mismatch(&self, block: usize, should: u64) -> Error {
        let known = self.blocks.lock().unwrap_or_else(|e| e.into_inner())[block];
        if known != Block::Written(should) {
            return anyhow!("{}: written while it was read", self.name(block));
        }
        anyhow!(
            "{}: the drive gave back something else than what was written there (its checksum is wrong). {GO_ON}; if it \
             happens again, let the state rest on another drive ([zero] nvme_dir)",
            self.name(block)
        )
    }

    /// The error for a request that the system could not serve; `way` is "reading" or "writing".
    pub fn failure(&self, way: &str, at: u64, error: &std::io::Error) -> Error {
        let block = (at.saturating_sub(self.start)) as usize / STATE_BLOCK;
        let remedy = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                "the drive is full although the file's room was reserved, as happens where a file system copies on write or \
                 promises more than it has: make room there or name a folder on another drive ([zero] nvme_dir), and go on \
                 from the last checkpoint"
            }
            std::io::ErrorKind::FileTooLarge => {
                "this process may not write files as large as that (ulimit -f): raise that limit, and go on from the last \
                 checkpoint"
            }
            std::io::ErrorKind::UnexpectedEof => {
                "someone has shortened the file while it was in use. Go on from the last checkpoint"
            }
            _ => GO_ON,
        };
        anyhow!("{}: {way} failed: {error}. {remedy}", self.name(block))
    }

    fn name(&self, block: usize) -> String {
        let from = self.start + (block * STATE_BLOCK) as u64;
        let to = self.start + ((block + 1) * STATE_BLOCK).min(self.bytes) as u64;
        format!("{}: block {block} of {} (bytes {from} to {to})", self.path.display(), self.what)
    }
}

const GO_ON: &str = "Go on from the last checkpoint";

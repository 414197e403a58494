//! How many pieces of which size a drive is given at a time: measured once, at the start, on the run's own file.

use std::fmt;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytesize::ByteSize;
use candle_core::DType;

use super::area::{Area, STATE_BLOCK};
use super::engine::Engine;
use super::request::{Common, Way};
use super::reserve::{HEADER_BYTES, Reserved};
use crate::device::Buffer;

/// How a state file is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Pieces that the drive is given at a time.
    pub depth: usize,
    /// Bytes of a piece.
    pub block: usize,
    /// Whether reads and writes pass by the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Whether requests go through an io_uring, else through `depth` threads.
    pub ring: bool,
}

/// In words, as in "4 pieces of 1 MiB at a time, past the page cache, by io_uring".
impl fmt::Display for Tuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let block = ByteSize(self.block as u64).display().iec();
        let cache = if self.direct { "past the page cache" } else { "through the page cache" };
        let way = if self.ring { "by io_uring" } else { "by threads" };
        write!(f, "{} pieces of {block} at a time, {cache}, {way}", self.depth)
    }
}

/// (depth, bytes of a piece), the usual best first: it stays if no other is clearly better.
const CANDIDATES: [(usize, usize); 6] =
    [(4, 1 << 20), (8, 1 << 20), (8, 256 << 10), (2, 1 << 20), (32, 256 << 10), (16, 1 << 20)];
/// What each writes once and reads twice: the six and what goes before them write 112 MiB.
const SAMPLE: usize = 16 << 20;
const REQUESTS: usize = 4;
/// After this, what is known must do: a slow drive takes longer for each, and its tuning matters less.
const ENOUGH: Duration = Duration::from_millis(400);
/// A candidate takes the lead if it needs less than this share of the leader's time.
const CLEARLY: f64 = 0.93;

/// Chooses; and makes sure that what it chooses works on this file at all.
pub(super) fn choose(reserved: &Reserved, bytes: u64, ring: Option<bool>) -> Result<Tuning> {
    let (depth, block) = CANDIDATES[0];
    let mut tuning = Tuning { depth, block, direct: reserved.direct, ring: ring != Some(false) };
    let sample = SAMPLE.min(bytes as usize / STATE_BLOCK * STATE_BLOCK);
    let started = Instant::now();
    // The first write to a place may be slower than all later ones, and a read of what was never written tells nothing.
    let mut first = time(reserved, &tuning, sample);
    if first.is_err() && ring.is_none() {
        tuning.ring = false;
        first = time(reserved, &tuning, sample);
    }
    first.with_context(|| format!("trying {}", reserved.path.display()))?;
    // With the cache in between the drive does not show; and a file of a few MiB does not matter.
    if !tuning.direct || sample < SAMPLE {
        return Ok(tuning);
    }
    let mut best: Option<(f64, Tuning)> = None;
    for (depth, block) in CANDIDATES {
        if started.elapsed() > ENOUGH {
            break;
        }
        let candidate = Tuning { depth, block, ..tuning };
        let seconds = time(reserved, &candidate, sample)?;
        if best.is_none_or(|(least, _)| seconds < CLEARLY * least) {
            best = Some((seconds, candidate));
        }
    }
    Ok(best.map_or(tuning, |(_, tuning)| tuning))
}

/// The seconds that it takes to write and twice read the first `bytes`, as state is: several requests at a time, with
/// checksums.
fn time(reserved: &Reserved, tuning: &Tuning, bytes: usize) -> Result<f64> {
    let engine = start(&reserved.file, tuning)?;
    let area = Arc::new(Area::new(reserved.path.clone(), "a measurement", HEADER_BYTES, bytes));
    let part = (bytes / REQUESTS).next_multiple_of(STATE_BLOCK).max(STATE_BLOCK);
    let mut buffers = Vec::new();
    for _ in (0..bytes).step_by(part) {
        let mut buffer = Buffer::unbudgeted(DType::U8, part)?;
        // Some drives know zeros.
        let mut x = 1u64;
        buffer.bytes_mut().chunks_exact_mut(8).for_each(|word| {
            x = x.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(0x1234_5677);
            word.copy_from_slice(&x.to_le_bytes());
        });
        buffers.push(buffer);
    }
    let started = Instant::now();
    for way in [Way::Write, Way::Read, Way::Read] {
        let begun: Vec<_> = (0..bytes)
            .step_by(part)
            .zip(buffers.drain(..))
            .map(|(at, buffer)| engine.submit(&area, way, at, part.min(bytes - at), buffer))
            .collect();
        buffers = begun.into_iter().map(|pending| pending.wait()).collect::<Result<_>>()?;
    }
    Ok(started.elapsed().as_secs_f64())
}

fn start(file: &Arc<File>, tuning: &Tuning) -> Result<Engine> {
    Engine::start(file, tuning, Common { piece_bytes: tuning.block, meter: Arc::default(), delays: None })
}

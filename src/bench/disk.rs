//! How fast a run's state goes to a drive and comes back: what `benches/disk_fio.py` measures beside `fio`.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use candle_core::DType;
use serde_json::json;

use crate::device::Buffer;
use crate::device::nvme::{Region, STATE_BLOCK, StateFile, StateFileOptions};

/// A chunk's moments, master and gradient in fp32 are 16 MiB, without gradient 12; a large bucket is some 64. With how
/// many of them are under way at a time, as the optimizer's stream has: one comes, one is worked on, one goes.
const REQUESTS: [(usize, usize); 2] = [(12 << 20, 3), (64 << 20, 2)];

/// Writes and reads a state file of `bytes` (rounded up to whole blocks) in `dir` `rounds` times with requests of each
/// size, checksums and all, and prints one JSON line with bytes per second. The file is removed at the end.
pub fn disk(dir: &Path, bytes: u64, rounds: usize) -> Result<()> {
    let bytes = (bytes as usize).next_multiple_of(STATE_BLOCK);
    let started = Instant::now();
    let file = StateFile::create(StateFileOptions::new(dir, 0, bytes as u64))?;
    let ready = started.elapsed().as_secs_f64();
    let region = file.allocate(bytes, "bench")?;
    let mut rows = Vec::new();
    for (i, (request, under_way)) in REQUESTS.into_iter().enumerate() {
        let mut buffers = (0..under_way).map(|_| filled(request)).collect::<Result<Vec<_>>>()?;
        if i == 0 {
            // The first write to new room is another thing than all later ones.
            pass(&region, request, &mut buffers, Region::write)?;
        }
        let (mut write, mut read) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            write.push(bytes as f64 / pass(&region, request, &mut buffers, Region::write)?);
            read.push(bytes as f64 / pass(&region, request, &mut buffers, Region::read)?);
        }
        rows.push(json!({"request": request, "under_way": under_way, "write": write, "read": read}));
    }
    let tuning = file.tuning();
    println!(
        "{}",
        json!({
            "bytes": bytes, "depth": tuning.depth, "block": tuning.block, "direct": tuning.direct, "ring": tuning.ring,
            "seconds_to_create": ready, "requests": rows,
        })
    );
    Ok(())
}

fn filled(bytes: usize) -> Result<Buffer> {
    let mut buffer = Buffer::unbudgeted(DType::U8, bytes)?;
    // Some drives make less of zeros.
    for (i, word) in buffer.bytes_mut().chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
    }
    Ok(buffer)
}

type Move = fn(&Region, usize, usize, Buffer) -> crate::device::Pending<Buffer>;

/// The seconds that moving all of the region takes.
fn pass(region: &Region, request: usize, buffers: &mut Vec<Buffer>, way: Move) -> Result<f64> {
    let started = Instant::now();
    let mut under_way = VecDeque::new();
    for at in (0..region.bytes()).step_by(request) {
        let buffer = match buffers.pop() {
            Some(buffer) => buffer,
            None => match under_way.pop_front() {
                Some(oldest) => crate::device::Pending::wait(oldest)?,
                None => filled(request)?,
            },
        };
        under_way.push_back(way(region, at, request.min(region.bytes() - at), buffer));
    }
    for pending in under_way {
        buffers.push(pending.wait()?);
    }
    Ok(started.elapsed().as_secs_f64())
}

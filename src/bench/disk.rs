//! How fast a run's state goes to a drive and comes back: what `benches/disk_fio.py` measures beside `fio`.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail};
use candle_core::DType;
use serde_json::json;

use crate::device::nvme::{Region, STATE_BLOCK, StateFile, StateFileOptions, Tuning};
use crate::device::{Buffer, Pending};

/// A chunk's moments, master and gradient in fp32 are 16 MiB, without gradient 12; a large bucket is some 64. With how
/// many of them are under way at a time, as the optimizer's stream has: one comes, one is worked on, one goes.
const REQUESTS: [(usize, usize); 2] = [(12 << 20, 3), (64 << 20, 2)];

/// Writes and reads a state file of `bytes` (rounded up to whole blocks) in `dir` `rounds` times with requests of each
/// size, checksums and all, and prints one JSON line for the file and one for each pass. With `wait`, every pass waits
/// for a line of standard input, so that another program can take its turn. The file is removed at the end.
pub fn disk(dir: &Path, bytes: u64, rounds: usize, wait: bool) -> Result<()> {
    let bytes = (bytes as usize).next_multiple_of(STATE_BLOCK);
    let started = Instant::now();
    let file = StateFile::create(StateFileOptions::new(dir, 0, bytes as u64))?;
    let seconds = started.elapsed().as_secs_f64();
    let Tuning { depth, block, direct, ring } = file.tuning();
    let region = file.allocate(bytes, "bench")?;
    // The first write to new room is another thing than all later ones.
    pass(&region, REQUESTS[0], Region::write)?;
    println!(
        "{}",
        json!({"bytes": bytes, "depth": depth, "block": block, "direct": direct, "ring": ring, "seconds_to_create": seconds})
    );
    let ways: [(&str, Move); 2] = [("write", Region::write), ("read", Region::read)];
    for _ in 0..rounds {
        for requests in REQUESTS {
            for (way, go) in ways {
                if wait && std::io::stdin().read_line(&mut String::new())? == 0 {
                    return Ok(());
                }
                let speed = bytes as f64 / pass(&region, requests, go)?;
                println!(
                    "{}",
                    json!({"way": way, "request": requests.0, "under_way": requests.1, "bytes_per_second": speed})
                );
            }
        }
    }
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

type Move = fn(&Region, usize, usize, Buffer) -> Pending<Buffer>;

/// The seconds that moving all of the region takes, with so many requests of so many bytes under way.
fn pass(region: &Region, (request, under_way): (usize, usize), go: Move) -> Result<f64> {
    let mut idle = (0..under_way).map(|_| filled(request)).collect::<Result<Vec<_>>>()?;
    let mut moving: VecDeque<Pending<Buffer>> = VecDeque::new();
    let started = Instant::now();
    for at in (0..region.bytes()).step_by(request) {
        if moving.len() == under_way
            && let Some(oldest) = moving.pop_front()
        {
            idle.push(oldest.wait()?);
        }
        let Some(buffer) = idle.pop() else { bail!("no request may be under way") };
        moving.push_back(go(region, at, request.min(region.bytes() - at), buffer));
    }
    for pending in moving {
        pending.wait()?;
    }
    Ok(started.elapsed().as_secs_f64())
}

//! Takes a GPU's memory, so that what runs beside it finds a small one.

use std::io::{Read, stdin};

use anyhow::{Result, ensure};

use crate::device::cuda::Gpu;

/// What is taken at a time, at first; what is left in the end is less than the last, which is MIN.
const MOST: usize = 1 << 30;
const MIN: usize = 4 << 20;

/// Leaves about `leave` bytes of the first GPU free, says so, and keeps the rest until standard input ends.
pub fn hold(leave: usize) -> Result<()> {
    let gpu = Gpu::open(0, None)?;
    let mut held = Vec::new();
    let mut piece = MOST;
    while piece >= MIN {
        let (free, _) = gpu.free()?;
        if free < leave + piece {
            piece /= 2;
            continue;
        }
        held.push(gpu.computing().alloc(piece, "what others are not to have")?);
        gpu.computing().synchronize()?;
        let (now, _) = gpu.free()?;
        ensure!(now < free || piece < MOST, "memory was taken and none is gone");
    }
    let (free, total) = gpu.free()?;
    println!("{}", serde_json::json!({"free": free, "of": total}));
    // Until it is closed.
    stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

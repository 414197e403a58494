//! Ranks that have met through the host, and the GPUs they have opened: that each has its own, and by what the GPUs do
//! their collectives.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use super::{Communicator, CommunicatorExt};
use crate::Refusal;
use crate::device::Hardware;

/// Who sums and gathers what lies in the memory of several GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuCollectives {
    /// NCCL where every rank can load it, else the host.
    Auto,
    Nccl,
    /// Everything goes through the host's memory.
    Host,
}

/// A [`Refusal`] if two ranks have opened the same GPU. `mine` is what tells this rank's from all others, and its name. A
/// collective.
pub fn each_its_own(comm: &dyn Communicator, mine: Option<([u8; 16], &str)>) -> Result<()> {
    let (uuid, name) = mine.map_or((Vec::new(), ""), |(uuid, name)| (uuid.to_vec(), name));
    let all = comm.gather_bytes(&uuid)?;
    // A rank without a GPU is nobody's rival.
    let uuids: Vec<Option<[u8; 16]>> = all.iter().map(|bytes| bytes.as_slice().try_into().ok()).collect();
    let Some((first, second)) = shared_gpu(&uuids) else { return Ok(()) };
    Err(Refusal::error(format!(
        "ranks {first} and {second} were given the same GPU ({name}): start at most one rank a GPU on each machine \
         (--nproc), and see that CUDA_VISIBLE_DEVICES shows every rank all GPUs or each its own"
    )))
}

/// A pair of ranks with one and the same GPU.
fn shared_gpu(uuids: &[Option<[u8; 16]>]) -> Option<(usize, usize)> {
    (1..uuids.len()).find_map(|second| {
        let first = uuids[..second].iter().position(|uuid| uuid.is_some() && *uuid == uuids[second])?;
        Some((first, second))
    })
}

/// The ranks of `comm` with their GPUs' collectives, if they have GPUs and there are several; and what the user should
/// know of it. A collective; a collective between GPUs that has not ended after `timeout` is an error.
#[cfg(feature = "cuda")]
pub fn connect(
    comm: Arc<dyn Communicator>,
    hardware: &Hardware,
    by: GpuCollectives,
    timeout: Duration,
) -> Result<(Arc<dyn Communicator>, Option<String>)> {
    use super::{Nccl, Paired};
    use crate::device::cuda::libraries;

    let Some(gpu) = hardware.opened().filter(|_| comm.world_size() > 1) else { return Ok((comm, None)) };
    match by {
        GpuCollectives::Host => return Ok((comm, None)),
        GpuCollectives::Nccl => {}
        GpuCollectives::Auto => {
            let why = libraries::load(libraries::NCCL).err().unwrap_or_default();
            let lacking = comm.gather_strings(&why)?;
            if let Some(why) = lacking.into_iter().find(|why| !why.is_empty()) {
                let note = format!("the GPUs exchange through the host's memory, which is slower than NCCL: {why}");
                return Ok((comm, Some(note)));
            }
        }
    }
    let nccl = Nccl::join(gpu, comm.clone(), timeout)?;
    nccl.connect()?;
    Ok((Arc::new(Paired::new(comm, Arc::new(nccl))), None))
}

/// The ranks of `comm`: this build knows no GPUs.
#[cfg(not(feature = "cuda"))]
pub fn connect(
    comm: Arc<dyn Communicator>,
    _hardware: &Hardware,
    _by: GpuCollectives,
    _timeout: Duration,
) -> Result<(Arc<dyn Communicator>, Option<String>)> {
    Ok((comm, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_on_one_gpu_are_found() {
        let uuid = |byte: u8| Some([byte; 16]);
        assert_eq!(shared_gpu(&[uuid(1), uuid(2), uuid(1)]), Some((0, 2)));
        assert_eq!(shared_gpu(&[uuid(1), uuid(2)]), None);
        assert_eq!(shared_gpu(&[None, None, uuid(2)]), None);
    }
}

//! A group whose ranks have a GPU each: collectives over the host's memory go their way, those over the GPUs' are done by
//! the GPUs.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::{Communicator, DeviceCommunicator, Far, Operation, PeerFailure, Slice, SliceMut};
use crate::device::Moment;
use crate::device::cuda::Mark;
use crate::device::trace::{Row, span};

/// The same ranks, by the host and by their GPUs.
pub struct Paired {
    host: Arc<dyn Communicator>,
    device: Arc<dyn DeviceCommunicator>,
}

impl Paired {
    pub fn new(host: Arc<dyn Communicator>, device: Arc<dyn DeviceCommunicator>) -> Self {
        Paired { host, device }
    }
}

impl Far for Paired {
    /// The calling thread waits. The computing stream does not: what needs the result is put there after this has
    /// returned, and what does not need it goes on meanwhile. Errors of the group come out of the wait.
    fn collect(&self, operation: Operation, after: &[&Moment], what: &str) -> Result<()> {
        let bytes = operation.call.length * operation.call.scalar.size();
        let _span = span(Row::Collective, || format!("{} of {what}", operation.call.kind)).bytes(bytes);
        let mark =
            |moment: &&Moment| moment.0.downcast_ref::<Mark>().cloned().context("a moment of another accelerator");
        let after = after.iter().map(mark).collect::<Result<Vec<Mark>>>()?;
        self.device.begin(&[operation], &after.iter().collect::<Vec<_>>(), what)?.wait()
    }
}

impl Communicator for Paired {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn world_size(&self) -> usize {
        self.host.world_size()
    }

    fn all_reduce(&self, data: SliceMut) -> Result<()> {
        self.host.all_reduce(data)
    }

    fn reduce_scatter(&self, input: Slice, output: SliceMut) -> Result<()> {
        self.host.reduce_scatter(input, output)
    }

    fn all_gather(&self, input: Slice, output: SliceMut) -> Result<()> {
        self.host.all_gather(input, output)
    }

    fn broadcast(&self, data: SliceMut, root: usize) -> Result<()> {
        self.host.broadcast(data, root)
    }

    fn barrier(&self) -> Result<()> {
        self.host.barrier()
    }

    fn abort(&self, message: &str) {
        self.host.abort(message);
    }

    fn failed_peer(&self) -> Option<PeerFailure> {
        self.host.failed_peer()
    }

    fn leave(&self) -> Result<()> {
        self.device.close()?;
        self.host.leave()
    }

    fn far(&self) -> Option<&dyn Far> {
        Some(self)
    }
}

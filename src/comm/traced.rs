//! A communicator whose calls are in the recording of where the time goes.

use std::sync::Arc;

use anyhow::Result;

use super::{Communicator, Far, PeerFailure, Slice, SliceMut};
use crate::device::trace::{Row, Span, span};

/// Every collective of `inner` is a span of the row of collectives, with the bytes of this rank's larger side.
pub struct Traced {
    inner: Arc<dyn Communicator>,
}

impl Traced {
    pub fn new(inner: Arc<dyn Communicator>) -> Self {
        Traced { inner }
    }
}

fn noted(name: &'static str, bytes: usize) -> Span {
    span(Row::Collective, name).bytes(bytes)
}

impl Communicator for Traced {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce(&self, data: SliceMut) -> Result<()> {
        let _span = noted("all-reduce", data.len() * data.scalar().size());
        self.inner.all_reduce(data)
    }

    fn reduce_scatter(&self, input: Slice, output: SliceMut) -> Result<()> {
        let _span = noted("reduce-scatter", input.len() * input.scalar().size());
        self.inner.reduce_scatter(input, output)
    }

    fn all_gather(&self, input: Slice, output: SliceMut) -> Result<()> {
        let _span = noted("all-gather", output.len() * output.scalar().size());
        self.inner.all_gather(input, output)
    }

    fn broadcast(&self, data: SliceMut, root: usize) -> Result<()> {
        let _span = noted("broadcast", data.len() * data.scalar().size());
        self.inner.broadcast(data, root)
    }

    fn barrier(&self) -> Result<()> {
        let _span = noted("barrier", 0);
        self.inner.barrier()
    }

    fn abort(&self, message: &str) {
        self.inner.abort(message);
    }

    fn failed_peer(&self) -> Option<PeerFailure> {
        self.inner.failed_peer()
    }

    fn leave(&self) -> Result<()> {
        self.inner.leave()
    }

    fn far(&self) -> Option<&dyn Far> {
        self.inner.far()
    }
}

//! Collectives over the memory of GPUs, done by the devices themselves beside the computation, and a world of one. Several
//! ranks are in `nccl.rs`.

use anyhow::Result;

use super::Operation;
use crate::device::cuda::{Mark, Stream};

/// The collectives of one group of ranks with a GPU each, on a stream of their own. Sums are taken by the devices in their
/// own order, the same in every run of the same world on the same machine, and in the dtype given: for f16 and bf16 they
/// round after every addition, unlike the host's.
pub trait DeviceCommunicator: Send + Sync {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    /// Where they go on. Memory that is allocated elsewhere is used here after a mark.
    fn stream(&self) -> &Stream;
    /// Begins `operations` together, after all of `after`; `what` they are for (a segment's name) is for messages. Every
    /// rank begins the same ones in the same order. The host does not wait for them to end.
    fn begin(&self, operations: &[Operation], after: &[&Mark], what: &str) -> Result<Mark>;
    /// Leaves the group together with the others, when all is done. One that is dropped instead gives up what is under way.
    fn close(&self) -> Result<()> {
        self.stream().synchronize()
    }
}

/// The only rank of its world: every collective is a copy on the device, or nothing.
pub struct AloneOnDevice {
    stream: Stream,
}

impl AloneOnDevice {
    pub fn on(stream: Stream) -> Self {
        AloneOnDevice { stream }
    }
}

impl DeviceCommunicator for AloneOnDevice {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn stream(&self) -> &Stream {
        &self.stream
    }

    fn begin(&self, operations: &[Operation], after: &[&Mark], _what: &str) -> Result<Mark> {
        after.iter().try_for_each(|mark| self.stream.after(mark))?;
        for operation in operations {
            operation.check(1)?;
            let bytes = operation.call.length * operation.call.scalar.size();
            // SAFETY: the operation says that both sides are valid until the mark; they are equal (and then nothing is
            // done) or apart.
            unsafe { self.stream.copy_on_device(operation.output, operation.input, bytes)? };
        }
        self.stream.mark()
    }
}

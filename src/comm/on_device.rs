//! Collectives over the memory of GPUs, done by the devices themselves beside the computation: what they are, and a world
//! of one. Several ranks are in `nccl.rs`.

use anyhow::{Result, ensure};

use super::call::{Call, Kind, Scalar};
use crate::device::cuda::{Mark, Stream};
use crate::kernels::Address;

/// One collective over memory of the GPU. The memory is valid until the mark that [`DeviceCommunicator::begin`] gives.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    pub call: Call,
    pub input: Address,
    pub output: Address,
}

impl Operation {
    /// In place: everyone's sum, to everyone. `length` elements.
    pub fn all_reduce(scalar: Scalar, length: usize, data: Address) -> Operation {
        Operation { call: Call::new(Kind::AllReduce, scalar, length), input: data, output: data }
    }

    /// `input` has world_size times `length` elements; rank r gets the sum of everyone's r-th part.
    pub fn reduce_scatter(scalar: Scalar, length: usize, input: Address, output: Address) -> Operation {
        Operation { call: Call::new(Kind::ReduceScatter, scalar, length), input, output }
    }

    /// `output` has world_size times `length` elements; part r is rank r's input (which may be that part itself).
    pub fn all_gather(scalar: Scalar, length: usize, input: Address, output: Address) -> Operation {
        Operation { call: Call::new(Kind::AllGather, scalar, length), input, output }
    }

    /// In place: rank `root`'s data, to everyone.
    pub fn broadcast(scalar: Scalar, length: usize, data: Address, root: usize) -> Operation {
        let call = Call { root, ..Call::new(Kind::Broadcast, scalar, length) };
        Operation { call, input: data, output: data }
    }

    pub(super) fn check(&self, world_size: usize) -> Result<()> {
        let Call { kind, scalar, root, .. } = self.call;
        let sums = matches!(kind, Kind::AllReduce | Kind::ReduceScatter);
        ensure!(!(sums && scalar == Scalar::U8), "{kind} of u8: bytes cannot be summed");
        ensure!(root < world_size, "{kind} from rank {root} in a world of {world_size}");
        ensure!(kind != Kind::Barrier, "a barrier is for the host's communicator");
        Ok(())
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_not_summed_and_senders_exist() {
        let nowhere = Address(0);
        assert!(Operation::all_reduce(Scalar::U8, 1, nowhere).check(2).is_err());
        assert!(Operation::broadcast(Scalar::F32, 1, nowhere, 2).check(2).is_err());
        assert!(Operation::broadcast(Scalar::F32, 1, nowhere, 1).check(2).is_ok());
        assert!(Operation::all_gather(Scalar::U8, 1, nowhere, nowhere).check(2).is_ok());
    }
}

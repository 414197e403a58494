//! Collectives over the memory of accelerators: what they are, and who does them without the host's memory.

use anyhow::Result;
#[cfg(any(feature = "cuda", test))]
use anyhow::ensure;

use super::call::{Call, Kind, Scalar};
use crate::device::Moment;
use crate::kernels::Address;

/// The collectives that accelerators do among themselves, beside their rows of work.
pub trait Far: Send + Sync {
    /// Does `operation` once the row has come to all of `after`; has ended when this returns. Every rank makes the same
    /// calls in the same order. `what` it is for is for messages. Sums are taken in the accelerators' own order, the same in
    /// every run of the same world on the same machine, and in the dtype given.
    fn collect(&self, operation: Operation, after: &[&Moment], what: &str) -> Result<()>;
}

/// One collective over memory of an accelerator, which stays valid until it has ended.
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

    #[cfg(any(feature = "cuda", test))]
    pub(super) fn check(&self, world_size: usize) -> Result<()> {
        let Call { kind, scalar, root, .. } = self.call;
        let sums = matches!(kind, Kind::AllReduce | Kind::ReduceScatter);
        ensure!(!(sums && scalar == Scalar::U8), "{kind} of u8: bytes cannot be summed");
        ensure!(root < world_size, "{kind} from rank {root} in a world of {world_size}");
        ensure!(kind != Kind::Barrier, "a barrier is for the host's communicator");
        Ok(())
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

//! The name of one collective call: what it is, on what, how much. Ranks compare these to find out that they disagree,
//! and messages are made of them.

use std::fmt;

/// Which collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
    Barrier,
}

/// The number type of a collective's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scalar {
    F32,
    F64,
    BF16,
    F16,
    U8,
}

/// One call of a collective, as every rank must make it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Call {
    pub kind: Kind,
    pub scalar: Scalar,
    /// Elements: of the data (all_reduce, broadcast), of one rank's input (all_gather) or output (reduce_scatter).
    pub length: usize,
    /// The sender of a broadcast; 0 for the others.
    pub root: usize,
}

impl Call {
    pub fn new(kind: Kind, scalar: Scalar, length: usize) -> Call {
        Call { kind, scalar, length, root: 0 }
    }

    pub fn barrier() -> Call {
        Call::new(Kind::Barrier, Scalar::U8, 0)
    }

    /// Everything but the length in one word, for the control block.
    pub(super) fn pack(&self) -> u64 {
        self.kind as u64 | (self.scalar as u64) << 8 | (self.root as u64) << 16
    }

    pub(super) fn unpack(word: u64, length: u64) -> Call {
        const KINDS: [Kind; 5] =
            [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather, Kind::Broadcast, Kind::Barrier];
        const SCALARS: [Scalar; 5] = [Scalar::F32, Scalar::F64, Scalar::BF16, Scalar::F16, Scalar::U8];
        Call {
            kind: KINDS[(word & 0xff) as usize % KINDS.len()],
            scalar: SCALARS[(word >> 8 & 0xff) as usize % SCALARS.len()],
            length: length as usize,
            root: (word >> 16) as usize,
        }
    }

    /// `all_gather #17 (f32, 1024 elements)`.
    pub(super) fn describe(&self, sequence: u64) -> String {
        let Call { kind, scalar, length, root } = *self;
        let elements = if length == 1 { "element" } else { "elements" };
        match kind {
            Kind::Barrier => format!("{kind} #{sequence}"),
            Kind::Broadcast => format!("{kind} #{sequence} ({scalar}, {length} {elements}, from rank {root})"),
            _ => format!("{kind} #{sequence} ({scalar}, {length} {elements})"),
        }
    }
}

impl Scalar {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Scalar::F64 => 8,
            Scalar::F32 => 4,
            Scalar::BF16 | Scalar::F16 => 2,
            Scalar::U8 => 1,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::AllReduce => "all_reduce",
            Kind::ReduceScatter => "reduce_scatter",
            Kind::AllGather => "all_gather",
            Kind::Broadcast => "broadcast",
            Kind::Barrier => "barrier",
        })
    }
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scalar::F32 => "f32",
            Scalar::F64 => "f64",
            Scalar::BF16 => "bf16",
            Scalar::F16 => "f16",
            Scalar::U8 => "u8",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_survives_the_control_block() {
        for kind in [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather, Kind::Broadcast, Kind::Barrier] {
            for scalar in [Scalar::F32, Scalar::F64, Scalar::BF16, Scalar::F16, Scalar::U8] {
                let call = Call { kind, scalar, length: 1 << 40, root: 255 };
                assert_eq!(Call::unpack(call.pack(), call.length as u64), call);
            }
        }
    }
}

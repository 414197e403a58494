//! A network in training: its segments, where their states are, and the memory these take.

use anyhow::Result;
use candle_core::DType;

use crate::device::{Arena, Usage};
use crate::optim::Moments;
use crate::segment::{Keep, SegmentGraph};
use crate::zero::{GradReducer, ParamStore, Ranks, WeightSource};

/// Its segments, where their parameters and gradients are, and the optimizer's state.
pub struct Network {
    pub graph: SegmentGraph,
    pub store: ParamStore,
    pub reducer: GradReducer,
    /// One for each segment that trains.
    pub moments: Vec<Option<Moments>>,
    /// What each segment leaves behind on the way forward: its inputs (recompute) or its graph.
    pub keep: Keep,
    pub memory: Memory,
}

/// The arenas of the three states that ZeRO partitions. What a stage's collectives hold for a moment is charged to the
/// arena of what they carry.
#[derive(Clone, Debug)]
pub struct Memory {
    pub parameters: Arena,
    pub gradients: Arena,
    pub optimizer: Arena,
}

impl Memory {
    pub fn unlimited() -> Self {
        let [parameters, gradients, optimizer] =
            ["parameter", "gradient", "optimizer"].map(|name| Arena::new(name, None));
        Memory { parameters, gradients, optimizer }
    }

    /// Bytes now and at most: of parameters, gradients, optimizer state.
    pub fn usage(&self) -> [Usage; 3] {
        [&self.parameters, &self.gradients, &self.optimizer].map(Arena::usage)
    }
}

impl Network {
    /// Allocates what this rank keeps of every segment and reads its parameters; moments begin at zero.
    pub fn load(
        graph: SegmentGraph,
        ranks: &Ranks,
        dtype: DType,
        keep: Keep,
        memory: Memory,
        source: &dyn WeightSource,
    ) -> Result<Self> {
        let slots = graph.nodes.iter().map(|n| (&n.params, n.grads.as_ref()));
        let store = ParamStore::load(ranks, dtype, &memory.parameters, slots, source)?;
        let grads = graph.nodes.iter().map(|n| n.grads.as_ref());
        let reducer = GradReducer::new(ranks, &memory.gradients, &store, grads)?;
        let moments = |i| match store.trains(i) {
            true => Moments::zeroed(&memory.optimizer, store.optimizer_range(i).len(), store.name(i)).map(Some),
            false => Ok(None),
        };
        let moments = (0..store.len()).map(moments).collect::<Result<_>>()?;
        Ok(Network { graph, store, reducer, moments, keep, memory })
    }
}

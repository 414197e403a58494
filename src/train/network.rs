//! A network in training: its segments, and where their states are.

use anyhow::Result;
use candle_core::DType;

use super::optimizer::Optimizer;
use crate::optim::StateKind;
use crate::segment::{Keep, SegmentGraph};
use crate::zero::{GradReducer, ParamStore, Ranks, Tiers, WeightSource};

/// Its segments, where their parameters and gradients are, and the optimizer's state.
pub struct Network {
    pub graph: SegmentGraph,
    pub store: ParamStore,
    pub reducer: GradReducer,
    pub optimizer: Optimizer,
    /// What each segment leaves behind on the way forward: its inputs (recompute) or its graph.
    pub keep: Vec<Keep>,
}

/// How a network is shared, stored and updated.
#[derive(Clone)]
pub struct Build {
    pub ranks: Ranks,
    /// What ops compute in.
    pub dtype: DType,
    /// For each segment.
    pub keep: Vec<Keep>,
    pub tiers: Tiers,
    pub state: StateKind,
    /// Of stochastic rounding.
    pub seed: u64,
}

impl Build {
    /// Everything on the device, without limits, 32-bit state.
    pub fn on_device(ranks: &Ranks, dtype: DType, keep: Keep, graph: &SegmentGraph) -> Result<Self> {
        let keep = vec![keep; graph.nodes.len()];
        Ok(Build { ranks: ranks.clone(), dtype, keep, tiers: Tiers::on_device()?, state: StateKind::F32, seed: 0 })
    }
}

impl Network {
    /// Allocates what this rank keeps of every segment and reads its parameters; moments begin at zero.
    pub fn load(graph: SegmentGraph, build: Build, source: &dyn WeightSource) -> Result<Self> {
        let Build { ranks, dtype, keep, tiers, state, seed } = build;
        let slots = graph.nodes.iter().map(|n| (&n.params, n.grads.as_ref()));
        let store = ParamStore::load(&ranks, dtype, &tiers, slots, source)?;
        let grads = graph.nodes.iter().map(|n| n.grads.as_ref());
        let reducer = GradReducer::new(&ranks, &tiers, &store, grads)?;
        reducer.lend(&store);
        let optimizer = Optimizer::new(&tiers, &store, &reducer, state, seed)?;
        Ok(Network { graph, store, reducer, optimizer, keep })
    }
}

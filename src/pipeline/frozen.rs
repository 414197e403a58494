//! Networks that are only run: the VAE's halves, a text encoder that does not train. Every rank has its own copy, so
//! running one is no collective.

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};

use crate::comm::Solo;
use crate::segment::{Keep, SegmentGraph, SlotId, Tape};
use crate::zero::{ParamStore, Ranks, Stage, Tiers, WeightSource};

/// A frozen network with its weights.
pub struct Frozen {
    graph: SegmentGraph,
    store: ParamStore,
}

impl Frozen {
    pub fn load(graph: SegmentGraph, dtype: DType, tiers: &Tiers, weights: &dyn WeightSource) -> Result<Self> {
        let ranks = Ranks { comm: Arc::new(Solo), stage: Stage::Replicated, reduce_dtype: DType::F32 };
        let segments = graph.nodes.iter().map(|n| (&n.params, None));
        let store = ParamStore::load(&ranks, dtype, tiers, segments, weights)?;
        Ok(Frozen { graph, store })
    }

    /// Leaves the weights in their files and reads each segment's when it runs: no more than two are in memory.
    pub fn in_files(graph: SegmentGraph, dtype: DType, tiers: &Tiers, weights: Arc<dyn WeightSource>) -> Self {
        let ranks = Ranks { comm: Arc::new(Solo), stage: Stage::Replicated, reduce_dtype: DType::F32 };
        let store = ParamStore::in_files(&ranks, dtype, tiers, graph.nodes.iter().map(|n| &n.params), weights);
        Frozen { graph, store }
    }

    /// Runs the whole graph and takes the value of slot `output`.
    pub fn run(&self, inputs: Vec<(SlotId, Tensor)>, output: SlotId) -> Result<Tensor> {
        let mut tape = Tape::new(&self.graph, Keep::Nothing);
        for (slot, value) in inputs {
            tape.set(slot, value);
        }
        let mut parameters = self.store.walk(0..self.graph.nodes.len());
        for (i, node) in self.graph.nodes.iter().enumerate() {
            let _fetched = parameters.fetch()?;
            tape.run(i).with_context(|| format!("running {}", node.name))?;
        }
        Ok(tape.take(output)?)
    }
}

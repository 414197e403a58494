//! Segments in running order, and the slots they read and write.

use std::sync::{Arc, Mutex};

use candle_core::{Result, Tensor};

use crate::device::{BucketLayout, GradSlot, ParamSlot, WeightRef};

/// A place for one activation; written once, read by any number of later segments.
pub type SlotId = usize;

/// A pure function of its inputs and parameters: no randomness, no state, no I/O, so that recompute equals compute.
pub trait Segment: Send + Sync {
    /// `inputs` and the result are in the order in which the node declares its slots.
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>>;
}

/// One segment in its place: what is fetched, recomputed, released, reduced, offloaded and saved.
pub struct Node {
    /// Unique; begins with the component, as in `unet.down_blocks.0.layer0`.
    pub name: String,
    pub inputs: Vec<SlotId>,
    pub outputs: Vec<SlotId>,
    pub params: Arc<ParamSlot>,
    /// None if the segment is frozen.
    pub grads: Option<Arc<GradSlot>>,
    body: Box<dyn Segment>,
}

impl Node {
    pub fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.body.forward(inputs)
    }
}

/// A whole network, or several in one (text encoder and UNet).
pub struct SegmentGraph {
    pub nodes: Vec<Node>,
    pub slot_names: Vec<String>,
}

impl SegmentGraph {
    pub fn parameters(&self) -> usize {
        self.nodes.iter().map(|n| n.params.layout().parameters()).sum()
    }
}

/// Names and shapes in the order of declaration.
type Declared = Vec<(String, Vec<usize>)>;

/// Collects a segment's parameters while its layers are built; `pp` descends as candle's `VarBuilder` does.
///
/// Names are those of diffusers' own files with the component in front (`unet.down_blocks.0.resnets.0.conv1.weight`).
#[derive(Clone)]
pub struct Params {
    prefix: String,
    tensors: Arc<Mutex<Declared>>,
    slot: Arc<ParamSlot>,
    grads: Option<Arc<GradSlot>>,
}

impl Params {
    /// The same segment's parameters under `prefix.name`.
    pub fn pp(&self, name: impl std::fmt::Display) -> Self {
        Params { prefix: format!("{}.{name}", self.prefix), ..self.clone() }
    }

    /// Declares the tensor `prefix.name`.
    pub fn get(&self, name: &str, shape: &[usize]) -> WeightRef {
        let mut tensors = self.tensors.lock().unwrap_or_else(|e| e.into_inner());
        tensors.push((format!("{}.{name}", self.prefix), shape.to_vec()));
        WeightRef::new(self.slot.clone(), self.grads.clone(), tensors.len() - 1)
    }
}

/// Builds a graph segment by segment, in running order.
#[derive(Default)]
pub struct GraphBuilder {
    nodes: Vec<Node>,
    slot_names: Vec<String>,
}

impl GraphBuilder {
    pub fn new() -> Self {
        Self::default()
    }

    /// A slot that the caller of the graph fills.
    pub fn input(&mut self, name: impl Into<String>) -> SlotId {
        self.slot_names.push(name.into());
        self.slot_names.len() - 1
    }

    /// Appends a segment. `prefix` begins the names of its tensors (`unet`, `text_encoder`); `outputs` names the
    /// slots it writes, which are returned in that order.
    pub fn segment<const N: usize>(
        &mut self,
        name: impl Into<String>,
        prefix: &str,
        trainable: bool,
        inputs: &[SlotId],
        outputs: [&str; N],
        build: impl FnOnce(&Params) -> Box<dyn Segment>,
    ) -> [SlotId; N] {
        let name = name.into();
        let slot = ParamSlot::new(name.clone());
        let grads = trainable.then(|| GradSlot::new(name.clone()));
        let params =
            Params { prefix: prefix.to_string(), tensors: Arc::default(), slot: slot.clone(), grads: grads.clone() };
        let body = build(&params);
        let tensors = std::mem::take(&mut *params.tensors.lock().unwrap_or_else(|e| e.into_inner()));
        slot.lay_out(BucketLayout::new(tensors));
        let outputs = outputs.map(|output| self.input(output));
        self.nodes.push(Node { name, inputs: inputs.to_vec(), outputs: outputs.to_vec(), params: slot, grads, body });
        outputs
    }

    pub fn finish(self) -> SegmentGraph {
        SegmentGraph { nodes: self.nodes, slot_names: self.slot_names }
    }
}

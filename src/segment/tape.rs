//! One pass over a graph: what is in the slots, what was kept for the way back, and the slots' gradients.

use candle_core::{Result, Tensor, Var, bail};

use super::graph::{SegmentGraph, SlotId};
use super::pullback::{carries_gradient, leaf, pullback};
use crate::ops;

/// What a segment leaves behind on the way forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Keep {
    /// Nothing: there is no way back (frozen networks, sampling).
    Nothing,
    /// Its inputs; the segment runs again on the way back (recompute).
    Inputs,
    /// Its graph; nothing runs twice.
    Graph,
}

/// A segment's graph, kept for the way back.
struct Kept {
    inputs: Vec<Var>,
    outputs: Vec<Tensor>,
}

/// A pass forward and, unless everything is [`Keep::Nothing`], back. `run` is called for 0, 1, ...; `pull` in reverse.
pub struct Tape<'g> {
    graph: &'g SegmentGraph,
    keep: Vec<Keep>,
    values: Vec<Option<Tensor>>,
    grads: Vec<Option<Tensor>>,
    kept: Vec<Option<Kept>>,
    /// Slots that a segment writes; gradients of the others are nobody's concern.
    written: Vec<bool>,
    /// First and last segment that reads a slot.
    readers: Vec<Option<(usize, usize)>>,
}

impl<'g> Tape<'g> {
    pub fn new(graph: &'g SegmentGraph, keep: Keep) -> Self {
        Self::with_choice(graph, vec![keep; graph.nodes.len()])
    }

    /// `keep[i]` says what segment i leaves behind.
    pub fn with_choice(graph: &'g SegmentGraph, keep: Vec<Keep>) -> Self {
        assert_eq!(keep.len(), graph.nodes.len());
        let slots = graph.slot_names.len();
        let mut written = vec![false; slots];
        let mut readers: Vec<Option<(usize, usize)>> = vec![None; slots];
        for (i, node) in graph.nodes.iter().enumerate() {
            node.outputs.iter().for_each(|&slot| written[slot] = true);
            for &slot in &node.inputs {
                let first = readers[slot].map_or(i, |(first, _)| first);
                readers[slot] = Some((first, i));
            }
        }
        let kept = graph.nodes.iter().map(|_| None).collect();
        Tape { graph, keep, values: vec![None; slots], grads: vec![None; slots], kept, written, readers }
    }

    /// Fills an input slot.
    pub fn set(&mut self, slot: SlotId, value: Tensor) {
        self.values[slot] = Some(value.detach());
    }

    /// Runs segment `i` forward. Its parameters must be fetched.
    pub fn run(&mut self, i: usize) -> Result<()> {
        let node = &self.graph.nodes[i];
        let inputs = self.inputs(i)?;
        let outputs = if self.keep[i] == Keep::Graph {
            let leaves = inputs.iter().map(leaf).collect::<Result<Vec<_>>>()?;
            let tracked: Vec<Tensor> = leaves.iter().map(|v| v.as_tensor().clone()).collect();
            let outputs = node.forward(&tracked)?;
            let plain = outputs.iter().map(Tensor::detach).collect();
            self.kept[i] = Some(Kept { inputs: leaves, outputs });
            plain
        } else {
            node.forward(&inputs)?
        };
        for (&slot, output) in node.outputs.iter().zip(outputs) {
            self.values[slot] = Some(output);
        }
        self.drop_read_out(i);
        Ok(())
    }

    /// After its last reader ran, a slot that nobody recomputes from is dropped.
    fn drop_read_out(&mut self, i: usize) {
        let node = &self.graph.nodes[i];
        for &slot in &node.inputs {
            let Some((first, last)) = self.readers[slot] else { continue };
            let needed_again =
                (first..=last).any(|r| self.keep[r] == Keep::Inputs && self.graph.nodes[r].inputs.contains(&slot));
            if last == i && !needed_again {
                self.values[slot] = None;
            }
        }
    }

    fn inputs(&self, i: usize) -> Result<Vec<Tensor>> {
        let node = &self.graph.nodes[i];
        let value = |&slot: &SlotId| match &self.values[slot] {
            Some(value) => Ok(value.clone()),
            None => bail!("{}: slot {} is empty", node.name, self.graph.slot_names[slot]),
        };
        node.inputs.iter().map(value).collect()
    }

    /// Takes a result out of its slot.
    pub fn take(&mut self, slot: SlotId) -> Result<Tensor> {
        match self.values[slot].take() {
            Some(value) => Ok(value),
            None => bail!("slot {} is empty", self.graph.slot_names[slot]),
        }
    }

    /// Sets the gradient of the last segment's output, where the way back begins.
    pub fn seed(&mut self, slot: SlotId, grad: Tensor) {
        self.grads[slot] = Some(grad.detach());
    }

    /// Pulls the gradients of segment `i`'s outputs back to its inputs, running it again if only its inputs were
    /// kept. Its parameters must be fetched and its gradient bucket open.
    pub fn pull(&mut self, i: usize) -> Result<()> {
        let node = &self.graph.nodes[i];
        let dys: Vec<_> = node.outputs.iter().map(|&slot| self.grads[slot].take()).collect();
        let Kept { inputs, outputs } = match (self.keep[i], self.kept[i].take()) {
            (_, Some(kept)) => kept,
            (Keep::Inputs, None) => self.recompute(i)?,
            _ => bail!("{}: nothing was kept for the way back", node.name),
        };
        let grads = pullback(&outputs, &dys, &inputs)?;
        drop(outputs);
        for (&slot, grad) in node.inputs.iter().zip(grads) {
            if let Some(grad) = grad
                && self.written[slot]
                && carries_gradient(grad.dtype())
            {
                self.grads[slot] = Some(match self.grads[slot].take() {
                    Some(sum) => ops::add(&sum, &grad)?.detach(),
                    None => grad,
                });
            }
            // Going backward, the first reader is the last one that needs the value.
            if self.readers[slot].is_some_and(|(first, _)| first == i) {
                self.values[slot] = None;
            }
        }
        Ok(())
    }

    fn recompute(&self, i: usize) -> Result<Kept> {
        let inputs = self.inputs(i)?.iter().map(leaf).collect::<Result<Vec<_>>>()?;
        let tracked: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
        let outputs = self.graph.nodes[i].forward(&tracked)?;
        Ok(Kept { inputs, outputs })
    }
}

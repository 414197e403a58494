//! One pass over a graph: what is in the slots, what was kept for the way back, and the slots' gradients.

use candle_core::{Result, Tensor, bail};

use super::graph::{SegmentGraph, SlotId};
use super::pullback::{Forward, carries_gradient};
use super::value::{Aside, Leaving, Value};
use crate::device::trace::{Row, span};
use crate::ops;

/// What a segment leaves behind on the way forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Keep {
    /// Nothing: there is no way back (frozen networks, sampling).
    Nothing,
    /// Its inputs; the segment runs again on the way back (recompute).
    Inputs,
    /// As `Inputs`; those that no later segment reads on the way forward wait on the host.
    Host,
    /// Its graph; nothing runs twice.
    Graph,
}

impl Keep {
    /// Whether the segment runs again on the way back.
    pub fn recomputes(self) -> bool {
        matches!(self, Keep::Inputs | Keep::Host)
    }
}

/// A pass forward and, unless everything is [`Keep::Nothing`], back. `run` is called for 0, 1, ...; `pull` in reverse.
pub struct Tape<'g> {
    graph: &'g SegmentGraph,
    keep: Vec<Keep>,
    values: Vec<Option<Value>>,
    /// Where activations wait on the host.
    host: Option<Aside>,
    grads: Vec<Option<Tensor>>,
    /// Segments' graphs, kept for the way back.
    kept: Vec<Option<Forward>>,
    /// Slots that a segment writes; gradients of the others are nobody's concern.
    written: Vec<bool>,
    /// Slots whose value a kept graph holds, as what it was made of or what it made: those need not go anywhere.
    held: Vec<bool>,
    /// First and last segment that reads a slot.
    readers: Vec<Option<(usize, usize)>>,
}

impl<'g> Tape<'g> {
    /// The same for every segment. Nothing can wait on the host.
    pub fn new(graph: &'g SegmentGraph, keep: Keep) -> Self {
        Self::with_choice(graph, vec![keep; graph.nodes.len()], None)
    }

    /// `keep[i]` says what segment i leaves behind. Without `host` everything stays on the device.
    pub fn with_choice(graph: &'g SegmentGraph, keep: Vec<Keep>, host: Option<Aside>) -> Self {
        assert_eq!(keep.len(), graph.nodes.len());
        let slots = graph.slot_names.len();
        let (mut written, mut held) = (vec![false; slots], vec![false; slots]);
        let mut readers: Vec<Option<(usize, usize)>> = vec![None; slots];
        for (i, node) in graph.nodes.iter().enumerate() {
            node.outputs.iter().for_each(|&slot| written[slot] = true);
            node.inputs.iter().chain(&node.outputs).for_each(|&slot| held[slot] |= keep[i] == Keep::Graph);
            for &slot in &node.inputs {
                let first = readers[slot].map_or(i, |(first, _)| first);
                readers[slot] = Some((first, i));
            }
        }
        let kept = graph.nodes.iter().map(|_| None).collect();
        let values = (0..slots).map(|_| None).collect();
        Tape { graph, keep, values, host, grads: vec![None; slots], kept, written, held, readers }
    }

    /// Fills an input slot.
    pub fn set(&mut self, slot: SlotId, value: Tensor) {
        self.values[slot] = Some(Value::Device(value.detach()));
    }

    /// Runs segment `i` forward. Its parameters must be fetched.
    pub fn run(&mut self, i: usize) -> Result<()> {
        let node = &self.graph.nodes[i];
        let inputs = self.inputs(i)?;
        let leaving = self.send_aside(i)?;
        let outputs = if self.keep[i] == Keep::Graph {
            let forward = self.record(i, inputs)?;
            let outputs = forward.outputs.clone();
            self.kept[i] = Some(forward);
            outputs
        } else {
            node.forward(&inputs)?
        };
        for (&slot, output) in node.outputs.iter().zip(outputs) {
            self.values[slot] = Some(Value::Device(output));
        }
        for (slot, leaving) in leaving {
            self.values[slot] = Some(Value::Host(leaving.gone(&node.name)?));
        }
        self.drop_read_out(i);
        Ok(())
    }

    /// Begins to copy to the host what waits there from segment `i` on: the copy has the time that the segment takes.
    fn send_aside(&self, i: usize) -> Result<Vec<(SlotId, Leaving)>> {
        let (Some(host), node) = (&self.host, &self.graph.nodes[i]) else { return Ok(Vec::new()) };
        let mut leaving = Vec::new();
        // The last segment's are needed at once.
        if self.keep[i] != Keep::Host || i + 1 == self.graph.nodes.len() {
            return Ok(leaving);
        }
        for &slot in &node.inputs {
            let last = self.readers[slot].is_some_and(|(_, last)| last == i);
            if last
                && !self.held[slot]
                && !leaving.iter().any(|&(other, _)| other == slot)
                && let Some(Value::Device(tensor)) = &self.values[slot]
                && let Some(begun) = host.send(tensor, &node.name)?
            {
                leaving.push((slot, begun));
            }
        }
        Ok(leaving)
    }

    /// After its last reader ran, a slot that nobody recomputes from is dropped.
    fn drop_read_out(&mut self, i: usize) {
        for &slot in &self.graph.nodes[i].inputs {
            let Some((first, last)) = self.readers[slot] else { continue };
            let mut again = (first..=last).filter(|&r| self.keep[r].recomputes());
            if last == i && !again.any(|r| self.graph.nodes[r].inputs.contains(&slot)) {
                self.values[slot] = None;
            }
        }
    }

    fn inputs(&self, i: usize) -> Result<Vec<Tensor>> {
        let node = &self.graph.nodes[i];
        let value = |&slot: &SlotId| match &self.values[slot] {
            Some(value) => value.tensor(),
            None => bail!("{}: slot {} is empty", node.name, self.graph.slot_names[slot]),
        };
        node.inputs.iter().map(value).collect()
    }

    /// What is in a slot: an output, until its last reader has run.
    pub fn value(&self, slot: SlotId) -> Option<&Tensor> {
        match self.values[slot].as_ref()? {
            Value::Device(tensor) => Some(tensor),
            Value::Host(_) | Value::Coming(_) => None,
        }
    }

    /// Takes a result out of its slot.
    pub fn take(&mut self, slot: SlotId) -> Result<Tensor> {
        match self.values[slot].take() {
            Some(value) => value.tensor(),
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
        // Of the segment before this one, too: the copy has the time that this one takes.
        (i.saturating_sub(1)..=i).rev().try_for_each(|i| self.bring_back(i))?;
        let dys: Vec<_> = node.outputs.iter().map(|&slot| self.grads[slot].take()).collect();
        let forward = match (self.keep[i], self.kept[i].take()) {
            (_, Some(kept)) => kept,
            (keep, None) if keep.recomputes() => self.recompute(i)?,
            _ => bail!("{}: nothing was kept for the way back", node.name),
        };
        let grads = forward.pull(dys)?;
        for (&slot, grad) in node.inputs.iter().zip(grads) {
            if let Some(grad) = grad {
                self.grads[slot] = Some(match self.grads[slot].take() {
                    Some(sum) => ops::add(&sum, &grad)?,
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

    fn recompute(&mut self, i: usize) -> Result<Forward> {
        let _span = span(Row::Compute, || format!("recompute {}", self.graph.nodes[i].name));
        let node = &self.graph.nodes[i];
        for &slot in &node.inputs {
            let value = self.values[slot].take();
            self.values[slot] = value.map(|value| value.landed(&node.name)).transpose()?;
        }
        self.record(i, self.inputs(i)?)
    }

    /// Gradients go on to those slots alone that a segment has written.
    fn record(&self, i: usize, inputs: Vec<Tensor>) -> Result<Forward> {
        let node = &self.graph.nodes[i];
        let kinds: Vec<_> = inputs.iter().map(Tensor::dtype).collect();
        let wanted = node.inputs.iter().zip(kinds).map(|(&slot, kind)| self.written[slot] && carries_gradient(kind));
        Forward::of(inputs, wanted, |inputs| node.forward(inputs))
    }

    /// Begins to bring back what segment `i` runs again from, for it and the segments before it.
    fn bring_back(&mut self, i: usize) -> Result<()> {
        let Some(host) = &self.host else { return Ok(()) };
        for &slot in self.graph.nodes[i].inputs.iter().filter(|_| self.keep[i].recomputes()) {
            let value = self.values[slot].take();
            self.values[slot] = value.map(|value| host.bring(value)).transpose()?;
        }
        Ok(())
    }
}

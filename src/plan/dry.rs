//! What each segment takes in a pass forward and back: the real code runs dry, once without a graph and once with all graphs
//! kept, and the counting allocator is read around each segment. Many rows are not run: what a few take is a straight line.

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};

use crate::device::{Buffer, Tally, dry, forget_peak, tally};
use crate::segment::{Keep, SegmentGraph, SlotId, Tape};

/// Bytes of activations around one segment's turn.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Span {
    /// The most that was held, beyond what was held before.
    pub above: usize,
    /// What is held after it beyond what was held before.
    pub change: isize,
    /// Floating-point operations of products and attention.
    pub flops: f64,
}

/// One segment's spans and values.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Forward without a graph.
    pub plain: Span,
    /// Forward with the graph kept.
    pub graph: Span,
    /// Backward of the kept graph.
    pub pull: Span,
    /// Bytes of each of its outputs.
    pub outputs: Vec<usize>,
}

/// A tensor that is given to a graph.
#[derive(Clone, Debug)]
pub struct Given {
    pub slot: SlotId,
    pub shape: Vec<usize>,
    pub dtype: DType,
}

impl Span {
    /// On the line through what it is for `at` and `at + 1` rows (`next`), for `rows`.
    fn along(&self, next: &Span, at: usize, rows: usize) -> Span {
        let above = along(self.above as f64, next.above as f64, at, rows).max(0.0) as usize;
        let change = along(self.change as f64, next.change as f64, at, rows) as isize;
        Span { above, change, flops: along(self.flops, next.flops, at, rows) }
    }
}

fn along(one: f64, next: f64, at: usize, rows: usize) -> f64 {
    one + (next - one) * (rows as f64 - at as f64)
}

impl Measured {
    /// As [`Span::along`].
    pub fn along(&self, next: &Measured, at: usize, rows: usize) -> Measured {
        let outputs = self.outputs.iter().zip(&next.outputs);
        Measured {
            plain: self.plain.along(&next.plain, at, rows),
            graph: self.graph.along(&next.graph, at, rows),
            pull: self.pull.along(&next.pull, at, rows),
            outputs: outputs.map(|(&one, &next)| along(one as f64, next as f64, at, rows) as usize).collect(),
        }
    }
}

impl Given {
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()
    }

    fn tensor(&self) -> Result<Tensor> {
        Ok(Tensor::zeros(&*self.shape, self.dtype, &Device::Cpu)?)
    }
}

/// All segments of `graph`, which computes in `dtype`, forward and back; and what the threads keep as scratch.
pub fn forward_and_back(
    graph: &SegmentGraph,
    dtype: DType,
    given: &[Given],
    prediction: SlotId,
) -> Result<(Vec<Measured>, Tally)> {
    let mut measured = vec![Measured::default(); graph.nodes.len()];
    let mut scratch = Tally::default();
    let (result, left_out) = dry(|| plain(graph, dtype, given, &mut measured));
    scratch.join_scratch(&left_out);
    result?;
    let (result, left_out) = dry(|| with_graphs(graph, dtype, given, prediction, &mut measured));
    scratch.join_scratch(&left_out);
    result?;
    Ok((measured, scratch))
}

/// [`forward_and_back`] of `rows` rows, `given` by how many there are; of many rows, what two and three take says it all.
pub fn forward_and_back_of(
    graph: &SegmentGraph,
    dtype: DType,
    rows: usize,
    given: impl Fn(usize) -> Vec<Given>,
    prediction: SlotId,
) -> Result<(Vec<Measured>, Tally)> {
    const FEW: usize = 2;
    if rows <= 2 * FEW + 1 {
        return forward_and_back(graph, dtype, &given(rows), prediction);
    }
    let (few, _) = forward_and_back(graph, dtype, &given(FEW), prediction)?;
    let (next, scratch) = forward_and_back(graph, dtype, &given(FEW + 1), prediction)?;
    Ok((few.iter().zip(&next).map(|(few, next)| few.along(next, FEW, rows)).collect(), scratch))
}

/// What a network that is only run takes at most in each segment, with what it is given; and what it computes.
pub fn forward_only(graph: &SegmentGraph, dtype: DType, given: &[Given]) -> Result<(Vec<usize>, Tally)> {
    let mut turns = Vec::new();
    let (result, left_out) = dry(|| -> Result<()> {
        let mut tape = Tape::new(graph, Keep::Nothing);
        for input in given {
            tape.set(input.slot, input.tensor()?);
        }
        for (i, node) in graph.nodes.iter().enumerate() {
            fill(graph, i, dtype)?;
            forget_peak();
            let ran = tape.run(i).with_context(|| format!("running {} dry", node.name));
            node.params.empty();
            ran?;
            turns.push(tally().peak.max(0) as usize);
        }
        Ok(())
    });
    result?;
    Ok((turns, left_out))
}

/// Puts memory without contents where segment `i`'s ops find their weights.
fn fill(graph: &SegmentGraph, i: usize, dtype: DType) -> Result<()> {
    let params = &graph.nodes[i].params;
    params.fill(Arc::new(Buffer::unbudgeted(dtype, params.layout().len)?));
    Ok(())
}

/// Runs `work` and says what it took.
fn spanned<R>(work: impl FnOnce() -> Result<R>) -> Result<(R, Span)> {
    forget_peak();
    let before = tally();
    let result = work()?;
    let after = tally();
    let span = Span {
        above: (after.peak - before.held).max(0) as usize,
        change: after.held - before.held,
        flops: after.flops - before.flops,
    };
    Ok((result, span))
}

/// Forward, segment by segment, for the sizes of what is between them. A value is dropped after its last reader.
fn plain(graph: &SegmentGraph, dtype: DType, given: &[Given], measured: &mut [Measured]) -> Result<()> {
    let mut values: Vec<Option<Tensor>> = vec![None; graph.slot_names.len()];
    for input in given {
        values[input.slot] = Some(input.tensor()?);
    }
    let mut last_reader = vec![0; values.len()];
    for (i, node) in graph.nodes.iter().enumerate() {
        node.inputs.iter().for_each(|&slot| last_reader[slot] = i);
    }
    for (i, node) in graph.nodes.iter().enumerate() {
        let what = || format!("running {} dry", node.name);
        let inputs: Option<Vec<Tensor>> = node.inputs.iter().map(|&slot| values[slot].clone()).collect();
        let inputs = inputs.with_context(what)?;
        fill(graph, i, dtype)?;
        let (outputs, span) = spanned(|| node.forward(&inputs).with_context(what))?;
        node.params.empty();
        measured[i].plain = span;
        measured[i].outputs = outputs.iter().map(|t| t.elem_count() * t.dtype().size_in_bytes()).collect();
        drop(inputs);
        node.inputs.iter().filter(|&&slot| last_reader[slot] == i).for_each(|&slot| values[slot] = None);
        for (&slot, output) in node.outputs.iter().zip(outputs) {
            values[slot] = Some(output);
        }
    }
    Ok(())
}

/// A whole pass with every segment's graph kept.
fn with_graphs(
    graph: &SegmentGraph,
    dtype: DType,
    given: &[Given],
    prediction: SlotId,
    measured: &mut [Measured],
) -> Result<()> {
    let mut tape = Tape::new(graph, Keep::Graph);
    for input in given {
        tape.set(input.slot, input.tensor()?);
    }
    for (i, node) in graph.nodes.iter().enumerate() {
        fill(graph, i, dtype)?;
        let (_, span) = spanned(|| tape.run(i).with_context(|| format!("running {} dry", node.name)))?;
        node.params.empty();
        measured[i].graph = span;
    }
    let predicted = tape.take(prediction)?;
    tape.seed(prediction, Tensor::zeros(predicted.shape(), predicted.dtype(), &Device::Cpu)?);
    drop(predicted);
    for (i, node) in graph.nodes.iter().enumerate().rev() {
        fill(graph, i, dtype)?;
        if let Some(grads) = &node.grads {
            grads.fill(Buffer::unbudgeted(DType::F32, node.params.layout().len)?);
        }
        let (_, span) = spanned(|| tape.pull(i).with_context(|| format!("running {} dry, backward", node.name)))?;
        node.params.empty();
        if let Some(grads) = &node.grads {
            grads.empty();
            grads.take_visits();
        }
        measured[i].pull = span;
    }
    Ok(())
}

//! One optimizer step, top to bottom. Read this first.
//!
//! ```text
//! for every micro-batch:   segments 0..N:  fetch -> run -> release            (forward)
//!                          loss and its gradient, closed form
//!                          segments N..0:  fetch -> open bucket -> pull -> close bucket, release   (backward)
//! then:                    finish reducing -> global norm -> clip factor
//!                          segments 0..N:  update the owned range -> publish
//! ```

use anyhow::{Context, Result, bail};
use candle_core::Tensor;

use super::network::Network;
use crate::device::trace::{Row, span};
use crate::optim::AdamW;
use crate::segment::{SlotId, Tape};

/// This rank's rows of a micro-batch, as the graph's input slots take them.
pub struct Inputs {
    pub slots: Vec<(SlotId, Tensor)>,
    /// Where the network's prediction comes out.
    pub prediction: SlotId,
}

/// How one group of parameters is updated in this step.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    pub adamw: AdamW,
    pub rate: f64,
}

impl Network {
    /// Forward and backward of one micro-batch; gradients are added to the reducer's sums. `objective` takes the
    /// prediction to the gradient of the loss. A rank without rows (None) joins every collective and adds zeros.
    pub fn forward_backward(
        &mut self,
        inputs: Option<Inputs>,
        objective: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let Some(inputs) = inputs else { return self.keep_company() };
        let mut tape = Tape::new(&self.graph, self.keep);
        for (slot, value) in inputs.slots {
            tape.set(slot, value);
        }
        for (i, node) in self.graph.nodes.iter().enumerate() {
            let _fetched = self.store.fetch(i)?;
            let _span = span(Row::Compute, || format!("forward {}", node.name));
            tape.run(i).with_context(|| format!("forward of {}", node.name))?;
        }
        let prediction = tape.take(inputs.prediction)?;
        tape.seed(inputs.prediction, objective(&prediction)?);
        drop(prediction);
        for (i, node) in self.graph.nodes.iter().enumerate().rev() {
            let fetched = self.store.fetch(i)?;
            self.reducer.open(i)?;
            let pulling = span(Row::Compute, || format!("backward {}", node.name));
            tape.pull(i).with_context(|| format!("backward of {}", node.name))?;
            drop(pulling);
            // Released before the gradients travel, so that both are never resident together.
            drop(fetched);
            self.reducer.close(i)?;
        }
        Ok(())
    }

    /// The same collectives in the same order, without rows.
    fn keep_company(&mut self) -> Result<()> {
        let segments = self.graph.nodes.len();
        (0..segments).try_for_each(|i| self.store.fetch(i).map(drop))?;
        for i in (0..segments).rev() {
            drop(self.store.fetch(i)?);
            self.reducer.open(i)?;
            self.reducer.close(i)?;
        }
        Ok(())
    }

    /// Completes the sums over ranks and returns the sum of squares of every segment's gradients, in order; a collective.
    pub fn squares(&mut self) -> Result<Vec<f64>> {
        self.reducer.finish()?;
        self.reducer.squares()
    }

    /// The global gradient norm, before clipping: all buckets in order. An error on all ranks, naming segments, if a
    /// gradient is not finite.
    pub fn reduce(&mut self) -> Result<f64> {
        let squares = self.squares()?;
        let norm = squares.iter().sum::<f64>().sqrt();
        if !norm.is_finite() {
            let bad = (0..squares.len()).filter(|&i| !squares[i].is_finite()).map(|i| self.store.name(i));
            bail!(
                "the gradients of {} are not finite: lower optimizer.learning_rate, or add warm-up (lr_schedule.warmup_steps)",
                listed(bad.map(str::to_string).collect())
            );
        }
        Ok(norm)
    }

    /// Updates every owned range with the reduced gradients times `grad_scale`, publishes the result and forgets the
    /// gradients. `step` counts from 1; `group` says how the segment of a name is updated.
    pub fn update(&mut self, step: u64, grad_scale: f32, group: impl Fn(&str) -> Group) -> Result<()> {
        for i in 0..self.store.len() {
            if let (Some(grads), Some(moments)) = (self.reducer.reduced(i), &mut self.moments[i]) {
                let Group { adamw, rate } = group(self.store.name(i));
                let _span = span(Row::Optimizer, || format!("update {}", self.store.name(i)));
                self.store.update(i, |mut owned| {
                    adamw.update(step, rate, grad_scale, owned.master(), moments, grads);
                    owned.round();
                })?;
                self.store.publish(i)?;
            }
        }
        self.reducer.clear();
        Ok(())
    }
}

impl Network {
    /// Forgets the step's gradients without an update.
    pub fn skip(&mut self) {
        self.reducer.clear();
    }
}

/// A list for a message: the first few, and how many more.
pub(super) fn listed(mut items: Vec<String>) -> String {
    const SHOWN: usize = 8;
    let more = items.len().saturating_sub(SHOWN);
    if more > 0 {
        items.truncate(SHOWN);
        items.push(format!("{more} more"));
    }
    items.join(", ")
}

/// The factor that brings a gradient of norm `norm` down to `max_norm` (0: no clipping), as `clip_grad_norm_` does.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    match max_norm > 0.0 {
        true => (max_norm / (norm + 1e-6)).min(1.0) as f32,
        false => 1.0,
    }
}

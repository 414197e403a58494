//! One optimizer step, top to bottom. Read this first.
//!
//! ```text
//! for every micro-batch:   segments 0..N:  fetch -> run -> release            (forward)
//!                          loss and its gradient, closed form
//!                          segments N..0:  fetch -> open bucket -> pull -> release -> close bucket   (backward)
//! then:                    global norm -> clip factor
//!                          segments 0..N:  update the owned range
//! ```
//!
//! What travels does so beside this: the next segment's parameters while one runs, a bucket of gradients while the next
//! one is filled. The update runs beside the next step's forward, which waits, segment by segment, for what it needs.
//! Where nothing depends on the norm, a segment is updated as soon as its gradients are complete.

use anyhow::{Context, Result, bail};
use candle_core::Tensor;

use super::network::Network;
use super::optimizer::StepScale;
use crate::device::trace::{Row, span};
use crate::optim::AdamW;
use crate::segment::{Aside, SlotId, Tape};
use crate::zero::Placement;

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

/// What follows a micro-batch.
#[derive(Clone, Copy)]
pub enum Then<'a> {
    /// More micro-batches of the same step.
    Accumulate,
    /// The norm of the step's gradients; with it the update.
    Norm,
    /// Nothing that the update depends on: each segment is updated at once. The norm may still be asked for.
    Update(StepScale, &'a dyn Fn(&str) -> Group),
}

impl Network {
    /// Forward and backward of one micro-batch; gradients are added to the reducer's sums. `objective` takes the
    /// prediction to the gradient of the loss. A rank without rows (None) joins every collective and adds zeros.
    pub fn forward_backward(
        &mut self,
        inputs: Option<Inputs>,
        then: Then,
        objective: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let Some(inputs) = inputs else { return self.keep_company(then) };
        let graph = &self.graph;
        let tiers = self.store.tiers();
        let aside = Aside { arena: tiers.host.activations.clone(), queue: tiers.activations.clone() };
        let mut tape = Tape::with_choice(graph, self.keep.clone(), Some(aside));
        for (slot, value) in inputs.slots {
            tape.set(slot, value);
        }
        let mut parameters = self.store.there_and_back();
        for (i, node) in graph.nodes.iter().enumerate() {
            let _fetched = parameters.fetch()?;
            let _span = span(Row::Compute, || format!("forward {}", node.name));
            tape.run(i).with_context(|| format!("forward of {}", node.name))?;
        }
        let prediction = tape.take(inputs.prediction)?;
        tape.seed(inputs.prediction, objective(&prediction)?);
        drop(prediction);
        for (i, node) in graph.nodes.iter().enumerate().rev() {
            let fetched = parameters.fetch()?;
            self.reducer.open(i)?;
            let pulling = span(Row::Compute, || format!("backward {}", node.name));
            tape.pull(i).with_context(|| format!("backward of {}", node.name))?;
            drop(pulling);
            // Released before the gradients travel, so that both are never resident together.
            drop(fetched);
            let ready = prepare(&self.store, &self.optimizer, &self.reducer, i, then);
            self.reducer.close(i, then.ends_step(), ready)?;
        }
        self.reducer.settle()
    }

    /// The same collectives in the same order, without rows.
    fn keep_company(&mut self, then: Then) -> Result<()> {
        let segments = self.graph.nodes.len();
        let mut parameters = self.store.there_and_back();
        (0..segments).try_for_each(|_| parameters.fetch().map(drop))?;
        for i in (0..segments).rev() {
            drop(parameters.fetch()?);
            self.reducer.open(i)?;
            let ready = prepare(&self.store, &self.optimizer, &self.reducer, i, then);
            self.reducer.close(i, then.ends_step(), ready)?;
        }
        self.reducer.settle()
    }

    /// The sum of squares of every segment's gradients, over all ranks, in order; a collective. After the step's last
    /// micro-batch.
    pub fn squares(&self) -> Result<Vec<f64>> {
        self.reducer.squares()
    }

    /// The global gradient norm, before clipping. An error on all ranks, naming segments, if a gradient is not finite.
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

    /// Updates every owned range with the reduced gradients times `grad_scale` and forgets the gradients. `step` counts
    /// from 1; `group` says how the segment of a name is updated. Where something rests off the device this goes on
    /// beside what follows, which waits for what it needs.
    pub fn update(&mut self, step: u64, grad_scale: f32, group: impl Fn(&str) -> Group) -> Result<()> {
        let then = Then::Update(StepScale { step, grad_scale }, &group);
        for i in 0..self.store.len() {
            prepare(&self.store, &self.optimizer, &self.reducer, i, then).into_iter().for_each(|start| start());
        }
        match self.store.tiers().placement == Placement::DEVICE {
            true => self.settle(),
            false => Ok(()),
        }
    }

    /// Forgets the step's gradients without an update.
    pub fn skip(&mut self) {
        (0..self.store.len()).for_each(|i| self.reducer.forget(i));
    }

    /// Waits for every update.
    pub fn settle(&self) -> Result<()> {
        (0..self.store.len()).try_for_each(|i| self.store.settle(i))
    }
}

/// Makes the store wait for segment `i`'s update and returns what starts it, if `then` says that it is updated.
fn prepare(
    store: &crate::zero::ParamStore,
    optimizer: &super::optimizer::Optimizer,
    reducer: &crate::zero::GradReducer,
    i: usize,
    then: Then,
) -> Option<crate::zero::Start> {
    let Then::Update(scale, group) = then else { return None };
    let (updated, start) = optimizer.prepare(i, scale, group(store.name(i)))?;
    store.updating(i, updated);
    let reducer = reducer.forgetting(i);
    Some(Box::new(move || {
        // What is read now is read before the next bucket is opened, which waits for this update.
        reducer();
        start();
    }))
}

impl Then<'_> {
    fn ends_step(self) -> bool {
        !matches!(self, Then::Accumulate)
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

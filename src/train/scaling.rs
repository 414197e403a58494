//! fp16: a step whose gradients overflow is skipped, by all ranks together, and its message when skipping no longer
//! helps. Losses and gradient norms are the same on all ranks, so they decide alike without asking each other.

use anyhow::{Context, Result, anyhow};
use candle_core::{DType, Tensor};

use super::items::Items;
use super::network::Network;
use super::step::Inputs;
use super::trainer::Trainer;
use crate::checkpoint;
use crate::comm::{Slice, SliceMut};
use crate::device::on_host;
use crate::optim::{LossScale, Overflow};
use crate::segment::{Keep, Tape};
use crate::zero::Partition;

/// A micro-batch whose loss was not finite.
pub(super) struct Overflowed {
    pub items: Items,
    pub micro_step: u64,
}

impl Trainer<'_> {
    /// By which this step's gradients are multiplied on their way; 1 but under fp16.
    pub(super) fn loss_scale(&self) -> f64 {
        self.scaling.as_ref().map_or(1.0, LossScale::scale)
    }

    /// After the step's last micro-batch: the norm of its gradients before clipping, with the loss scale taken out, or
    /// None where something overflowed and the step is skipped: then the gradients are forgotten. `overflowed`: the first
    /// micro-batch whose loss was not finite. A collective.
    pub(super) fn norm(&mut self, overflowed: Option<Overflowed>) -> Result<Option<f64>> {
        let Some(scaling) = &mut self.scaling else { return self.network.reduce().map(Some) };
        let squares = self.network.squares()?;
        let norm = squares.iter().sum::<f64>().sqrt() / scaling.scale();
        if norm.is_finite() && overflowed.is_none() {
            scaling.good_step();
            return Ok(Some(norm));
        }
        let used = scaling.scale();
        match scaling.overflow() {
            Overflow::Skip(_) => {
                self.network.skip();
                Ok(None)
            }
            Overflow::GiveUp => Err(self.overflow(used, &squares, overflowed)?),
        }
    }

    /// Where the numbers first leave fp16, and what can be done. A collective.
    fn overflow(&mut self, scale: f64, squares: &[f64], overflowed: Option<Overflowed>) -> Result<anyhow::Error> {
        let forward = match overflowed {
            Some(micro_batch) => self.first_not_finite(&micro_batch)?,
            None => None,
        };
        let name = |i: usize| self.network.store.name(i);
        let found = match forward {
            Some(i) => format!("already on the way forward, first in {}, whose output is not finite", name(i)),
            // Backward begins at the end.
            None => match (0..squares.len()).rev().find(|&i| !squares[i].is_finite()) {
                Some(i) => format!("on the way backward, first in {}, whose gradients are not finite", name(i)),
                None => "in the loss".to_string(),
            },
        };
        let skipped = self.scaling.as_ref().map_or(0, |scaling| scaling.state().skipped_in_a_row);
        let saved = match checkpoint::latest(&self.plan.output.dir)? {
            Some(path) => format!("{} is from before this step", path.display()),
            None => "there is no checkpoint from before this step".to_string(),
        };
        Ok(anyhow!(
            "fp16 overflows with a loss scale of {scale}, and the last {skipped} attempts at this step were all skipped: {found}. \
             Set train.mixed_precision = \"bf16\", which has fp32's range, or lower optimizer.learning_rate; {saved}"
        ))
    }

    /// The first segment whose output is not finite on any rank, in a micro-batch that is run again; a collective.
    fn first_not_finite(&mut self, micro_batch: &Overflowed) -> Result<Option<usize>> {
        let items = &micro_batch.items.items;
        let local = Partition::new(self.comm.rank(), self.comm.world_size()).items(items.len());
        let inputs = match local.is_empty() {
            true => None,
            false => {
                let rows = self.rows.rows(items, local, micro_batch.micro_step)?;
                Some(self.inputs(&rows)?)
            }
        };
        let mine = [self.network.first_not_finite(inputs)?.map_or(f64::INFINITY, |i| i as f64)];
        let mut all = vec![0f64; self.comm.world_size()];
        self.comm.all_gather(Slice::F64(&mine), SliceMut::F64(&mut all))?;
        let first = all.into_iter().fold(f64::INFINITY, f64::min);
        Ok(first.is_finite().then_some(first as usize))
    }
}

impl Network {
    /// The first segment on the way forward whose output is not finite. Without rows only the collectives.
    fn first_not_finite(&self, inputs: Option<Inputs>) -> Result<Option<usize>> {
        let mut tape = inputs.map(|inputs| {
            let mut tape = Tape::new(&self.graph, Keep::Nothing);
            inputs.slots.into_iter().for_each(|(slot, value)| tape.set(slot, value));
            tape
        });
        let mut first = None;
        for (i, node) in self.graph.nodes.iter().enumerate() {
            let _fetched = self.store.fetch(i)?;
            let Some(tape) = tape.as_mut().filter(|_| first.is_none()) else { continue };
            tape.run(i).with_context(|| format!("forward of {}", node.name))?;
            for &slot in &node.outputs {
                if let Some(value) = tape.value(slot)
                    && !all_finite(value)?
                {
                    first = Some(i);
                }
            }
        }
        Ok(first)
    }
}

fn all_finite(tensor: &Tensor) -> Result<bool> {
    let values = on_host(tensor)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(checkpoint::all_finite(&values))
}

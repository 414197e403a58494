//! What the prompts become: with a frozen text encoder, states that are computed once; with a trained one, token ids
//! that run through the graph in every micro-batch.

use anyhow::Result;
use candle_core::{Device, Tensor};

use super::frozen::Frozen;
use crate::data::Tokens;
use crate::device::Compute;
use crate::diffusion::Row;
use crate::model::{Conditioning, TextSlots};
use crate::segment::SlotId;

/// The run's prompts: the instance prompt and, under prior preservation, the class prompt.
pub enum Prompts {
    /// (tokens, width) for each prompt.
    Encoded(Vec<Tensor>),
    Tokens(Vec<Tokens>),
}

/// Fills a text encoder's input slots for these prompts; image i belongs to prompt `rows[i]`.
fn token_slots(
    slots: &TextSlots,
    prompts: &[Tokens],
    rows: Vec<u32>,
    device: &Device,
) -> Result<Vec<(SlotId, Tensor)>> {
    let length = prompts.first().map_or(0, |p| p.ids.len());
    let ids = prompts.iter().flat_map(|p| p.ids.iter().copied()).collect::<Vec<u32>>();
    let images = rows.len();
    let mut filled = vec![
        (slots.token_ids, Tensor::from_vec(ids, (prompts.len(), length), device)?),
        (slots.rows, Tensor::from_vec(rows, images, device)?),
    ];
    if let Some(slot) = slots.key_lengths {
        let lengths: Vec<u32> = prompts.iter().map(|p| p.length as u32).collect();
        filled.push((slot, Tensor::from_vec(lengths, prompts.len(), device)?));
    }
    Ok(filled)
}

impl Prompts {
    /// Runs a frozen text encoder over the prompts, once.
    pub fn encode(encoder: &Frozen, slots: &TextSlots, prompts: &[Tokens], compute: &Compute) -> Result<Self> {
        let rows = (0..prompts.len() as u32).collect();
        let states =
            encoder.run(token_slots(slots, prompts, rows, &compute.device)?, slots.context)?.to_dtype(compute.dtype)?;
        Ok(Prompts::Encoded((0..prompts.len()).map(|i| states.get(i)).collect::<Result<_, _>>()?))
    }

    /// The text inputs of rows of these kinds.
    pub fn slots(&self, conditioning: &Conditioning, kinds: &[Row], device: &Device) -> Result<Vec<(SlotId, Tensor)>> {
        let number = |kind: &Row| match kind {
            Row::Instance => 0,
            Row::Class => 1,
        };
        match (self, conditioning) {
            (Prompts::Encoded(states), Conditioning::Context(slot)) => {
                let rows: Vec<&Tensor> = kinds.iter().map(|kind| &states[number(kind)]).collect();
                Ok(vec![(*slot, Tensor::stack(&rows, 0)?)])
            }
            (Prompts::Tokens(prompts), Conditioning::Prompts(slots)) => {
                token_slots(slots, prompts, kinds.iter().map(|kind| number(kind) as u32).collect(), device)
            }
            _ => anyhow::bail!("encoded prompts for a graph with a text encoder, or the reverse"),
        }
    }
}

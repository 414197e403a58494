//! What prompts become: with a frozen text encoder, states that are computed once; with a trained one, token ids that
//! run through the graph.

use anyhow::Result;
use candle_core::{Device, Tensor};

use super::frozen::Frozen;
use crate::data::Tokens;
use crate::device::Compute;
use crate::model::{Conditioning, TextSlots};
use crate::segment::SlotId;

/// Prompts, by number: a training run's instance prompt and class prompt, or what pictures are to show.
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

    pub fn len(&self) -> usize {
        match self {
            Prompts::Encoded(states) => states.len(),
            Prompts::Tokens(prompts) => prompts.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The text inputs of a batch whose image i belongs to prompt `rows[i]`.
    pub fn slots(&self, conditioning: &Conditioning, rows: &[usize], device: &Device) -> Result<Vec<(SlotId, Tensor)>> {
        match (self, conditioning) {
            (Prompts::Encoded(states), Conditioning::Context(slot)) => {
                let rows: Vec<&Tensor> = rows.iter().map(|&prompt| &states[prompt]).collect();
                Ok(vec![(*slot, Tensor::stack(&rows, 0)?)])
            }
            (Prompts::Tokens(prompts), Conditioning::Prompts(slots)) => {
                token_slots(slots, prompts, rows.iter().map(|&prompt| prompt as u32).collect(), device)
            }
            _ => anyhow::bail!("encoded prompts for a graph with a text encoder, or the reverse"),
        }
    }
}

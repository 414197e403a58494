//! What prompts become: with a frozen text encoder, states that are computed once; with a trained one, token ids that
//! run through the graph.

use anyhow::Result;
use candle_core::{Device, Tensor};

use super::frozen::Frozen;
use crate::data::Tokens;
use crate::device::{Compute, trace};
use crate::model::{Conditioning, TextSlots};
use crate::segment::SlotId;

/// Prompts, by number: a training run's instance prompt and class prompt, or what pictures are to show.
pub enum Prompts {
    /// (tokens, width) for each prompt.
    Encoded(Vec<Tensor>),
    /// Token ids of each prompt; the text encoder is part of the trained graph.
    Tokens(Vec<Tokens>),
    /// Too many to keep their states: a micro-batch's prompts are encoded when it comes.
    Live { encoder: Box<Frozen>, slots: TextSlots, tokens: Vec<Tokens>, compute: Compute },
}

/// Bytes of encoded prompts that are kept on a rank; beyond that they are encoded when they are needed.
const KEEP_BYTES: usize = 1 << 30;

/// A frozen text encoder runs over this many prompts at a time.
const AT_ONCE: usize = 32;

/// Fills a text encoder's input slots for these prompts; image i belongs to prompt `rows[i]`.
fn token_slots(
    slots: &TextSlots,
    prompts: &[&Tokens],
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

/// The numbers that occur, each once and in order, and for each row where its number stands among them.
fn each_once(numbers: &[usize]) -> (Vec<usize>, Vec<u32>) {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let places = numbers.iter().map(|n| sorted.partition_point(|known| known < n) as u32).collect();
    (sorted, places)
}

/// The states of these prompts (prompts, tokens, width), in the dtype of the run.
fn encode(encoder: &Frozen, slots: &TextSlots, prompts: &[&Tokens], compute: &Compute) -> Result<Tensor> {
    let _span = trace::span(trace::Row::Compute, "text");
    let rows = (0..prompts.len() as u32).collect();
    let inputs = token_slots(slots, prompts, rows, &compute.device)?;
    Ok(encoder.run(inputs, slots.context)?.to_dtype(compute.dtype)?)
}

impl Prompts {
    /// Prompts for a frozen text encoder of this width: encoded now, or as they come if there are very many.
    pub fn frozen(
        encoder: Frozen,
        slots: TextSlots,
        width: usize,
        tokens: Vec<Tokens>,
        compute: &Compute,
    ) -> Result<Self> {
        let bytes = tokens.iter().map(|t| t.ids.len()).sum::<usize>() * width * compute.dtype.size_in_bytes();
        if bytes > KEEP_BYTES {
            return Ok(Prompts::Live { encoder: Box::new(encoder), slots, tokens, compute: compute.clone() });
        }
        Prompts::encode(&encoder, &slots, &tokens, compute)
    }

    /// Runs a frozen text encoder over the prompts, once.
    pub fn encode(encoder: &Frozen, slots: &TextSlots, tokens: &[Tokens], compute: &Compute) -> Result<Self> {
        let mut encoded = Vec::with_capacity(tokens.len());
        for some in tokens.chunks(AT_ONCE) {
            let states = encode(encoder, slots, &some.iter().collect::<Vec<_>>(), compute)?;
            for i in 0..some.len() {
                // A copy of its own, not a view that keeps all of them alive.
                encoded.push(states.get(i)?.copy()?);
            }
        }
        Ok(Prompts::Encoded(encoded))
    }

    pub fn len(&self) -> usize {
        match self {
            Prompts::Encoded(states) => states.len(),
            Prompts::Tokens(tokens) | Prompts::Live { tokens, .. } => tokens.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The text inputs of a batch whose image i belongs to prompt `rows[i]`.
    pub fn slots(&self, conditioning: &Conditioning, rows: &[usize], device: &Device) -> Result<Vec<(SlotId, Tensor)>> {
        match (self, conditioning) {
            (Prompts::Encoded(states), Conditioning::Context(slot)) => {
                let rows: Vec<&Tensor> = rows.iter().map(|&number| &states[number]).collect();
                Ok(vec![(*slot, Tensor::stack(&rows, 0)?)])
            }
            (Prompts::Tokens(prompts), Conditioning::Prompts(slots)) => {
                let (wanted, places) = each_once(rows);
                let wanted: Vec<&Tokens> = wanted.iter().map(|&number| &prompts[number]).collect();
                token_slots(slots, &wanted, places, device)
            }
            (Prompts::Live { encoder, slots, tokens, compute }, Conditioning::Context(slot)) => {
                let (wanted, places) = each_once(rows);
                let wanted: Vec<&Tokens> = wanted.iter().map(|&number| &tokens[number]).collect();
                let states = encode(encoder, slots, &wanted, compute)?;
                Ok(vec![(*slot, states.index_select(&Tensor::new(places, device)?, 0)?)])
            }
            _ => anyhow::bail!("encoded prompts for a graph with a text encoder, or the reverse"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_micro_batch_encodes_each_of_its_prompts_once() {
        assert_eq!(each_once(&[7, 2, 7, 9, 2]), (vec![2, 7, 9], vec![1, 0, 1, 2, 0]));
        assert_eq!(each_once(&[0, 0, 1, 1]), (vec![0, 1], vec![0, 0, 1, 1]));
    }
}

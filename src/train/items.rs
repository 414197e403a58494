//! Which items each micro-batch holds, for all ranks together: a function of the seed (or the record) and the place in
//! the run alone.

use anyhow::Result;

use crate::Refusal;
use crate::checkpoint::Position;
use crate::diffusion::{Draws, Record};

/// One item of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its number in the data set.
    pub index: u64,
    /// Its number since the start of the run, which keys its random draws.
    pub running: u64,
}

/// The items of one micro-batch, of all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Items {
    pub items: Vec<Item>,
    /// No items of this epoch are left: an optimizer step ends here, too.
    pub ends_epoch: bool,
}

/// Walks through epochs of shuffled items (or through a record), resuming anywhere.
pub struct Sampler {
    draws: Draws,
    /// Items of an epoch.
    epoch_items: u64,
    /// Items of a micro-batch over all ranks; fewer at the end of an epoch.
    batch_items: u64,
    /// The epoch whose order is at hand.
    order: Option<(u64, Vec<u64>)>,
}

impl Sampler {
    pub fn new(draws: Draws, epoch_items: u64, batch_items: u64) -> Self {
        Sampler { draws, epoch_items, batch_items, order: None }
    }

    /// The micro-batch at `position`, which moves past it.
    pub fn next(&mut self, position: &mut Position, record: Option<&Record>) -> Result<Items> {
        let indices = match record {
            Some(record) => self.recorded(record, position.micro_step)?,
            None => self.drawn(*position),
        };
        let first = position.epoch * self.epoch_items + position.items_in_epoch;
        let items = indices.iter().zip(first..).map(|(&index, running)| Item { index, running }).collect();
        position.micro_step += 1;
        position.items_in_epoch += indices.len() as u64;
        let ends_epoch = position.items_in_epoch >= self.epoch_items;
        if ends_epoch {
            (position.epoch, position.items_in_epoch) = (position.epoch + 1, 0);
        }
        Ok(Items { items, ends_epoch })
    }

    fn drawn(&mut self, position: Position) -> Vec<u64> {
        if self.order.as_ref().is_none_or(|(epoch, _)| *epoch != position.epoch) {
            self.order = Some((position.epoch, self.draws.epoch_order(position.epoch, self.epoch_items)));
        }
        let order = self.order.as_ref().map_or(&[][..], |(_, order)| order);
        let from = position.items_in_epoch.min(self.epoch_items) as usize;
        let to = position.items_in_epoch.saturating_add(self.batch_items).min(self.epoch_items) as usize;
        order[from..to].to_vec()
    }

    fn recorded(&self, record: &Record, micro_step: u64) -> Result<Vec<u64>> {
        if micro_step as usize >= record.len() {
            return Err(Refusal::error(format!(
                "replay.draws holds {} micro-batches, and the run needs more: lower train.max_steps to what was recorded",
                record.len()
            )));
        }
        Ok(record.micro(micro_step as usize)?.index.iter().map(|&i| i as u64).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(batch: u64, from: Position, batches: usize) -> (Vec<Item>, Position) {
        let mut sampler = Sampler::new(Draws::new(7), 5, batch);
        let mut position = from;
        let all = (0..batches).flat_map(|_| sampler.next(&mut position, None).unwrap().items).collect();
        (all, position)
    }

    #[test]
    fn items_do_not_depend_on_the_size_of_batches_nor_on_a_stop_between() {
        let (whole, _) = walk(1, Position::default(), 15);
        assert_eq!(whole.iter().map(|i| i.running).collect::<Vec<_>>(), (0..15).collect::<Vec<_>>());
        assert_eq!(walk(2, Position::default(), 9).0, whole);
        assert_eq!(walk(7, Position::default(), 3).0, whole);
        let (first, position) = walk(2, Position::default(), 4);
        let (rest, _) = walk(3, position, 3);
        assert_eq!([first, rest].concat(), whole);
        for epoch in whole.chunks(5) {
            let mut indices: Vec<_> = epoch.iter().map(|i| i.index).collect();
            indices.sort();
            assert_eq!(indices, [0, 1, 2, 3, 4]);
        }
    }
}

//! Who owns what: arithmetic without tensors. A world of one owns everything and is no special case.

use std::ops::Range;

/// Rank `rank` of `world_size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    pub rank: usize,
    pub world_size: usize,
}

impl Partition {
    pub fn new(rank: usize, world_size: usize) -> Self {
        assert!(rank < world_size, "rank {rank} of {world_size}");
        Partition { rank, world_size }
    }

    /// The owned range of a bucket of `padded_len` elements, which the world size divides.
    pub fn shard(&self, padded_len: usize) -> Range<usize> {
        assert_eq!(padded_len % self.world_size, 0, "a bucket is padded to the world size");
        let len = padded_len / self.world_size;
        self.rank * len..(self.rank + 1) * len
    }

    /// The rank's items of a micro-batch of `items`: even, in order, possibly none.
    pub fn items(&self, items: usize) -> Range<usize> {
        self.rank * items / self.world_size..(self.rank + 1) * items / self.world_size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_and_element_has_one_owner() {
        for world_size in 1..=5 {
            for items in 0..12 {
                let mut next = 0;
                for rank in 0..world_size {
                    let range = Partition::new(rank, world_size).items(items);
                    assert_eq!(range.start, next);
                    next = range.end;
                }
                assert_eq!(next, items);
            }
            let shards: Vec<_> =
                (0..world_size).map(|r| Partition::new(r, world_size).shard(world_size * 256)).collect();
            assert_eq!(shards.last().unwrap().end, world_size * 256);
            assert!(shards.iter().all(|s| s.len() == 256));
        }
    }
}

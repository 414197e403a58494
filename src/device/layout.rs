//! How the tensors of one segment lie in its flat bucket. Pure arithmetic.

use std::collections::HashMap;

/// Tensors and shards begin on multiples of this many elements: the block of blockwise 8-bit optimizers.
pub const BLOCK: usize = 256;
/// Tensors of this many elements and more are block-aligned; smaller ones sit together at the end of the bucket
/// and keep 32-bit state (bitsandbytes' `min_8bit_size`).
pub const LARGE: usize = 4096;

/// A tensor's place in its bucket, in elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub shape: Vec<usize>,
    pub offset: usize,
    pub len: usize,
}

/// The table name -> range of a bucket. Independent of the world size, which only pads the end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BucketLayout {
    /// In the order in which the segment declared them.
    pub entries: Vec<Entry>,
    /// Elements before padding to the world size.
    pub len: usize,
    /// Where the small tensors begin; a multiple of [`BLOCK`].
    pub small_from: usize,
}

impl BucketLayout {
    pub fn new(tensors: Vec<(String, Vec<usize>)>) -> Self {
        let mut entries: Vec<Entry> = tensors
            .into_iter()
            .map(|(name, shape)| Entry { len: shape.iter().product(), name, shape, offset: 0 })
            .collect();
        let mut end = 0;
        for entry in entries.iter_mut().filter(|e| e.len >= LARGE) {
            entry.offset = end;
            end = (end + entry.len).next_multiple_of(BLOCK);
        }
        let small_from = end;
        for entry in entries.iter_mut().filter(|e| e.len < LARGE) {
            entry.offset = end;
            end += entry.len;
        }
        BucketLayout { entries, len: end, small_from }
    }

    /// Elements with padding, so that `world_size` equal shards end on multiples of [`BLOCK`].
    pub fn padded_len(&self, world_size: usize) -> usize {
        self.len.next_multiple_of(BLOCK * world_size)
    }

    /// Number of parameters, without padding between them.
    pub fn parameters(&self) -> usize {
        self.entries.iter().map(|e| e.len).sum()
    }

    pub fn by_name(&self) -> HashMap<&str, &Entry> {
        self.entries.iter().map(|e| (e.name.as_str(), e)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_tensors_are_aligned_and_small_ones_come_last() {
        let layout = BucketLayout::new(vec![
            ("bias".into(), vec![3]),
            ("weight".into(), vec![4097]),
            ("gamma".into(), vec![5]),
            ("other".into(), vec![64, 64]),
        ]);
        let offsets: Vec<_> = layout.entries.iter().map(|e| e.offset).collect();
        assert_eq!(offsets, [8448, 0, 8451, 4352]);
        assert_eq!((layout.small_from, layout.len), (8448, 8456));
        assert_eq!(layout.padded_len(3), 8448 + 768);
        assert_eq!(layout.parameters(), 3 + 4097 + 5 + 4096);
    }
}

//! How the optimizer state of one chunk lies in memory and on disk: one contiguous record, and what of it goes where in
//! a checkpoint. Pure arithmetic; the numbers themselves are made in [`super::adamw`] and [`super::blockwise`].

use std::ops::Range;

use candle_core::DType;

use super::blockwise;
use super::code_book::{Book, ZERO_OF_M};
use crate::device::BLOCK;

/// Every part of a record begins on a multiple of this many bytes.
const ALIGNMENT: usize = 64;

/// In how many bits the moments rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateKind {
    /// Two f32 an element.
    F32,
    /// Two codes of 8 bits an element and two scales a block, as bitsandbytes defines them (see [`super::blockwise`]);
    /// two f32 for each element of the small tensors.
    Bits8,
}

/// What one chunk's record looks like.
///
/// ```text
/// F32     m  v                                                               f32
/// Bits8   codes of m  codes of v  absmax of m  absmax of v  small m  small v  u8 u8 f32 f32 f32 f32
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordLayout {
    kind: StateKind,
    start: usize,
    elements: usize,
    /// Elements whose moments are 8 bits; they come first.
    coded: usize,
}

/// One part of a record, with what a checkpoint needs to put it into a record that is cut otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// `m`, `v` (f32, one an element), `m8`, `v8` (codes, one an element), `m_absmax`, `v_absmax` (f32, one a block).
    pub name: &'static str,
    pub dtype: DType,
    /// Elements of the bucket that one value stands for: 1, or [`BLOCK`] for a block's scale.
    pub elements_per_value: usize,
    /// Elements of the bucket that the part stands for. Begins on a multiple of [`BLOCK`].
    pub elements: Range<usize>,
    /// Where the part lies in the record.
    pub bytes: Range<usize>,
}

impl Part {
    /// Values of the part.
    pub fn len(&self) -> usize {
        self.elements.len().div_ceil(self.elements_per_value)
    }

    pub fn is_empty(&self) -> bool {
        self.elements.is_empty()
    }

    /// The bytes of the record that stand for the elements of `range` (of the bucket), which must lie within the
    /// part's and begin on a multiple of [`BLOCK`] if the values are blocks'.
    pub fn bytes_of(&self, range: Range<usize>) -> Range<usize> {
        assert!(
            self.elements.start <= range.start && range.end <= self.elements.end,
            "elements {range:?} are not part of {:?}",
            self.elements
        );
        let first = range.start - self.elements.start;
        assert!(first.is_multiple_of(self.elements_per_value), "element {} begins no block", range.start);
        let size = self.dtype.size_in_bytes();
        let from = self.bytes.start + first / self.elements_per_value * size;
        from..from + range.len().div_ceil(self.elements_per_value) * size
    }
}

impl RecordLayout {
    /// The record of `elements` elements of a bucket from `start` (a multiple of [`BLOCK`]). The bucket's elements from
    /// `small_from` on belong to small tensors and keep 32 bits.
    pub fn new(kind: StateKind, start: usize, elements: usize, small_from: usize) -> Self {
        assert!(start.is_multiple_of(BLOCK), "a chunk begins at element {start}, inside a block");
        let coded = match kind {
            StateKind::F32 => 0,
            StateKind::Bits8 => small_from.saturating_sub(start).min(elements),
        };
        RecordLayout { kind, start, elements, coded }
    }

    pub fn kind(&self) -> StateKind {
        self.kind
    }

    /// The first element in the bucket.
    pub fn start(&self) -> usize {
        self.start
    }

    pub fn elements(&self) -> usize {
        self.elements
    }

    /// How many elements, from the first, rest in 8 bits.
    pub fn coded(&self) -> usize {
        self.coded
    }

    fn blocks(&self) -> usize {
        self.coded.div_ceil(BLOCK)
    }

    /// Sizes of the six parts in bytes, without what aligns them.
    fn sizes(&self) -> [usize; 6] {
        let plain = 4 * (self.elements - self.coded);
        [self.coded, self.coded, 4 * self.blocks(), 4 * self.blocks(), plain, plain]
    }

    /// The record's size; a multiple of 64.
    pub fn bytes(&self) -> usize {
        self.sizes().iter().map(|size| size.next_multiple_of(ALIGNMENT)).sum()
    }

    /// The parts that are not empty, in the record's order. F32: `m`, `v`. Bits8: `m8`, `v8`, `m_absmax`, `v_absmax` of
    /// the elements before `small_from`, `m` and `v` of those after.
    pub fn parts(&self) -> Vec<Part> {
        const FORMS: [(&str, DType, usize); 6] = [
            ("m8", DType::U8, 1),
            ("v8", DType::U8, 1),
            ("m_absmax", DType::F32, BLOCK),
            ("v_absmax", DType::F32, BLOCK),
            ("m", DType::F32, 1),
            ("v", DType::F32, 1),
        ];
        let border = self.start + self.coded;
        let mut at = 0;
        let mut parts = Vec::new();
        for (i, ((name, dtype, elements_per_value), size)) in FORMS.into_iter().zip(self.sizes()).enumerate() {
            let elements = if i < 4 { self.start..border } else { border..self.start + self.elements };
            parts.push(Part { name, dtype, elements_per_value, elements, bytes: at..at + size });
            at += size.next_multiple_of(ALIGNMENT);
        }
        parts.retain(|part| !part.is_empty());
        parts
    }

    /// Zero moments. Zeroed bytes are the same for the kind F32.
    pub fn initialise(&self, record: &mut [u8]) {
        record.fill(0);
        let parts = self.split_mut(record);
        // The code of 0.0 in the unsigned book is 0.
        parts.m8.fill(ZERO_OF_M);
    }

    /// The moments of all elements as f32, whatever they rest in. `m` and `v` hold one number an element.
    pub fn read_moments_f32(&self, record: &[u8], m: &mut [f32], v: &mut [f32]) {
        assert!(m.len() == self.elements && v.len() == self.elements, "moments of another length");
        let parts = self.split(record);
        let (coded_m, plain_m) = m.split_at_mut(self.coded);
        let (coded_v, plain_v) = v.split_at_mut(self.coded);
        plain_m.copy_from_slice(parts.m);
        plain_v.copy_from_slice(parts.v);
        blockwise::dequantize(Book::Signed, parts.m8, parts.m_absmax, coded_m);
        blockwise::dequantize(Book::Unsigned, parts.v8, parts.v_absmax, coded_v);
    }

    /// Puts moments in, rounded to what they rest in. What 8 bits gave, rounded to 8 bits again, may differ: a block whose
    /// largest magnitude is negative loses a little of it, the signed book having no -1. So states of one kind are copied
    /// by [`RecordLayout::parts`].
    pub fn write_moments_f32(&self, record: &mut [u8], m: &[f32], v: &[f32]) {
        assert!(m.len() == self.elements && v.len() == self.elements, "moments of another length");
        let parts = self.split_mut(record);
        let (coded_m, plain_m) = m.split_at(self.coded);
        let (coded_v, plain_v) = v.split_at(self.coded);
        parts.m.copy_from_slice(plain_m);
        parts.v.copy_from_slice(plain_v);
        blockwise::quantize(Book::Signed, coded_m, parts.m8, parts.m_absmax);
        blockwise::quantize(Book::Unsigned, coded_v, parts.v8, parts.v_absmax);
    }

    /// The record's parts. The record is aligned to 4 bytes or more, as every [`crate::device::Buffer`] is.
    fn split<'a>(&self, record: &'a [u8]) -> Parts<'a> {
        assert_eq!(record.len(), self.bytes(), "a record of another layout");
        let mut rest = record;
        let mut next = |size: usize| {
            let (part, after) = rest.split_at(size.next_multiple_of(ALIGNMENT));
            rest = after;
            &part[..size]
        };
        let [m8, v8, m_absmax, v_absmax, m, v] = self.sizes().map(&mut next);
        let [m_absmax, v_absmax, m, v] = [m_absmax, v_absmax, m, v].map(bytemuck::cast_slice);
        Parts { m8, v8, m_absmax, v_absmax, m, v }
    }

    /// As [`RecordLayout::split`].
    pub(super) fn split_mut<'a>(&self, record: &'a mut [u8]) -> PartsMut<'a> {
        assert_eq!(record.len(), self.bytes(), "a record of another layout");
        let mut rest = record;
        let mut next = |size: usize| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(size.next_multiple_of(ALIGNMENT));
            rest = after;
            &mut part[..size]
        };
        let [m8, v8, m_absmax, v_absmax, m, v] = self.sizes().map(&mut next);
        let [m_absmax, v_absmax, m, v] = [m_absmax, v_absmax, m, v].map(bytemuck::cast_slice_mut);
        PartsMut { m8, v8, m_absmax, v_absmax, m, v }
    }
}

struct Parts<'a> {
    m8: &'a [u8],
    v8: &'a [u8],
    m_absmax: &'a [f32],
    v_absmax: &'a [f32],
    m: &'a [f32],
    v: &'a [f32],
}

pub(super) struct PartsMut<'a> {
    pub m8: &'a mut [u8],
    pub v8: &'a mut [u8],
    pub m_absmax: &'a mut [f32],
    pub v_absmax: &'a mut [f32],
    pub m: &'a mut [f32],
    pub v: &'a mut [f32],
}

#[cfg(test)]
mod tests {
    use super::super::testing::numbers;
    use super::*;

    fn zeroed(layout: &RecordLayout) -> Vec<u64> {
        vec![0; layout.bytes() / 8]
    }

    #[test]
    fn parts_follow_each_other_aligned() {
        let plain = RecordLayout::new(StateKind::F32, 512, 1000, 768);
        assert_eq!(plain.bytes(), 2 * 4032);
        let names = |layout: RecordLayout| layout.parts().iter().map(|p| (p.name, p.len())).collect::<Vec<_>>();
        assert_eq!(names(plain), [("m", 1000), ("v", 1000)]);
        let coded = RecordLayout::new(StateKind::Bits8, 512, 768, 1024);
        assert_eq!(coded.coded(), 512);
        let parts = coded.parts();
        let expected = [
            ("m8", 512..1024, 0..512),
            ("v8", 512..1024, 512..1024),
            ("m_absmax", 512..1024, 1024..1032),
            ("v_absmax", 512..1024, 1088..1096),
            ("m", 1024..1280, 1152..2176),
            ("v", 1024..1280, 2176..3200),
        ];
        for (part, (name, elements, bytes)) in parts.iter().zip(expected) {
            assert_eq!((part.name, &part.elements, &part.bytes), (name, &elements, &bytes));
        }
        assert_eq!((parts.len(), coded.bytes()), (6, 3200));
        assert_eq!(parts[2].bytes_of(768..1024), 1028..1032);
        assert_eq!(parts[4].bytes_of(1025..1027), 1156..1164);
        assert_eq!(names(RecordLayout::new(StateKind::Bits8, 1024, 256, 1024)), [("m", 256), ("v", 256)]);
        assert_eq!(names(RecordLayout::new(StateKind::Bits8, 0, 1 << 20, 1 << 21)).len(), 4);
        assert_eq!(RecordLayout::new(StateKind::Bits8, 0, 0, 0).bytes(), 0);
    }

    #[test]
    fn nothing_is_zero_moments() {
        for kind in [StateKind::F32, StateKind::Bits8] {
            let layout = RecordLayout::new(kind, 0, 1024, 768);
            let mut record = zeroed(&layout);
            layout.initialise(bytemuck::cast_slice_mut(&mut record));
            assert_eq!(kind == StateKind::F32, record.iter().all(|&x| x == 0));
            let (mut m, mut v) = (vec![1.0; 1024], vec![1.0; 1024]);
            layout.read_moments_f32(bytemuck::cast_slice(&record), &mut m, &mut v);
            assert!(m.iter().chain(&v).all(|x| x.to_bits() == 0));
        }
    }

    /// What a checkpoint of two ranks holds is put together to the records of one, part by part.
    #[test]
    fn parts_of_other_cuts_fit_together() {
        let (m, v) = (numbers(2048, 1, 1.0), numbers(2048, 2, 1.0).iter().map(|x| x.abs()).collect::<Vec<_>>());
        for kind in [StateKind::F32, StateKind::Bits8] {
            let record_of = |start: usize, end: usize| {
                let layout = RecordLayout::new(kind, start, end - start, 1536);
                let mut record = zeroed(&layout);
                layout.write_moments_f32(bytemuck::cast_slice_mut(&mut record), &m[start..end], &v[start..end]);
                (layout, record)
            };
            let (whole, expected) = record_of(0, 2048);
            let mut found = zeroed(&whole);
            let to: &mut [u8] = bytemuck::cast_slice_mut(&mut found);
            for (layout, record) in [record_of(0, 768), record_of(768, 2048)] {
                let from: &[u8] = bytemuck::cast_slice(&record);
                for part in layout.parts() {
                    let target = whole.parts().into_iter().find(|target| target.name == part.name).unwrap();
                    let elements = part.elements.clone();
                    to[target.bytes_of(elements.clone())].copy_from_slice(&from[part.bytes_of(elements)]);
                }
            }
            assert!(found == expected, "{kind:?}");
        }
    }
}

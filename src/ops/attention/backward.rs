//! Backward: probabilities again from the scores and the saved denominators, a block of queries against a block of
//! keys at a time.
//!
//! With P the probabilities, dP = dy v^T and D the row sums of dy * y: dS = P * (dP - D), dq = dS k / sqrt(D),
//! dk = dS^T q / sqrt(D), dv = P^T dy.

use super::lanes::LANES;
use super::softmax::{hide_later, probabilities_and_slopes};
use super::tile::{Rows, Size, Strided, multiply};
use super::{KEY_BLOCK, Plan, QUERY_BLOCK, by_head, gather, head_rows, into_blocks, scatter};
use crate::device::{note_flops, touch_scratch};
use crate::ops::cpu::for_parts;
use crate::ops::transpose::transpose;
use crate::ops::vector::{Real, simd, sums, unwritten};

pub(super) struct Given<'a, T> {
    pub plan: &'a Plan,
    pub q: &'a [T],
    pub k: &'a [T],
    pub v: &'a [T],
    pub y: &'a [T],
    pub dy: &'a [T],
    pub log_sums: &'a [f32],
}

/// Pieces that a backward should have at least, so that threads find work when there are few heads.
const PIECES: usize = 8;
/// Bytes that the pieces' gradients of keys and values may take together.
const PIECES_BYTES: usize = 64 << 20;

impl<T: Real> Given<'_, T> {
    /// dq, dk, dv.
    pub fn backward(&self) -> [Vec<T>; 3] {
        let plan = self.plan;
        let mut dq = unwritten::<T>(self.q.len());
        let (mut dk, mut dv) = (unwritten::<T>(self.k.len()), unwritten::<T>(self.v.len()));
        let (pieces, size) = self.cut();
        let queries = into_blocks(by_head(plan, &mut dq, plan.queries), size);
        let keys = by_head(plan, &mut dk, plan.keys).into_iter().zip(by_head(plan, &mut dv, plan.keys));
        note_flops(10.0 * plan.cost() as f64);
        let scratch = Group::bytes(plan, size.min(plan.queries));
        if pieces == 1 && plan.queries > 0 {
            touch_scratch(queries.len(), 3 * plan.cost(), scratch + KeyGradients::bytes(plan));
            for_parts(queries.into_iter().zip(keys).collect(), 3 * plan.cost(), |head, (dq, (dk, dv))| {
                let mut sums = KeyGradients::new(plan);
                self.piece(head, 0, dq, &mut sums);
                sums.write(plan, dk, dv);
            });
            return [dq, dk, dv];
        }
        let mut sums: Vec<_> = (0..plan.batch * plan.heads * pieces).map(|_| KeyGradients::new(plan)).collect();
        touch_scratch(queries.len(), 3 * plan.cost(), scratch);
        for_parts(queries.into_iter().zip(&mut sums).collect(), 3 * plan.cost(), |i, (dq, sums)| {
            self.piece(i / pieces, i % pieces * size, dq, sums);
        });
        let parts: Vec<_> = keys.zip(sums.chunks_mut(pieces)).collect();
        for_parts(parts, pieces * (self.k.len() + self.v.len()), |_, ((dk, dv), sums)| {
            if let Some((sum, rest)) = sums.split_first_mut() {
                rest.iter().for_each(|other| sum.add(other));
                sum.write(plan, dk, dv);
            }
        });
        [dq, dk, dv]
    }

    /// Pieces of each head's queries, and queries in a piece; by shape alone.
    fn cut(&self) -> (usize, usize) {
        let plan = self.plan;
        let heads = (plan.batch * plan.heads).max(1);
        let bytes = 8 * heads * plan.keys * plan.head_width.next_multiple_of(LANES);
        let wanted = PIECES.div_ceil(heads).min((PIECES_BYTES / bytes.max(1)).max(1));
        let blocks = plan.queries.div_ceil(QUERY_BLOCK).max(1);
        let size = blocks.div_ceil(wanted) * QUERY_BLOCK;
        (plan.queries.div_ceil(size).max(1), size)
    }

    /// The queries from `first` on (as many as `dq` has rows) of one head.
    fn piece(&self, head: usize, first: usize, dq: Vec<&mut [T]>, sums: &mut KeyGradients) {
        let plan = self.plan;
        let (row, column) = (head / plan.heads, head % plan.heads);
        let mut group = Group::new(plan, dq.len());
        let mut dq = dq.into_iter();
        let mut from = first;
        while dq.len() > 0 {
            let count = dq.len().min(group.blocks.len() * QUERY_BLOCK);
            let at = plan.start(row, column, plan.queries) + from * plan.stride();
            let log_sums = &self.log_sums[head * plan.queries + from..][..count];
            let blocks = &mut group.blocks[..count.div_ceil(QUERY_BLOCK)];
            for (i, (block, log_sums)) in blocks.iter_mut().zip(log_sums.chunks(QUERY_BLOCK)).enumerate() {
                let at = at + i * QUERY_BLOCK * plan.stride();
                block.start(plan, from + i * QUERY_BLOCK, [&self.q[at..], &self.y[at..], &self.dy[at..]], log_sums);
            }
            let visible = plan.visible(row, from, count);
            let at = plan.start(row, column, plan.keys);
            for key in (0..visible).step_by(KEY_BLOCK) {
                let keys = KEY_BLOCK.min(visible - key);
                let at = at + key * plan.stride();
                let k = head_rows(plan, &self.k[at..], keys, &mut group.k);
                let v = head_rows(plan, &self.v[at..], keys, &mut group.v);
                for block in blocks.iter_mut() {
                    let keys = keys.min(plan.visible(row, block.first, block.count).saturating_sub(key));
                    if keys > 0 {
                        block.against(plan, key, keys, [k, v], &mut group.scores, sums);
                    }
                }
            }
            for block in blocks.iter_mut() {
                block.finish(plan);
                scatter(&block.q, block.padded, dq.by_ref().take(block.count));
            }
            from += count;
        }
    }
}

/// Gradients of one head's keys and values by some of its queries, (T, D) with rows of whole vectors.
struct KeyGradients {
    /// Without the factor 1/sqrt(D).
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl KeyGradients {
    fn new(plan: &Plan) -> Self {
        let len = plan.keys * plan.head_width.next_multiple_of(LANES);
        KeyGradients { dk: vec![0.0; len], dv: vec![0.0; len] }
    }

    fn bytes(plan: &Plan) -> usize {
        8 * plan.keys * plan.head_width.next_multiple_of(LANES)
    }

    fn add(&mut self, other: &KeyGradients) {
        simd(
            #[inline(always)]
            || {
                self.dk.iter_mut().zip(&other.dk).for_each(|(a, b)| *a += b);
                self.dv.iter_mut().zip(&other.dv).for_each(|(a, b)| *a += b);
            },
        );
    }

    fn write<T: Real>(&mut self, plan: &Plan, dk: Vec<&mut [T]>, dv: Vec<&mut [T]>) {
        let factor = 1.0 / (plan.head_width as f32).sqrt();
        self.dk.iter_mut().for_each(|x| *x *= factor);
        let padded = plan.head_width.next_multiple_of(LANES);
        scatter(&self.dk, padded, dk.into_iter());
        scatter(&self.dv, padded, dv.into_iter());
    }
}

/// Blocks of queries of one head, and what they share.
struct Group {
    blocks: Vec<Block>,
    /// (keys, queries): probabilities, and their gradients.
    scores: [Vec<f32>; 2],
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Group {
    fn new(plan: &Plan, queries: usize) -> Self {
        let count = plan.group(5).min(queries.div_ceil(QUERY_BLOCK));
        let (scores, rows) = (vec![0f32; KEY_BLOCK * QUERY_BLOCK], vec![0f32; KEY_BLOCK * plan.head_width]);
        let blocks = (0..count).map(|_| Block::new(plan.head_width)).collect();
        Group { blocks, scores: [scores.clone(), scores], k: rows.clone(), v: rows }
    }

    /// What [`Self::new`] takes.
    fn bytes(plan: &Plan, queries: usize) -> usize {
        let (d, padded) = (plan.head_width, plan.head_width.next_multiple_of(LANES));
        let blocks = plan.group(5).min(queries.div_ceil(QUERY_BLOCK));
        4 * (blocks * (2 * padded + 3 * d + 2) * QUERY_BLOCK + 2 * KEY_BLOCK * (QUERY_BLOCK + d))
    }
}

/// A block of queries.
struct Block {
    first: usize,
    count: usize,
    /// `count` rounded up to whole vectors.
    width: usize,
    /// D rounded up to whole vectors.
    padded: usize,
    /// (queries, padded): the queries, in the end their gradients.
    q: Vec<f32>,
    dy: Vec<f32>,
    /// (D, queries).
    q_columns: Vec<f32>,
    dy_columns: Vec<f32>,
    dq_columns: Vec<f32>,
    /// Row sums of dy * y.
    delta: Vec<f32>,
    log_sums: Vec<f32>,
}

impl Block {
    fn new(d: usize) -> Self {
        let padded = d.next_multiple_of(LANES);
        let zeros = |len: usize| vec![0f32; len];
        Block {
            first: 0,
            count: 0,
            width: 0,
            padded,
            q: zeros(QUERY_BLOCK * padded),
            dy: zeros(QUERY_BLOCK * padded),
            q_columns: zeros(d * QUERY_BLOCK),
            dy_columns: zeros(d * QUERY_BLOCK),
            dq_columns: zeros(d * QUERY_BLOCK),
            delta: zeros(QUERY_BLOCK),
            log_sums: zeros(QUERY_BLOCK),
        }
    }

    /// Takes in queries from `first` on, as many as `log_sums`.
    fn start<T: Real>(&mut self, plan: &Plan, first: usize, [q, y, dy]: [&[T]; 3], log_sums: &[f32]) {
        let (d, count) = (plan.head_width, log_sums.len());
        (self.first, self.count, self.width) = (first, count, count.next_multiple_of(LANES));
        self.dq_columns.fill(0.0);
        if count < self.width {
            // Lanes beyond the queries: nothing flows through them, as their probabilities are 2^-inf.
            for columns in [&mut self.q_columns, &mut self.dy_columns, &mut self.delta] {
                columns.fill(0.0);
            }
            self.log_sums.fill(f32::INFINITY);
        }
        self.log_sums[..count].copy_from_slice(log_sums);
        gather(plan, y, count, &mut self.q, self.padded);
        gather(plan, dy, count, &mut self.dy, self.padded);
        simd(
            #[inline(always)]
            || {
                let rows = self.q.chunks_exact(self.padded).zip(self.dy.chunks_exact(self.padded));
                for (delta, (y, dy)) in self.delta.iter_mut().zip(rows).take(count) {
                    *delta = sums(
                        [&y[..d], &dy[..d]],
                        #[inline(always)]
                        |[y, dy]| [y * dy],
                    )[0] as f32;
                }
            },
        );
        gather(plan, q, count, &mut self.q, self.padded);
        transpose(&self.q, self.padded, (count, d), &mut self.q_columns, self.width);
        self.q_columns.iter_mut().for_each(|x| *x *= plan.scale());
        transpose(&self.dy, self.padded, (count, d), &mut self.dy_columns, self.width);
    }

    /// Adds what flows between these queries and `keys` keys from `key` on.
    fn against(
        &mut self,
        plan: &Plan,
        key: usize,
        keys: usize,
        [k, v]: [Rows; 2],
        [probabilities, slopes]: &mut [Vec<f32>; 2],
        sums: &mut KeyGradients,
    ) {
        let (d, width, padded) = (plan.head_width, self.width, self.padded);
        let scores = Size { rows: keys, width, depth: d };
        let (probabilities, slopes) = (&mut probabilities[..keys * width], &mut slopes[..keys * width]);
        let q_columns = Rows { data: &self.q_columns, stride: width };
        multiply(scores, k.by_row(), q_columns, probabilities, width, false);
        if plan.causal {
            hide_later(probabilities, width, key, self.first);
        }
        let dy_columns = Rows { data: &self.dy_columns, stride: width };
        multiply(scores, v.by_row(), dy_columns, slopes, width, false);
        probabilities_and_slopes(probabilities, &self.log_sums[..width], slopes, &self.delta[..width]);

        let slope_rows = Rows { data: slopes, stride: width };
        multiply(Size { rows: d, width, depth: keys }, k.by_column(), slope_rows, &mut self.dq_columns, width, true);
        let to_keys = Size { rows: keys, width: padded, depth: self.count };
        let by_query = |data| Strided { data, row_stride: width, k_stride: 1 };
        let (q, dy) = (Rows { data: &self.q, stride: padded }, Rows { data: &self.dy, stride: padded });
        multiply(to_keys, by_query(slopes), q, &mut sums.dk[key * padded..], padded, true);
        multiply(to_keys, by_query(probabilities), dy, &mut sums.dv[key * padded..], padded, true);
    }

    /// Leaves the queries' gradients in `q`.
    fn finish(&mut self, plan: &Plan) {
        let (d, factor) = (plan.head_width, 1.0 / (plan.head_width as f32).sqrt());
        self.dq_columns.iter_mut().for_each(|x| *x *= factor);
        transpose(&self.dq_columns, self.width, (d, self.count), &mut self.q, self.padded);
    }
}

//! Backward: probabilities again from the scores and the saved denominators, a block of queries against a block of
//! keys at a time.
//!
//! With P the probabilities, dP = dy v^T and D the row sums of dy * y: dS = P * (dP - D), dq = dS k / sqrt(D),
//! dk = dS^T q / sqrt(D), dv = P^T dy.

use super::softmax::{exp2_block, hide_later};
use super::tile::{LANES, Rows, Size, Strided, multiply};
use super::{KEY_BLOCK, Plan, QUERY_BLOCK, by_head, gather, transpose};
use crate::ops::cpu::for_parts;
use crate::ops::vector::{Real, sum_of, unwritten};

pub(super) struct Given<'a, T> {
    pub plan: &'a Plan,
    pub q: &'a [T],
    pub k: &'a [T],
    pub v: &'a [T],
    pub y: &'a [T],
    pub dy: &'a [T],
    pub log_sums: &'a [f32],
}

/// Gradients of one head's keys and values by some of its queries, in f32, rows of whole vectors.
struct KeyGradients {
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// Pieces that a backward should have at least, so that threads find work when there are few heads.
const PIECES: usize = 16;
/// Bytes that the pieces' gradients of keys and values may take.
const PIECES_BYTES: usize = 64 << 20;

impl<T: Real> Given<'_, T> {
    /// dq, dk, dv.
    pub fn backward(&self) -> [Vec<T>; 3] {
        let plan = self.plan;
        let (mut dq, mut dk) = (unwritten::<T>(self.q.len()), unwritten::<T>(self.k.len()));
        let mut dv = unwritten::<T>(self.v.len());
        let (pieces, size) = self.cut();
        let padded = plan.head_width.next_multiple_of(LANES);
        let heads = plan.batch * plan.heads;
        let mut sums: Vec<KeyGradients> = (0..heads * pieces)
            .map(|_| KeyGradients { dk: vec![0.0; plan.keys * padded], dv: vec![0.0; plan.keys * padded] })
            .collect();
        let blocks = super::into_blocks(by_head(plan, &mut dq, plan.queries), size);
        for_parts(blocks.into_iter().zip(&mut sums).collect(), 3 * plan.cost(), |i, (dq, sums)| {
            self.piece(i / pieces, i % pieces * size, dq, sums);
        });
        let rows = by_head(plan, &mut dk, plan.keys).into_iter().zip(by_head(plan, &mut dv, plan.keys));
        let parts: Vec<_> = rows.zip(sums.chunks(pieces)).collect();
        for_parts(parts, pieces * (self.k.len() + self.v.len()), |_, ((dk, dv), sums)| {
            let factor = 1.0 / (plan.head_width as f32).sqrt();
            for (key, (dk, dv)) in dk.into_iter().zip(dv).enumerate() {
                for (c, (dk, dv)) in dk.iter_mut().zip(dv).enumerate() {
                    let at = key * padded + c;
                    *dk = T::from_f32(sums.iter().map(|s| s.dk[at]).sum::<f32>() * factor);
                    *dv = T::from_f32(sums.iter().map(|s| s.dv[at]).sum::<f32>());
                }
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
        let mut dq = dq.into_iter();
        let mut block = Block::new(plan.head_width);
        let mut from = first;
        while dq.len() > 0 {
            let count = QUERY_BLOCK.min(dq.len());
            let at = plan.start(row, column, plan.queries) + from * plan.stride();
            let log_sums = &self.log_sums[head * plan.queries + from..][..count];
            block.load(self, at, log_sums);
            let visible = plan.visible(row, from, count);
            let at = plan.start(row, column, plan.keys);
            for key in (0..visible).step_by(KEY_BLOCK) {
                let keys = KEY_BLOCK.min(visible - key);
                let at = at + key * plan.stride();
                block.against(plan, (from, key, keys), &self.k[at..], &self.v[at..], sums);
            }
            block.store(&mut dq, count);
            from += count;
        }
    }
}

/// A block of queries, and scratch for its scores against a block of keys.
struct Block {
    d: usize,
    /// d rounded up to whole vectors.
    padded: usize,
    count: usize,
    width: usize,
    q: Vec<f32>,
    dy: Vec<f32>,
    q_columns: Vec<f32>,
    dy_columns: Vec<f32>,
    /// Row sums of dy * y.
    delta: Vec<f32>,
    log_sums: Vec<f32>,
    dq_columns: Vec<f32>,
    probabilities: Vec<f32>,
    slopes: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Block {
    fn new(d: usize) -> Self {
        let padded = d.next_multiple_of(LANES);
        let (rows, columns) = (vec![0f32; QUERY_BLOCK * padded], vec![0f32; d * QUERY_BLOCK]);
        let (scores, keys) = (vec![0f32; KEY_BLOCK * QUERY_BLOCK], vec![0f32; KEY_BLOCK * d]);
        Block {
            d,
            padded,
            count: 0,
            width: 0,
            q: rows.clone(),
            dy: rows,
            q_columns: columns.clone(),
            dy_columns: columns.clone(),
            delta: vec![0.0; QUERY_BLOCK],
            log_sums: vec![0.0; QUERY_BLOCK],
            dq_columns: columns,
            probabilities: scores.clone(),
            slopes: scores,
            k: keys.clone(),
            v: keys,
        }
    }

    /// Takes in the queries that begin at element `at`; there are as many as `log_sums`.
    fn load<T: Real>(&mut self, given: &Given<T>, at: usize, log_sums: &[f32]) {
        let (plan, d) = (given.plan, self.d);
        self.count = log_sums.len();
        self.width = self.count.next_multiple_of(LANES);
        gather(&given.q[at..], plan.stride(), self.count, d, 1.0, &mut self.q, self.padded);
        gather(&given.dy[at..], plan.stride(), self.count, d, 1.0, &mut self.dy, self.padded);
        // Lanes beyond the queries: nothing flows through them, as their probabilities are 2^-inf.
        self.q_columns.fill(0.0);
        self.dy_columns.fill(0.0);
        self.dq_columns.fill(0.0);
        self.delta.fill(0.0);
        self.log_sums.fill(f32::INFINITY);
        transpose(&self.q, self.padded, self.count, d, &mut self.q_columns, self.width);
        self.q_columns.iter_mut().for_each(|x| *x *= plan.scale());
        transpose(&self.dy, self.padded, self.count, d, &mut self.dy_columns, self.width);
        self.log_sums[..self.count].copy_from_slice(log_sums);
        for i in 0..self.count {
            let (y, dy) = (&given.y[at + i * plan.stride()..][..d], &self.dy[i * self.padded..][..d]);
            self.delta[i] = sum_of(d, |c| y[c].to_f32() * dy[c]) as f32;
        }
    }

    /// Adds what flows between these queries and `keys` keys from `key` on.
    fn against<T: Real>(
        &mut self,
        plan: &Plan,
        (first, key, keys): (usize, usize, usize),
        k: &[T],
        v: &[T],
        sums: &mut KeyGradients,
    ) {
        let (d, width, padded) = (self.d, self.width, self.padded);
        gather(k, plan.stride(), keys, d, 1.0, &mut self.k, d);
        gather(v, plan.stride(), keys, d, 1.0, &mut self.v, d);
        let scores = Size { rows: keys, width, depth: d };
        let probabilities = &mut self.probabilities[..keys * width];
        let slopes = &mut self.slopes[..keys * width];
        let by_key = Strided { data: &self.k, row_stride: d, k_stride: 1 };
        multiply(scores, by_key, Rows { data: &self.q_columns, stride: width }, probabilities, width, false);
        if plan.causal {
            hide_later(probabilities, width, key, first);
        }
        let by_value = Strided { data: &self.v, row_stride: d, k_stride: 1 };
        multiply(scores, by_value, Rows { data: &self.dy_columns, stride: width }, slopes, width, false);
        exp2_block(probabilities, &self.log_sums[..width], slopes, &self.delta[..width]);

        let by_feature = Strided { data: &self.k, row_stride: 1, k_stride: d };
        let slope_rows = Rows { data: slopes, stride: width };
        multiply(Size { rows: d, width, depth: keys }, by_feature, slope_rows, &mut self.dq_columns, width, true);
        let to_keys = Size { rows: keys, width: padded, depth: self.count };
        let (dk, dv) = (&mut sums.dk[key * padded..], &mut sums.dv[key * padded..]);
        let by_query = Strided { data: slopes, row_stride: width, k_stride: 1 };
        multiply(to_keys, by_query, Rows { data: &self.q, stride: padded }, dk, padded, true);
        let by_query = Strided { data: probabilities, row_stride: width, k_stride: 1 };
        multiply(to_keys, by_query, Rows { data: &self.dy, stride: padded }, dv, padded, true);
    }

    /// Hands out the queries' gradients.
    fn store<'a, T: Real>(&self, dq: &mut impl Iterator<Item = &'a mut [T]>, count: usize) {
        let factor = 1.0 / (self.d as f32).sqrt();
        for (i, dq) in dq.take(count).enumerate() {
            let column = self.dq_columns[i..].iter().step_by(self.width);
            dq.iter_mut().zip(column).for_each(|(dq, s)| *dq = T::from_f32(s * factor));
        }
    }
}

//! Forward: each block of queries of each head by itself.

use super::lanes::LANES;
use super::softmax::{Running, hide_later};
use super::tile::{Rows, Size, multiply};
use super::{KEY_BLOCK, Plan, QUERY_BLOCK, by_head, gather, head_rows, into_blocks, scatter};
use crate::device::{note_flops, touch_scratch};
use crate::ops::cpu::for_parts;
use crate::ops::transpose::transpose;
use crate::ops::vector::{Real, unwritten};

/// The result (B, S, heads*D), and log2 of the softmax's denominators (B, heads, S).
pub(super) fn forward<T: Real>(plan: &Plan, q: &[T], k: &[T], v: &[T]) -> (Vec<T>, Vec<f32>) {
    let mut y = unwritten::<T>(q.len());
    let mut log_sums = vec![0f32; plan.batch * plan.heads * plan.queries];
    if q.is_empty() {
        return (y, log_sums);
    }
    let size = part_size(plan);
    note_flops(4.0 * plan.cost() as f64);
    let parts = into_blocks(by_head(plan, &mut y, plan.queries), size);
    let sums = log_sums.chunks_mut(plan.queries).flat_map(|head| head.chunks_mut(size));
    let per_head = plan.queries.div_ceil(size);
    touch_scratch(parts.len(), plan.cost(), Group::bytes(plan));
    for_parts(parts.into_iter().zip(sums).collect(), plan.cost(), |i, (y, log_sums)| {
        let (head, part) = (i / per_head, i % per_head);
        let (row, head) = (head / plan.heads, head % plan.heads);
        let mut group = Group::new(plan, row);
        let mut y = y.into_iter();
        let at = plan.start(row, head, plan.keys);
        // Without keys there is no memory at `at`.
        let (k, v) = (k.get(at..).unwrap_or(&[]), v.get(at..).unwrap_or(&[]));
        let mut first = part * size;
        for log_sums in log_sums.chunks_mut(group.blocks.len() * QUERY_BLOCK) {
            let q = &q[plan.start(row, head, plan.queries) + first * plan.stride()..];
            group.attend(first, log_sums, q, k, v, &mut y);
            first += log_sums.len();
        }
    });
    (y, log_sums)
}

/// Queries of a part: a group of blocks, or as many groups as are worth the set-up.
fn part_size(plan: &Plan) -> usize {
    const PART: usize = 1 << 23;
    let group = plan.group(2) * QUERY_BLOCK;
    group * (PART / (group * plan.keys.max(1) * plan.head_width)).max(1)
}

/// Blocks of queries of one head, and what they share.
struct Group<'a> {
    plan: &'a Plan,
    /// Of the batch.
    row: usize,
    blocks: Vec<Block>,
    /// (keys, queries).
    scores: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// (queries, D).
    rows: Vec<f32>,
}

impl<'a> Group<'a> {
    fn new(plan: &'a Plan, row: usize) -> Self {
        let d = plan.head_width;
        let zeros = |len: usize| vec![0f32; len];
        let count = plan.group(2).min(plan.queries.div_ceil(QUERY_BLOCK));
        Group {
            plan,
            row,
            blocks: (0..count).map(|_| Block::new(d)).collect(),
            scores: zeros(KEY_BLOCK * QUERY_BLOCK),
            k: zeros(KEY_BLOCK * d),
            v: zeros(KEY_BLOCK * d),
            rows: zeros(QUERY_BLOCK * d),
        }
    }

    /// What a group takes, about.
    fn bytes(plan: &Plan) -> usize {
        let d = plan.head_width;
        let blocks = plan.group(2).min(plan.queries.div_ceil(QUERY_BLOCK));
        4 * (blocks * (2 * d + 3) * QUERY_BLOCK + KEY_BLOCK * (QUERY_BLOCK + 2 * d) + QUERY_BLOCK * d)
    }

    /// The queries from `first` on, as many as `log_sums`, which are set; their results go to the next rows of `y`.
    fn attend<'y, T: Real>(
        &mut self,
        first: usize,
        log_sums: &mut [f32],
        q: &[T],
        k: &[T],
        v: &[T],
        y: &mut impl Iterator<Item = &'y mut [T]>,
    ) {
        let (plan, d, row) = (self.plan, self.plan.head_width, self.row);
        let blocks = &mut self.blocks[..log_sums.len().div_ceil(QUERY_BLOCK)];
        for (i, (block, log_sums)) in blocks.iter_mut().zip(log_sums.chunks(QUERY_BLOCK)).enumerate() {
            gather(plan, &q[i * QUERY_BLOCK * plan.stride()..], log_sums.len(), &mut self.rows, d);
            block.start(plan, first + i * QUERY_BLOCK, log_sums.len(), &self.rows);
        }
        let visible = plan.visible(row, first, log_sums.len());
        for key in (0..visible).step_by(KEY_BLOCK) {
            let keys = KEY_BLOCK.min(visible - key);
            let k_rows = head_rows(plan, &k[key * plan.stride()..], keys, &mut self.k);
            let v_rows = head_rows(plan, &v[key * plan.stride()..], keys, &mut self.v);
            for block in blocks.iter_mut() {
                let keys = keys.min(plan.visible(row, block.first, block.count).saturating_sub(key));
                if keys > 0 {
                    block.against(plan, key, keys, k_rows, v_rows, &mut self.scores);
                }
            }
        }
        for (block, log_sums) in blocks.iter_mut().zip(log_sums.chunks_mut(QUERY_BLOCK)) {
            block.finish(d, visible > 0, log_sums, &mut self.rows);
            scatter(&self.rows, d, y.take(log_sums.len()));
        }
    }
}

/// A block of queries.
struct Block {
    first: usize,
    count: usize,
    /// `count` rounded up to whole vectors; lanes beyond the queries are zero.
    width: usize,
    /// (D, queries), times the scores' factor.
    q_columns: Vec<f32>,
    /// (D, queries): values by their weights.
    sums: Vec<f32>,
    running: Running,
}

impl Block {
    fn new(d: usize) -> Self {
        let columns = vec![0f32; d * QUERY_BLOCK];
        Block { first: 0, count: 0, width: 0, q_columns: columns.clone(), sums: columns, running: Running::new() }
    }

    /// Takes in the queries from `first` on, rows of D.
    fn start(&mut self, plan: &Plan, first: usize, count: usize, rows: &[f32]) {
        (self.first, self.count, self.width) = (first, count, count.next_multiple_of(LANES));
        if count < self.width {
            self.q_columns.fill(0.0);
        }
        transpose(rows, plan.head_width, (count, plan.head_width), &mut self.q_columns, self.width);
        self.q_columns.iter_mut().for_each(|x| *x *= plan.scale());
        self.running.start(self.width);
    }

    /// Adds what comes from `keys` keys, from `key` on.
    fn against(&mut self, plan: &Plan, key: usize, keys: usize, k: Rows, v: Rows, scores: &mut [f32]) {
        let (d, width) = (plan.head_width, self.width);
        let scores = &mut scores[..keys * width];
        let columns = Rows { data: &self.q_columns, stride: width };
        multiply(Size { rows: keys, width, depth: d }, k.by_row(), columns, scores, width, false);
        if plan.causal {
            hide_later(scores, width, key, self.first);
        }
        if self.running.block(scores) && key > 0 {
            scale_columns(&mut self.sums[..d * width], &self.running.correction);
        }
        let weights = Rows { data: scores, stride: width };
        multiply(Size { rows: d, width, depth: keys }, v.by_column(), weights, &mut self.sums, width, key > 0);
    }

    /// Leaves the result in rows of D, and log2 of the denominators; zeros if there were no keys.
    fn finish(&mut self, d: usize, any: bool, log_sums: &mut [f32], rows: &mut [f32]) {
        let Running { max, sum, .. } = &mut self.running;
        for (log_sum, (max, sum)) in log_sums.iter_mut().zip(max.iter().zip(sum.iter())) {
            *log_sum = max + sum.log2();
        }
        if !any {
            return rows.fill(0.0);
        }
        sum.iter_mut().for_each(|sum| *sum = 1.0 / *sum);
        scale_columns(&mut self.sums[..d * self.width], sum);
        transpose(&self.sums, self.width, (d, self.count), rows, d);
    }
}

/// Multiplies each row, lane by lane.
fn scale_columns(rows: &mut [f32], factors: &[f32]) {
    for row in rows.chunks_exact_mut(factors.len()) {
        row.iter_mut().zip(factors).for_each(|(x, f)| *x *= f);
    }
}

//! Forward: each block of queries of each head by itself.

use super::softmax::{Running, hide_later};
use super::tile::{LANES, Rows, Size, Strided, multiply};
use super::{KEY_BLOCK, Plan, QUERY_BLOCK, by_head, gather, into_blocks, transpose};
use crate::ops::cpu::for_parts;
use crate::ops::vector::{Real, unwritten};

/// The result (B, S, heads*D), and log2 of the softmax's denominators (B, heads, S).
pub(super) fn forward<T: Real>(plan: &Plan, q: &[T], k: &[T], v: &[T]) -> (Vec<T>, Vec<f32>) {
    let mut y = unwritten::<T>(q.len());
    let mut log_sums = vec![0f32; plan.batch * plan.heads * plan.queries];
    if q.is_empty() {
        return (y, log_sums);
    }
    let blocks = into_blocks(by_head(plan, &mut y, plan.queries), QUERY_BLOCK);
    let sums = log_sums.chunks_mut(plan.queries).flat_map(|head| head.chunks_mut(QUERY_BLOCK));
    let per_head = plan.queries.div_ceil(QUERY_BLOCK);
    for_parts(blocks.into_iter().zip(sums).collect(), plan.cost(), |i, (y, log_sums)| {
        let (head, block) = (i / per_head, i % per_head);
        let (row, head) = (head / plan.heads, head % plan.heads);
        let first = block * QUERY_BLOCK;
        let q = &q[plan.start(row, head, plan.queries) + first * plan.stride()..];
        let start = plan.start(row, head, plan.keys);
        let visible = plan.visible(row, first, y.len());
        // Without keys there may be no memory at `start`.
        let (k, v) = if visible == 0 { (&k[..0], &v[..0]) } else { (&k[start..], &v[start..]) };
        query_block(plan, first, visible, q, k, v, y, log_sums);
    });
    (y, log_sums)
}

/// One block of queries from `first` on, of one head, over its `visible` keys.
#[allow(clippy::too_many_arguments)]
fn query_block<T: Real>(
    plan: &Plan,
    first: usize,
    visible: usize,
    q: &[T],
    k: &[T],
    v: &[T],
    y: Vec<&mut [T]>,
    log_sums: &mut [f32],
) {
    let (count, d) = (y.len(), plan.head_width);
    let width = count.next_multiple_of(LANES);
    let mut rows = vec![0f32; count * d];
    gather(q, plan.stride(), count, d, plan.scale(), &mut rows, d);
    let mut q_columns = vec![0f32; d * width];
    transpose(&rows, d, count, d, &mut q_columns, width);
    let mut running = Running::new(width);
    let mut sums = vec![0f32; d * width];
    let mut scores = vec![0f32; KEY_BLOCK * width];
    let (mut k_rows, mut v_rows) = (vec![0f32; KEY_BLOCK * d], vec![0f32; KEY_BLOCK * d]);
    for key in (0..visible).step_by(KEY_BLOCK) {
        let keys = KEY_BLOCK.min(visible - key);
        let scores = &mut scores[..keys * width];
        gather(&k[key * plan.stride()..], plan.stride(), keys, d, 1.0, &mut k_rows, d);
        gather(&v[key * plan.stride()..], plan.stride(), keys, d, 1.0, &mut v_rows, d);
        let by_key = Strided { data: &k_rows, row_stride: d, k_stride: 1 };
        let columns = Rows { data: &q_columns, stride: width };
        multiply(Size { rows: keys, width, depth: d }, by_key, columns, scores, width, false);
        if plan.causal {
            hide_later(scores, width, key, first);
        }
        if running.block(scores) && key > 0 {
            for row in sums.chunks_exact_mut(width) {
                row.iter_mut().zip(&running.correction).for_each(|(sum, c)| *sum *= c);
            }
        }
        let by_feature = Strided { data: &v_rows, row_stride: 1, k_stride: d };
        let weights = Rows { data: scores, stride: width };
        multiply(Size { rows: d, width, depth: keys }, by_feature, weights, &mut sums, width, true);
    }
    for (i, (y, log_sum)) in y.into_iter().zip(log_sums).enumerate() {
        let sum = running.sum[i];
        let factor = if visible == 0 { 0.0 } else { 1.0 / sum };
        *log_sum = running.max[i] + sum.log2();
        y.iter_mut().zip(sums[i..].iter().step_by(width)).for_each(|(y, s)| *y = T::from_f32(s * factor));
    }
}

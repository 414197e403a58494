//! The rank's compute threads. Work is cut by shape alone, never by the number of threads, so results do not depend
//! on it.

use rayon::prelude::*;

/// Sets this process's share of the cores; to be called once, before any op runs. Later calls change nothing.
pub fn set_threads(threads: usize) {
    // An error means the pool exists already, which is what "later calls change nothing" says.
    let _ = rayon::ThreadPoolBuilder::new()
        .num_threads(threads.max(1))
        .thread_name(|i| format!("compute-{i}"))
        .build_global();
}

pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Runs `work(0..tasks)`, on all threads if there are several of both and the whole is worth the hand-over
/// (`cost`: a rough count of elementary operations).
pub fn parallel_for(tasks: usize, cost: usize, work: impl Fn(usize) + Sync + Send) {
    const WORTH_IT: usize = 1 << 15;
    if tasks <= 1 || cost < WORTH_IT || threads() == 1 {
        (0..tasks).for_each(work);
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each(work);
    }
}

/// Zeroes a large slice on all threads.
pub fn fill_zero(values: &mut [f32]) {
    const PIECE: usize = 1 << 18;
    values.par_chunks_mut(PIECE).for_each(|piece| piece.fill(0.0));
}

/// As [`fill_zero`], of any type whose zero is zero bytes.
pub fn fill_zero_bytes(values: &mut [u8]) {
    const PIECE: usize = 1 << 20;
    values.par_chunks_mut(PIECE).for_each(|piece| piece.fill(0));
}

/// `to += from` on all threads.
pub fn add(to: &mut [f32], from: &[f32]) {
    const PIECE: usize = 1 << 16;
    let pieces = to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE));
    pieces.for_each(|(to, from)| to.iter_mut().zip(from).for_each(|(to, from)| *to += *from));
}

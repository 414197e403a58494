//! The rank's compute threads. Work is cut by shape alone or into parts whose numbers do not depend on the cut, so the
//! number of threads shows in no result.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, OnceLock};

use super::dry::is_dry;
use super::team::{Team, is_helper};

static TEAM: OnceLock<Team> = OnceLock::new();

thread_local! {
    static INSTEAD: RefCell<Option<Arc<Team>>> = const { RefCell::new(None) };
}

/// Sets this process's share of the cores; to be called once, before any op runs. Later calls change nothing.
pub fn set_threads(threads: usize) {
    // An error means that there is a team already, which is what "later calls change nothing" says.
    let _ = TEAM.set(Team::new(threads.max(1)));
    // Decoding and resizing images is rayon's.
    let _ = rayon::ThreadPoolBuilder::new()
        .num_threads(threads.max(1))
        .thread_name(|i| format!("images-{i}"))
        .build_global();
}

/// The team of a process that has set nothing has all cores.
fn team() -> &'static Team {
    TEAM.get_or_init(|| Team::new(std::thread::available_parallelism().map_or(1, |n| n.get())))
}

/// Runs `work` with as many compute threads instead, to see that the number does not show.
pub fn with_threads<R>(threads: usize, work: impl FnOnce() -> R) -> R {
    let before = INSTEAD.replace(Some(Arc::new(Team::new(threads.max(1)))));
    let result = work();
    INSTEAD.set(before);
    result
}

/// What a new thread is to run so that `work` has there the compute threads of the thread that is here.
pub fn same_threads<R>(work: impl FnOnce() -> R) -> impl FnOnce() -> R {
    let instead = INSTEAD.with_borrow(Option::clone);
    move || {
        INSTEAD.set(instead);
        work()
    }
}

pub fn threads() -> usize {
    INSTEAD.with_borrow(|instead| instead.as_deref().map(Team::size)).unwrap_or_else(|| team().size())
}

/// What is worth the hand-over to other threads, in elementary operations.
const WORTH_IT: usize = 1 << 15;

/// On how many threads [`parallel_for`] runs so many tasks of such cost.
pub fn at_once(tasks: usize, cost: usize) -> usize {
    if tasks <= 1 || cost < WORTH_IT || is_helper() { 1 } else { threads().min(tasks) }
}

/// Runs `work(0..tasks)`, on all threads if there are several of both and the whole is worth the hand-over
/// (`cost`: a rough count of elementary operations).
pub fn parallel_for(tasks: usize, cost: usize, work: impl Fn(usize) + Sync + Send) {
    if is_dry() {
        return;
    }
    if at_once(tasks, cost) == 1 {
        (0..tasks).for_each(work);
        return;
    }
    match INSTEAD.with_borrow(Option::clone) {
        Some(instead) => instead.run(tasks, &work),
        None => team().run(tasks, &work),
    }
}

/// Gives each of the parts (disjoint pieces of the results) to `work`, on all threads; `cost` as in [`parallel_for`].
pub fn for_parts<P: Send>(parts: Vec<P>, cost: usize, work: impl Fn(usize, P) + Sync + Send) {
    let parts: Vec<Mutex<Option<P>>> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
    parallel_for(parts.len(), cost, |i| {
        let part = parts[i].lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(part) = part {
            work(i, part);
        }
    });
}

/// Zeroes a large slice on all threads.
pub fn fill_zero(values: &mut [f32]) {
    const PIECE: usize = 1 << 18;
    let cost = values.len();
    for_parts(values.chunks_mut(PIECE).collect(), cost, |_, piece: &mut [f32]| piece.fill(0.0));
}

/// As [`fill_zero`], of any type whose zero is zero bytes.
pub fn fill_zero_bytes(values: &mut [u8]) {
    const PIECE: usize = 1 << 20;
    let cost = values.len() / 4;
    for_parts(values.chunks_mut(PIECE).collect(), cost, |_, piece: &mut [u8]| piece.fill(0));
}

/// `to += from` on all threads.
pub fn add(to: &mut [f32], from: &[f32]) {
    const PIECE: usize = 1 << 16;
    let cost = to.len();
    for_parts(to.chunks_mut(PIECE).zip(from.chunks(PIECE)).collect(), cost, |_, (to, from): (&mut [f32], &[f32])| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += *from);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_of_a_rank_has_the_ranks_compute_threads() {
        let seen = with_threads(7, || std::thread::spawn(same_threads(threads)).join().unwrap());
        assert_eq!(seen, 7);
    }
}

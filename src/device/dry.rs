//! Dry runs: the real code with its arithmetic left out, to see what memory it takes. While a thread runs dry, the loops
//! of `threads` do nothing, so results are allocated and never written; fresh pages that nobody touches cost neither
//! memory nor time. What the loops would have computed, and their threads' scratch, is added up instead.

use std::cell::Cell;

thread_local! {
    static TALLY: Cell<Option<Tally>> = const { Cell::new(None) };
}

/// What was left out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Floating-point operations of products and attention: two for each multiply-add.
    pub flops: f64,
    /// Bytes that the thread itself keeps as scratch from their first use on, at most; and each of its helpers.
    pub scratch: [[usize; SCRATCHES]; 2],
    /// Bytes of an accelerator's scratch that are taken and not yet given back.
    pub taken: usize,
    /// Bytes on the heap beyond what was there before, counted by [`Keeping`](super::Keeping); less than nothing if
    /// more was given back than was taken.
    pub held: isize,
    /// The most of these since [`forget_peak`].
    pub peak: isize,
}

/// Buffers that a thread keeps grow independently of one another.
pub const SCRATCHES: usize = 3;

impl Tally {
    /// Bytes that this thread and its helpers keep.
    pub fn scratch_bytes(&self) -> usize {
        let [own, helpers] = self.scratch.map(|bytes| bytes.iter().sum::<usize>());
        own + helpers * (super::threads::threads() - 1)
    }

    /// As much scratch as this or the other needs.
    pub fn join_scratch(&mut self, other: &Tally) {
        let all = self.scratch.as_flattened_mut().iter_mut().zip(other.scratch.as_flattened());
        all.for_each(|(most, bytes)| *most = *bytes.max(most));
    }
}

/// Runs `work` dry on this thread, and says what was left out.
pub fn dry<R>(work: impl FnOnce() -> R) -> (R, Tally) {
    let before = TALLY.replace(Some(Tally::default()));
    let result = work();
    let tally = TALLY.replace(before).unwrap_or_default();
    (result, tally)
}

/// Whether this thread runs dry.
#[inline]
pub fn is_dry() -> bool {
    TALLY.get().is_some()
}

/// What this thread's dry run has left out so far; nothing outside one.
pub fn tally() -> Tally {
    TALLY.get().unwrap_or_default()
}

fn change(change: impl FnOnce(&mut Tally)) {
    if let Some(mut tally) = TALLY.get() {
        change(&mut tally);
        TALLY.set(Some(tally));
    }
}

/// The allocator has handed out or taken back so many bytes. False if this thread does not run dry.
pub(super) fn count(bytes: isize) -> bool {
    let Some(mut tally) = TALLY.get() else { return false };
    tally.held += bytes;
    tally.peak = tally.peak.max(tally.held);
    TALLY.set(Some(tally));
    true
}

/// Starts the peak anew from what is held.
pub fn forget_peak() {
    change(|tally| tally.peak = tally.held);
}

/// Notes arithmetic that is about to be left out.
pub fn note_flops(flops: f64) {
    change(|tally| tally.flops += flops);
}

/// Notes buffers that this thread would keep, and if `helped` its helpers too.
pub fn note_kept_scratch(bytes: [usize; SCRATCHES], helped: bool) {
    let helpers = if helped { bytes } else { Default::default() };
    change(|tally| tally.join_scratch(&Tally { scratch: [bytes, helpers], ..Tally::default() }));
}

/// Scratch of an accelerator in a dry run, until it is dropped.
pub struct TakenScratch(usize);

impl TakenScratch {
    /// Notes so many bytes on top of those that this thread has taken already.
    pub fn of(bytes: usize) -> Self {
        change(|tally| {
            tally.taken += bytes;
            let own = &mut tally.scratch[0][0];
            *own = tally.taken.max(*own);
        });
        TakenScratch(bytes)
    }
}

impl Drop for TakenScratch {
    fn drop(&mut self) {
        change(|tally| tally.taken -= self.0);
    }
}

/// In a dry run, counts for a moment what the threads of a loop would take, `bytes` each; tasks and cost as
/// [`parallel_for`](super::threads::parallel_for) is told them. (Memory that was really taken and given back at once would be
/// optimised away.)
pub fn touch_scratch(tasks: usize, cost: usize, bytes: usize) {
    if is_dry() && tasks > 0 {
        let bytes = (super::threads::at_once(tasks, cost) * bytes) as isize;
        change(|tally| tally.peak = tally.peak.max(tally.held + bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dry_run_leaves_loops_out_and_adds_up() {
        let mut values = vec![1f32; 10];
        let ((), tally) = dry(|| {
            super::super::threads::fill_zero(&mut values);
            note_flops(3.0);
            note_flops(4.0);
            note_kept_scratch([5, 1, 0], false);
            note_kept_scratch([2, 2, 0], true);
            forget_peak();
            let before = super::tally();
            touch_scratch(1, 0, 700);
            touch_scratch(1, 0, 300);
            assert_eq!((super::tally().held, super::tally().peak), (before.held, before.held + 700));
        });
        assert_eq!((values[0], tally.flops, tally.scratch), (1.0, 7.0, [[5, 2, 0], [2, 2, 0]]));
        let ((), tally) = dry(|| {
            let first = TakenScratch::of(10);
            drop((TakenScratch::of(3), first));
            TakenScratch::of(12);
        });
        assert_eq!((tally.scratch, tally.taken), ([[13, 0, 0], [0; 3]], 0));
        assert!(!is_dry() && tally != super::tally());
        super::super::threads::fill_zero(&mut values);
        assert_eq!(values[0], 0.0);
    }
}

//! What the process's heap holds, counted by [`Keeping`](super::Keeping): where the CPU computes, that is the activations.
//! With the device tier's arenas it is what a rank's budget is about. A program without that allocator counts nothing,
//! and says so.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use candle_core::{Result, bail};

use super::{Usage, dry};

/// Bytes on the heap, as they were asked for; and at most, since the counting began anew.
static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// What the heap held when the counting began.
static BASE: AtomicUsize = AtomicUsize::new(0);
/// Bytes in the arenas of the device tier that lie in this process's memory beside the heap.
static BESIDE: AtomicUsize = AtomicUsize::new(0);
/// Of both together.
static TOGETHER: AtomicUsize = AtomicUsize::new(0);
static BUDGET: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The allocator has handed out `bytes`.
#[inline]
pub(super) fn taken(bytes: usize) {
    // What a dry run allocates is not there.
    if dry::count(bytes as isize) {
        return;
    }
    let held = HELD.fetch_add(bytes, Relaxed).wrapping_add(bytes);
    raise(&PEAK, held);
    raise(&TOGETHER, held.saturating_sub(BASE.load(Relaxed)) + BESIDE.load(Relaxed));
}

#[inline]
pub(super) fn given(bytes: usize) {
    if dry::count(-(bytes as isize)) {
        return;
    }
    HELD.fetch_sub(bytes, Relaxed);
}

/// Most calls raise nothing, and then only read.
#[inline]
fn raise(peak: &AtomicUsize, to: usize) {
    if to > peak.load(Relaxed) {
        peak.fetch_max(to, Relaxed);
    }
}

/// An arena beside the heap has handed out `bytes`.
pub(super) fn charged(bytes: usize) {
    let beside = BESIDE.fetch_add(bytes, Relaxed) + bytes;
    raise(&TOGETHER, HELD.load(Relaxed).saturating_sub(BASE.load(Relaxed)) + beside);
}

pub(super) fn discharged(bytes: usize) {
    BESIDE.fetch_sub(bytes, Relaxed);
}

/// What the heap holds beyond what it held when the counting began.
pub(super) fn held() -> usize {
    HELD.load(Relaxed).saturating_sub(BASE.load(Relaxed))
}

/// What heap and arenas may take together; `None`: what there is.
pub(super) fn set_budget(bytes: Option<usize>) {
    BUDGET.store(bytes.unwrap_or(usize::MAX), Relaxed);
}

/// Begins the counting anew: what the heap holds now is not counted, and peaks begin at what is there.
pub fn count_activations_from_here() {
    let held = HELD.load(Relaxed);
    BASE.store(held, Relaxed);
    PEAK.store(held, Relaxed);
    TOGETHER.store(BESIDE.load(Relaxed), Relaxed);
}

/// Bytes of the heap since [`count_activations_from_here`], now and at most. `None` where the program does not count
/// them (its allocator is not [`Keeping`](super::Keeping)).
pub fn activations() -> Option<Usage> {
    let base = BASE.load(Relaxed);
    let peak = PEAK.load(Relaxed);
    (peak > 0).then(|| Usage { used: held(), peak: peak.saturating_sub(base) })
}

/// The most that arenas and activations have taken together in the device tier of a CPU, in bytes.
pub fn device_peak() -> usize {
    TOGETHER.load(Relaxed)
}

/// An error if arenas and activations together are over the budget. Asked between ops: a `Vec` that cannot grow ends
/// the process, so the heap's part cannot be refused where it is handed out.
#[inline]
pub fn within_budget() -> Result<()> {
    let budget = BUDGET.load(Relaxed);
    if budget == usize::MAX { Ok(()) } else { compare(budget) }
}

#[cold]
fn compare(budget: usize) -> Result<()> {
    let (held, beside) = (held(), BESIDE.load(Relaxed));
    if held + beside <= budget {
        return Ok(());
    }
    bail!(
        "the device memory's budget is {budget} bytes, and {} are in use: {beside} of parameters, gradients and optimizer \
         state, {held} of activations. Raise memory.vram, or leave more to the planner (\"auto\")",
        held + beside
    )
}

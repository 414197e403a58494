//! Budgeted memory: every parameter, gradient and moment is allocated here, so what a tier holds and held at most is
//! known, and a budget is enforced where memory is handed out. A tier is an arena with a limit; what is told apart within
//! it (parameters, gradients, ...) has an arena below it, and a buffer counts in both.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};
use candle_core::DType;

use super::accelerator::Accelerator;
use super::buffer::Mapping;
use super::{Buffer, bulk, heap};

/// A named pool with an optional limit. Cheap to clone; buffers give their bytes back when dropped.
#[derive(Clone, Debug)]
pub struct Arena(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    meter: Arc<Meter>,
    above: Option<Arena>,
    below: Mutex<Vec<Arc<Meter>>>,
    /// Shares its limit with the activations on the heap.
    with_activations: bool,
    /// What it hands out was charged to those above it at once, when it was made.
    paid: Option<Charge>,
    spare: Mutex<Spare>,
    /// Of the topmost arena: the accelerator that goes with it.
    beside: Option<Beside>,
}

/// What an arena has to do with an accelerator.
#[derive(Clone)]
enum Beside {
    /// Its buffers are the accelerator's memory.
    There(Arc<dyn Accelerator>),
    /// They are the host's, and the accelerator copies from and to them.
    Here(Arc<dyn Accelerator>),
}

impl std::fmt::Debug for Beside {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Beside::There(_)) { "There" } else { "Here" })
    }
}

#[derive(Debug)]
struct Meter {
    name: String,
    limit: Option<usize>,
    used: AtomicUsize,
    peak: AtomicUsize,
}

/// Large memory that was given back and waits for its next use: fresh pages from the system are dear. Kept by the
/// topmost arena, for all below.
#[derive(Debug, Default)]
struct Spare {
    pieces: Vec<Mapping>,
    bytes: usize,
}

/// Bytes of an arena now and at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub used: usize,
    pub peak: usize,
}

impl Meter {
    fn new(name: String, limit: Option<usize>) -> Arc<Self> {
        Arc::new(Meter { name, limit, used: AtomicUsize::new(0), peak: AtomicUsize::new(0) })
    }

    fn usage(&self) -> Usage {
        Usage { used: self.used.load(Relaxed), peak: self.peak.load(Relaxed) }
    }

    fn reset_peak(&self) {
        self.peak.store(self.used.load(Relaxed), Relaxed);
    }
}

impl Arena {
    /// An arena by itself.
    pub fn new(name: impl Into<String>, limit: Option<usize>) -> Self {
        Self::top_with(Meter::new(name.into(), limit), false, None)
    }

    /// The device tier where the CPU computes: what it hands out and the activations on the heap share `limit`.
    pub fn with_activations(name: impl Into<String>, limit: Option<usize>) -> Self {
        heap::set_budget(limit);
        Self::top_with(Meter::new(name.into(), limit), true, None)
    }

    /// An accelerator's memory. What kernels and tensors take there beside it counts in the accelerator's own limit.
    pub fn of_accelerator(name: impl Into<String>, limit: Option<usize>, accelerator: Arc<dyn Accelerator>) -> Self {
        Self::top_with(Meter::new(name.into(), limit), false, Some(Beside::There(accelerator)))
    }

    /// The host's memory where an accelerator computes, in pages that its copies find quickly.
    pub fn beside(name: impl Into<String>, limit: Option<usize>, accelerator: Arc<dyn Accelerator>) -> Self {
        Self::top_with(Meter::new(name.into(), limit), false, Some(Beside::Here(accelerator)))
    }

    /// An arena whose buffers count in this one, too, and are bound by its limit. Those of one name are one.
    pub fn child(&self, name: &str) -> Self {
        let mut below = self.0.below.lock().unwrap_or_else(|e| e.into_inner());
        let known = below.iter().find(|meter| meter.name == name).cloned();
        let meter = known.unwrap_or_else(|| {
            below.push(Meter::new(name.to_string(), None));
            below[below.len() - 1].clone()
        });
        Self::under(meter, self, None)
    }

    /// An arena of `bytes` that are taken from this one now and given back with it, whatever of them is in use: so what
    /// is held for things that come and go does not depend on when they do. Errors name `what` it is for.
    pub fn reserved(&self, bytes: usize, what: &str) -> Result<Self> {
        let paid = Charge::take(self, bytes, what)?;
        Ok(Self::under(Meter::new(self.name().to_string(), Some(bytes)), self, Some(paid)))
    }

    fn top_with(meter: Arc<Meter>, with_activations: bool, beside: Option<Beside>) -> Self {
        let (below, spare) = Default::default();
        Arena(Arc::new(Inner { meter, above: None, below, with_activations, paid: None, spare, beside }))
    }

    fn under(meter: Arc<Meter>, above: &Arena, paid: Option<Charge>) -> Self {
        let (below, spare) = Default::default();
        let above = Some(above.clone());
        Arena(Arc::new(Inner { meter, above, below, with_activations: false, paid, spare, beside: None }))
    }

    /// The accelerator whose memory it hands out.
    pub fn accelerator(&self) -> Option<&Arc<dyn Accelerator>> {
        match &self.top().0.beside {
            Some(Beside::There(accelerator)) => Some(accelerator),
            Some(Beside::Here(_)) | None => None,
        }
    }

    /// The arena that is charged, too, for what this one hands out.
    fn charged(&self) -> Option<&Arena> {
        self.0.above.as_ref().filter(|_| self.0.paid.is_none())
    }

    /// A zeroed buffer of `len` elements. Errors name the arena, `what` was wanted and the limit.
    pub fn alloc(&self, dtype: DType, len: usize, what: &str) -> Result<Buffer> {
        let mut buffer = self.alloc_dirty(dtype, len, what)?;
        if buffer.is_reused() {
            bulk::zero(&mut buffer)?;
        }
        Ok(buffer)
    }

    /// As [`Self::alloc`], but the contents are whatever was there: for what is written whole before it is read.
    pub fn alloc_dirty(&self, dtype: DType, len: usize, what: &str) -> Result<Buffer> {
        let bytes = len * dtype.size_in_bytes();
        let charge = Charge::take(self, bytes, what)?;
        Buffer::new(dtype, len, Some(charge), what)
    }

    pub fn name(&self) -> &str {
        &self.0.meter.name
    }

    pub fn limit(&self) -> Option<usize> {
        self.0.meter.limit
    }

    pub fn usage(&self) -> Usage {
        self.0.meter.usage()
    }

    /// What the arenas below it hold, by name, in the order in which they were made.
    pub fn parts(&self) -> Vec<(String, Usage)> {
        let below = self.0.below.lock().unwrap_or_else(|e| e.into_inner());
        below.iter().map(|meter| (meter.name.clone(), meter.usage())).collect()
    }

    /// Starts the peak anew from what is in use, here and below.
    pub fn reset_peak(&self) {
        self.0.meter.reset_peak();
        let below = self.0.below.lock().unwrap_or_else(|e| e.into_inner());
        below.iter().for_each(|meter| meter.reset_peak());
    }

    fn top(&self) -> &Arena {
        self.0.above.as_ref().map_or(self, |above| above.top())
    }
}

/// Bytes taken from an arena and those above it, given back on drop.
#[derive(Debug)]
pub(super) struct Charge {
    arena: Arena,
    bytes: usize,
}

impl Charge {
    fn take(arena: &Arena, bytes: usize, what: &str) -> Result<Self> {
        take(arena, bytes, what)?;
        Ok(Charge { arena: arena.clone(), bytes })
    }
}

/// Charges from the top down, so that a limit above is met before anything below it has changed.
fn take(arena: &Arena, bytes: usize, what: &str) -> Result<()> {
    if let Some(above) = arena.charged() {
        take(above, bytes, what)?;
    }
    let meter = &arena.0.meter;
    let used = meter.used.fetch_add(bytes, Relaxed) + bytes;
    let activations = if arena.0.with_activations { heap::held() } else { 0 };
    if let Some(limit) = meter.limit
        && used + activations > limit
    {
        meter.used.fetch_sub(bytes, Relaxed);
        if let Some(above) = arena.charged() {
            give(above, bytes);
        }
        let beside = if activations > 0 { format!(", {activations} of them activations") } else { String::new() };
        bail!(
            "{what}: {bytes} bytes do not fit into the {} memory: {} of {limit} bytes are in use{beside}",
            meter.name,
            used - bytes + activations
        );
    }
    meter.peak.fetch_max(used, Relaxed);
    if arena.0.with_activations {
        heap::charged(bytes);
    }
    Ok(())
}

fn give(arena: &Arena, bytes: usize) {
    arena.0.meter.used.fetch_sub(bytes, Relaxed);
    if arena.0.with_activations {
        heap::discharged(bytes);
    }
    if let Some(above) = arena.charged() {
        give(above, bytes);
    }
}

impl Charge {
    /// The accelerator whose memory is charged.
    pub(super) fn far(&self) -> Option<&Arc<dyn Accelerator>> {
        self.arena.accelerator()
    }

    /// The accelerator that copies from and to what is charged.
    pub(super) fn copies_to(&self) -> Option<&Arc<dyn Accelerator>> {
        match &self.arena.top().0.beside {
            Some(Beside::Here(accelerator)) => Some(accelerator),
            Some(Beside::There(_)) | None => None,
        }
    }

    /// Spare memory of at least `bytes`, the smallest there is. If all is smaller, the largest is given up, since what
    /// is about to be mapped serves in its place from now on: so an arena keeps no more pieces than were ever in use at
    /// once.
    pub(super) fn reuse(&self, bytes: usize) -> Option<Mapping> {
        let mut spare = self.arena.top().0.spare.lock().unwrap_or_else(|e| e.into_inner());
        let pieces = &spare.pieces;
        let fits = (0..pieces.len()).filter(|&i| pieces[i].bytes() >= bytes).min_by_key(|&i| pieces[i].bytes());
        let largest = || (0..pieces.len()).max_by_key(|&i| pieces[i].bytes());
        let i = fits.or_else(largest)?;
        let piece = spare.pieces.swap_remove(i);
        spare.bytes -= piece.bytes();
        fits.map(|_| piece)
    }

    /// Keeps memory for its next use, unless what is kept and in use would be more than was ever in use.
    pub(super) fn keep(&self, mapping: Mapping) {
        let top = self.arena.top();
        let Usage { used, peak } = top.usage();
        let mut spare = top.0.spare.lock().unwrap_or_else(|e| e.into_inner());
        // Still counted as in use are this charge's bytes.
        if (used + spare.bytes).saturating_sub(self.bytes) + mapping.bytes() <= peak + peak / 16 {
            spare.bytes += mapping.bytes();
            spare.pieces.push(mapping);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        give(&self.arena, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_memory_is_used_again_and_zeroed() {
        let arena = Arena::new("device", None);
        let len = 1 << 20;
        let mut first = arena.alloc(DType::F32, len, "a").unwrap();
        first.as_mut_slice::<f32>().fill(1.0);
        let place = first.bytes().as_ptr();
        drop(first);
        let second = arena.alloc(DType::F32, len / 2, "b").unwrap();
        assert_eq!(second.bytes().as_ptr(), place);
        assert!(second.as_slice::<f32>().iter().all(|&x| x == 0.0));
        assert_eq!(arena.usage(), Usage { used: 2 * len, peak: 4 * len });
    }

    #[test]
    fn a_budget_is_kept_and_given_back() {
        let arena = Arena::new("device", Some(100));
        let first = arena.alloc(DType::F32, 20, "weights").unwrap();
        let refusal = arena.alloc(DType::F32, 10, "moments").unwrap_err().to_string();
        assert!(refusal.contains("moments") && refusal.contains("device"), "{refusal}");
        drop(first);
        assert_eq!(arena.usage(), Usage { used: 0, peak: 80 });
        arena.alloc(DType::BF16, 50, "moments").unwrap();
    }

    #[test]
    fn what_is_below_counts_above_and_is_bound_by_its_limit() {
        let tier = Arena::new("host", Some(1000));
        let (parameters, moments) = (tier.child("parameters"), tier.child("optimizer"));
        let held = parameters.alloc(DType::F32, 150, "a").unwrap();
        let refusal = moments.alloc(DType::F32, 101, "b").unwrap_err().to_string();
        assert!(refusal.contains("b: 404 bytes do not fit into the host memory: 600 of 1000"), "{refusal}");
        assert_eq!((moments.usage(), tier.usage()), (Usage::default(), Usage { used: 600, peak: 600 }));
        let more = tier.child("optimizer").alloc(DType::F32, 100, "b").unwrap();
        drop(held);
        let parts = [("parameters", 0, 600), ("optimizer", 400, 400)];
        assert_eq!(tier.parts(), parts.map(|(name, used, peak)| (name.to_string(), Usage { used, peak })));
        drop(more);
        assert_eq!(tier.usage(), Usage { used: 0, peak: 1000 });
        tier.reset_peak();
        assert_eq!((tier.usage().peak, tier.parts()[1].1.peak), (0, 0));
    }

    #[test]
    fn what_is_reserved_is_held_whatever_is_in_use() {
        let tier = Arena::new("host", Some(1000));
        let reserved = tier.child("optimizer").reserved(600, "pieces").unwrap();
        assert_eq!((tier.usage().used, tier.parts()[0].1.used), (600, 600));
        let held = reserved.alloc(DType::U8, 600, "a piece").unwrap();
        assert!(reserved.alloc(DType::U8, 1, "one more").is_err());
        assert!(tier.reserved(401, "too much").unwrap_err().to_string().contains("too much: 401 bytes"));
        drop(held);
        assert_eq!(tier.usage(), Usage { used: 600, peak: 600 });
        drop(reserved);
        assert_eq!(tier.usage().used, 0);
    }

    #[test]
    fn what_is_kept_for_later_stays_within_what_was_ever_in_use() {
        let tier = Arena::new("host", None);
        let alloc = |mib: usize| tier.child("x").alloc_dirty(DType::U8, mib << 20, "x").unwrap();
        let (large, small) = (alloc(16), alloc(4));
        drop((large, small));
        // Two pieces, of 16 and 4 MiB, are kept; what needs 8 takes the first.
        let held = [alloc(8), alloc(4), alloc(3)];
        assert_eq!(tier.usage(), Usage { used: 15 << 20, peak: 20 << 20 });
        drop(held);
        let spare = tier.0.spare.lock().unwrap();
        assert!(spare.bytes <= 21 << 20, "{}", spare.bytes);
    }
}

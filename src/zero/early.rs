//! Parameters that rest on a drive, read for the backward before it needs them. While the forward ends and the backward
//! begins there is nothing to update, and the drive would have little to do; later it has more than it can. The memory is
//! that of the segment's own sum of gradients, in which nothing matters until the segment has run backward.

use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};

use super::grad_reducer::Summed;
use super::param_store::{At, Stored, locked};
use super::rest::Rest;
use crate::device::bulk::cast;
use crate::device::trace::{Row, span};
use crate::device::{Buffer, Queue};

/// Of one segment.
pub(super) struct Early {
    summed: Arc<Summed>,
    state: Mutex<State>,
}

#[derive(Default)]
enum State {
    #[default]
    Nothing,
    /// It is to be read, unless somebody needs it before that begins.
    Wanted,
    /// It was, well or not.
    Read(Result<()>),
}

impl Early {
    /// Where a segment's parameters can be read early: on a drive, with a sum that is as large and in the same dtype and lies
    /// where a drive can write.
    pub fn of(rest: &Rest, summed: &Arc<Summed>) -> Option<Early> {
        let fits = summed
            .memory()
            .as_ref()
            .is_some_and(|sum| sum.accelerator().is_none() && sum.dtype() == rest.dtype() && sum.len() == rest.len());
        let here = rest.memory().is_some();
        (fits && !here).then(|| Early { summed: summed.clone(), state: Mutex::default() })
    }

    /// Reads it on `queue`. No update of the segment may be under way.
    pub fn begin(stored: &Arc<Stored>, queue: &Queue) {
        let Some(early) = stored.early.get() else { return };
        *locked(&early.state) = State::Wanted;
        let stored = stored.clone();
        // Whoever needs it waits for the state.
        drop(queue.submit(move || {
            if let (Some(early), At::Rest(rest)) = (stored.early.get(), &stored.at) {
                early.read(rest);
            }
            Ok(())
        }));
    }

    fn read(&self, rest: &Rest) {
        let mut state = locked(&self.state);
        if !matches!(*state, State::Wanted) {
            return;
        }
        *state = State::Nothing;
        let Some(mut sum) = self.summed.unused() else { return };
        let _span = span(Row::Copy, || format!("read {} early", self.summed.name()));
        if let Some(memory) = sum.take() {
            *state = State::Read(rest.read_all(memory).map(|memory| *sum = Some(memory)));
        }
    }

    /// What was read into `into`, if it was; it is forgotten. Otherwise `into` comes back as it was.
    pub fn take(&self, into: &mut Buffer) -> Result<bool> {
        match std::mem::take(&mut *locked(&self.state)) {
            State::Nothing | State::Wanted => Ok(false),
            State::Read(read) => {
                read?;
                // Gradients that came first have overwritten it.
                let Some(sum) = self.summed.unused() else { return Ok(false) };
                cast(sum.as_ref().context("what was read early is gone")?, into)?;
                Ok(true)
            }
        }
    }

    /// What was read is no longer what rests there.
    pub fn forget(&self) {
        *locked(&self.state) = State::Nothing;
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use candle_core::DType;

    use super::*;
    use crate::comm::Solo;
    use crate::device::{BucketLayout, GradSlot, ParamSlot, Pending, Place, StateFile, StateFileOptions};
    use crate::zero::{GradReducer, ParamStore, Placement, Ranks, Stage, Tiers, WeightSource};

    const LEN: usize = 5000;

    /// Every tensor counts from its name on.
    struct Counting;

    impl WeightSource for Counting {
        fn read(&self, name: &str, range: Range<usize>, into: &mut [f32]) -> Result<()> {
            let first: usize = name.parse()?;
            into.iter_mut().zip(range).for_each(|(x, i)| *x = (first + i) as f32);
            Ok(())
        }
    }

    #[test]
    fn parameters_are_read_early_into_sums_that_nothing_is_in() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let options = StateFileOptions {
            dir: dir.path().to_path_buf(),
            rank: 0,
            bytes: 1 << 20,
            delays: None,
            direct: None,
            ring: None,
        };
        let drive = StateFile::create(options)?;
        let placement = Placement { parameters: Place::Nvme, gradients: Place::Host, optimizer: Place::Host };
        let tiers = Tiers { prefetch: false, ..Tiers::unlimited(placement, Some(drive.clone()), None)? };
        let ranks = Ranks { comm: Arc::new(Solo), stage: Stage::Replicated, reduce_dtype: DType::F32 };
        let slot = |i: usize| {
            let slot = ParamSlot::new(format!("segment {i}"));
            slot.lay_out(BucketLayout::new(vec![(format!("{}", 7 * i), vec![LEN])]));
            (slot, GradSlot::new("gradients"))
        };
        let slots: Vec<_> = (0..3).map(slot).collect();
        let with_grads = slots.iter().map(|(slot, grads)| (slot, Some(grads)));
        let store = ParamStore::load(&ranks, DType::F32, &tiers, with_grads, &Counting)?;
        let mut reducer = GradReducer::new(&ranks, &tiers, &store, slots.iter().map(|(_, grads)| Some(grads)))?;
        reducer.lend(&store);
        let right = |i: usize| {
            slots[i].0.get().unwrap().as_slice::<f32>()[..LEN]
                == std::array::from_fn::<_, LEN, _>(|at| (7 * i + at) as f32)
        };
        // What the backward reads, after `between` was called at its beginning.
        let mut round = |between: &mut dyn FnMut(&mut GradReducer) -> Result<()>| -> Result<u64> {
            let mut walk = store.there_and_back();
            for i in 0..3 {
                let _fetched = walk.fetch()?;
                assert!(right(i));
            }
            tiers.ahead.submit(|| Ok(())).wait()?;
            between(&mut reducer)?;
            let before = drive.traffic().read_bytes;
            for i in (0..3).rev() {
                let _fetched = walk.fetch()?;
                assert!(right(i));
            }
            Ok(drive.traffic().read_bytes - before)
        };
        let one = round(&mut |_| {
            store.updating(1, Pending::ready(()));
            Ok(())
        })?;
        assert!(one >= 4 * LEN as u64, "what was read before an update was used after it");
        assert_eq!(round(&mut |_| Ok(()))?, 0, "nothing was read early");
        // A sum that gradients are in is left alone.
        round(&mut |reducer| {
            reducer.open(2)?;
            reducer.close(2, false, None)?;
            reducer.settle()
        })?;
        assert_eq!(round(&mut |_| Ok(()))?, one, "one segment's sum was not free");
        Ok(())
    }
}

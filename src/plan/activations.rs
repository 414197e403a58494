//! What activations take in a pass, turn by turn, for a choice of what each segment leaves behind: the tape's rules
//! played through with the sizes that dry runs measured.

use super::facts::Facts;
use crate::segment::Keep;

/// Bytes of activations when a turn begins, and at most in it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Turn {
    pub before: usize,
    pub most: usize,
}

/// Bytes of activations turn by turn.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// While segment i runs forward.
    pub forward: Vec<Turn>,
    /// While the loss and its gradient are computed.
    pub objective: usize,
    /// While segment i runs backward.
    pub backward: Vec<Turn>,
    /// What waits on the host at most.
    pub host: usize,
    /// What moves there, and back.
    pub moved: usize,
}

impl Profile {
    /// The most of all turns.
    pub fn peak(&self) -> usize {
        self.forward.iter().chain(&self.backward).map(|turn| turn.most).max().unwrap_or(0).max(self.objective)
    }
}

/// What never changes while choices do: who writes and who reads a slot, and what a kept graph holds.
pub struct Wiring<'f> {
    facts: &'f Facts,
    writer: Vec<Option<usize>>,
    /// First and last reader.
    readers: Vec<Option<(usize, usize)>>,
    /// All of them.
    read_by: Vec<Vec<usize>>,
    /// Bytes that segment i's kept graph holds, its outputs among them; its inputs it shares with whoever made them.
    graphs: Vec<usize>,
}

impl<'f> Wiring<'f> {
    pub fn of(facts: &'f Facts) -> Self {
        let slots = facts.slots.len();
        let (mut writer, mut readers, mut read_by) = (vec![None; slots], vec![None; slots], vec![Vec::new(); slots]);
        for (i, segment) in facts.segments.iter().enumerate() {
            segment.outputs.iter().for_each(|&slot| writer[slot] = Some(i));
            for &slot in &segment.inputs {
                let (first, _) = readers[slot].unwrap_or((i, i));
                readers[slot] = Some((first, i));
                read_by[slot].push(i);
            }
        }
        let graphs = facts.segments.iter().map(|segment| segment.measured.graph.change.max(0) as usize).collect();
        Wiring { facts, writer, readers, read_by, graphs }
    }

    /// Bytes that segment i's kept graph holds.
    pub fn graph(&self, i: usize) -> usize {
        self.graphs[i]
    }

    /// Plays a pass.
    pub fn profile(&self, keep: &[Keep]) -> Profile {
        let (facts, count) = (self.facts, self.facts.segments.len());
        let mut state = State::of(self);
        facts.given.iter().for_each(|&slot| state.values[slot] = At::Device);
        let mut profile = Profile {
            forward: vec![Turn::default(); count],
            backward: vec![Turn::default(); count],
            ..Profile::default()
        };
        for (i, segment) in facts.segments.iter().enumerate() {
            let measured = &segment.measured;
            let above = if keep[i] == Keep::Graph { measured.graph.above } else { measured.plain.above };
            profile.forward[i] = state.turn(above);
            state.graphs[i] = keep[i] == Keep::Graph;
            segment.outputs.iter().for_each(|&slot| state.values[slot] = At::Device);
            for &slot in segment.inputs.iter().filter(|&&slot| self.readers[slot].is_some_and(|(_, last)| last == i)) {
                if !self.needed_again(slot, keep) {
                    state.values[slot] = At::Nowhere;
                } else if keep[i] == Keep::Host && i + 1 < count && !self.is_held(slot, keep) {
                    state.values[slot] = At::Host;
                    profile.moved += facts.slots[slot];
                }
            }
            profile.host = profile.host.max(state.on_host());
        }
        let predicted = facts.slots[facts.prediction];
        // The prediction as fp32, its gradient, and that in the dtype of the run.
        let fp32 = predicted * 4 / facts.dtype.size_in_bytes();
        profile.objective = state.held() + 2 * fp32 + predicted;
        state.values[facts.prediction] = At::Nowhere;
        state.grads[facts.prediction] = true;
        for (i, segment) in facts.segments.iter().enumerate().rev() {
            let measured = &segment.measured;
            // What the segment before this one runs again from comes back meanwhile, too.
            for again in (i.saturating_sub(1)..=i).filter(|&i| keep[i].recomputes()) {
                state.bring_back(&facts.segments[again].inputs);
            }
            // Run again, a segment builds its graph first and then has what it would have kept.
            let again = measured.graph.above.max(self.graphs[i] + measured.pull.above);
            let above = if keep[i] == Keep::Graph { measured.pull.above } else { again };
            profile.backward[i] = state.turn(above);
            state.graphs[i] = false;
            segment.outputs.iter().for_each(|&slot| state.grads[slot] = false);
            for &slot in &segment.inputs {
                if self.writer[slot].is_some() {
                    state.grads[slot] = true;
                }
                if self.readers[slot].is_some_and(|(first, _)| first == i) {
                    state.values[slot] = At::Nowhere;
                }
            }
        }
        profile
    }

    /// Whether a kept graph holds the slot's value, as what it was made of or what it made.
    fn is_held(&self, slot: usize, keep: &[Keep]) -> bool {
        let mut holders = self.read_by[slot].iter().copied().chain(self.writer[slot]);
        holders.any(|i| keep[i] == Keep::Graph)
    }

    /// Whether some reader of the slot runs again on the way back.
    fn needed_again(&self, slot: usize, keep: &[Keep]) -> bool {
        let Some((first, last)) = self.readers[slot] else { return false };
        (first..=last).any(|r| keep[r].recomputes() && self.facts.segments[r].inputs.contains(&slot))
    }
}

/// Bytes that a slot takes beside its numbers: its places in a tape, and what makes a tensor of numbers. Shows where a whole
/// network takes less than a megabyte.
const BESIDE: usize = 400;

/// Where a slot's value is.
#[derive(Clone, Copy, PartialEq)]
enum At {
    Nowhere,
    Device,
    Host,
}

/// What is there between turns.
struct State<'w, 'f> {
    wiring: &'w Wiring<'f>,
    values: Vec<At>,
    grads: Vec<bool>,
    graphs: Vec<bool>,
}

impl<'w, 'f> State<'w, 'f> {
    fn of(wiring: &'w Wiring<'f>) -> Self {
        let (slots, segments) = (wiring.facts.slots.len(), wiring.facts.segments.len());
        State { wiring, values: vec![At::Nowhere; slots], grads: vec![false; slots], graphs: vec![false; segments] }
    }

    fn bring_back(&mut self, slots: &[usize]) {
        slots.iter().for_each(|&slot| {
            if self.values[slot] == At::Host {
                self.values[slot] = At::Device;
            }
        });
    }

    /// A turn that takes so much beyond what is held.
    fn turn(&self, above: usize) -> Turn {
        let before = self.held();
        Turn { before, most: before + above }
    }

    /// On the device.
    fn held(&self) -> usize {
        let sizes = &self.wiring.facts.slots;
        let graphs = (0..self.graphs.len()).filter(|&i| self.graphs[i]).map(|i| self.wiring.graphs[i]).sum::<usize>();
        let own = |&slot: &usize| {
            // A kept graph holds what it was made from, and counts its outputs itself.
            let read = || self.wiring.read_by[slot].iter().any(|&i| self.graphs[i]);
            let held = self.values[slot] == At::Device || read();
            held && !self.wiring.writer[slot].is_some_and(|i| self.graphs[i])
        };
        let values = (0..sizes.len()).filter(own).map(|slot| sizes[slot]).sum::<usize>();
        let grads = (0..sizes.len()).filter(|&slot| self.grads[slot]).map(|slot| sizes[slot]).sum::<usize>();
        graphs + values + grads + BESIDE * sizes.len()
    }

    fn on_host(&self) -> usize {
        let sizes = &self.wiring.facts.slots;
        (0..sizes.len()).filter(|&slot| self.values[slot] == At::Host).map(|slot| sizes[slot]).sum()
    }
}

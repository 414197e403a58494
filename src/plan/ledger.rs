//! Bytes per rank in each tier, and bytes that travel in a step, for a choice of stage, tiers and what segments keep. It
//! follows what `zero`, the optimizer's thread and the tape allocate, to the byte where that does not depend on timing.

use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::activations::{Profile, Turn, Wiring};
use super::facts::{Facts, SegmentFacts, compute_dtype};
use crate::config::{GradAccumDtype, MasterDtype, OptimizerKind, ReduceDtype, RunPlan};
use crate::device::{Place, StateFile};
use crate::optim::{RecordLayout, StateKind};
use crate::segment::Keep;
use crate::zero::{IN_FLIGHT, Placement, pieces_of};

/// A GPU's driver holds so much of what it has handed out once more, as gaps. Sizes repeat from step to step, so they are
/// few.
const GAPS: usize = 24;

/// What is chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    pub stage: u8,
    pub placement: Placement,
    /// What each segment leaves behind on the way forward.
    pub keep: Vec<Keep>,
}

/// What is given, and matters for bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms {
    pub world_size: usize,
    /// Of the activations and of the parameters that ops read.
    pub compute: DType,
    pub master: MasterDtype,
    pub state: StateKind,
    pub grads: GradAccumDtype,
    /// Gradients travel between ranks in half precision.
    pub reduce_half: bool,
    pub prefetch: bool,
    /// The device's memory is not the host's: what the optimizer needs from the other side is copied, piece by piece.
    pub apart: bool,
    /// Micro-batches in a step.
    pub accumulation: usize,
    /// The update waits for the norm of all gradients.
    pub clips: bool,
}

/// Bytes in one tier of memory at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TierBytes {
    pub parameters: usize,
    pub gradients: usize,
    pub optimizer: usize,
    /// Networks that do not train.
    pub frozen: usize,
    pub activations: usize,
    /// Of all together: less than their sum, since they are not at most at the same time.
    pub total: usize,
    /// With what the compute threads keep as scratch besides.
    pub bound: usize,
    /// With gaps between what a GPU's driver has handed out besides: what a budget must have room for.
    pub room: usize,
}

/// Bytes of an arena in a turn beyond those at rest: at its beginning, and through it.
#[derive(Clone, Copy, Debug, Default)]
struct Flight {
    begins: usize,
    goes_on: usize,
}

/// Bytes that travel in a step, per rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    pub to_device: usize,
    pub to_host: usize,
    pub read: usize,
    pub written: usize,
    /// To other ranks.
    pub between_ranks: usize,
}

/// Bytes that pictures take, whatever is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PictureBytes {
    /// To decode the largest.
    pub decoding: usize,
    /// On the host beside a device with its own memory: for decoding, for pictures and latents that are kept, and for rows.
    /// Where the CPU computes they are among its activations.
    pub on_host: usize,
}

/// What a choice takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bytes {
    pub device: TierBytes,
    pub host: TierBytes,
    pub pictures: PictureBytes,
    pub drive: usize,
    pub traffic: Traffic,
    /// The turn in which the device tier holds most.
    pub fullest: String,
    /// Optimizer state in memory on each rank; on all alike if there is one number.
    pub state_by_rank: Vec<usize>,
}

impl Terms {
    pub fn of(plan: &RunPlan, world_size: usize, apart: bool) -> Self {
        Terms {
            world_size,
            compute: compute_dtype(plan),
            master: plan.optimizer.master_dtype,
            state: match plan.optimizer.kind {
                OptimizerKind::AdamW => StateKind::F32,
                OptimizerKind::AdamW8bit => StateKind::Bits8,
            },
            grads: plan.zero.grad_accum_dtype,
            reduce_half: plan.zero.reduce_dtype != ReduceDtype::F32,
            prefetch: plan.zero.prefetch,
            apart,
            accumulation: plan.train.accumulation,
            clips: plan.train.max_grad_norm.is_some() || compute_dtype(plan) == DType::F16,
        }
    }

    /// Bytes of a parameter in use.
    pub(super) fn used(&self) -> usize {
        self.compute.size_in_bytes()
    }

    /// Bytes of a parameter at rest.
    pub(super) fn rest(&self) -> usize {
        if self.master == MasterDtype::Bf16 { 2 } else { self.used() }
    }

    fn rest_differs(&self) -> bool {
        self.master == MasterDtype::Bf16 && self.compute != DType::BF16
    }

    /// Whether fp32 masters are a copy of their own.
    pub(super) fn has_master(&self) -> bool {
        self.master == MasterDtype::F32 && self.compute != DType::F32
    }

    pub(super) fn grad(&self) -> usize {
        match self.grads {
            GradAccumDtype::F32 => 4,
            GradAccumDtype::Bf16 => 2,
        }
    }
}

/// Sizes of one segment under a choice, in elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub full: usize,
    pub shard: usize,
    /// What this rank's optimizer sees.
    pub owned: usize,
    pub trains: bool,
}

/// Adds up a choice.
pub struct Ledger<'a> {
    facts: &'a Facts,
    pub(super) terms: Terms,
    pub(super) choice: &'a Choice,
    pub(super) sizes: Vec<Sizes>,
}

impl<'a> Ledger<'a> {
    pub fn new(facts: &'a Facts, terms: Terms, choice: &'a Choice) -> Self {
        let size = |segment: &SegmentFacts| {
            let full = segment.padded_len(terms.world_size);
            let shard = full / terms.world_size;
            let owned = if choice.stage >= 1 { shard } else { full };
            Sizes { full, shard, owned, trains: segment.trains }
        };
        let sizes = facts.segments.iter().map(size).collect();
        Ledger { facts, terms, choice, sizes }
    }

    pub(super) fn place(&self) -> Placement {
        self.choice.placement
    }

    pub(super) fn several(&self) -> bool {
        self.terms.world_size > 1
    }

    /// Whether ops find parameters where they rest.
    pub(super) fn resident(&self) -> bool {
        self.place().parameters == Place::Device && !self.terms.rest_differs() && self.choice.stage < 3
    }

    /// Whether buckets of gradients rest where ops fill them.
    fn rests_in_slot(&self) -> bool {
        self.choice.stage < 2 && self.place().gradients == Place::Device && self.terms.grads == GradAccumDtype::F32
    }

    /// Bytes of parameters, masters, gradients and state at rest; of state on the rank that has most.
    pub(super) fn at_rest(&self) -> [usize; 4] {
        let mut rest = [0; 4];
        for sizes in &self.sizes {
            rest[0] += if self.resident() { sizes.full * self.terms.used() } else { sizes.owned * self.terms.rest() };
            if sizes.trains {
                rest[1] += if self.terms.has_master() { 4 * sizes.owned } else { 0 };
                rest[2] += self.terms.grad() * if self.choice.stage >= 2 { sizes.shard } else { sizes.full };
            }
        }
        rest[3] = self.state_by_rank().into_iter().max().unwrap_or(0);
        rest
    }

    /// Bytes of optimizer state: small tensors keep 32 bits and lie at the ends of buckets, so ranks differ.
    fn state_by_rank(&self) -> Vec<usize> {
        let of = |rank: usize| {
            let all = self.sizes.iter().zip(&self.facts.segments).filter(|(sizes, _)| sizes.trains);
            all.map(|(sizes, segment)| self.records(segment, sizes, rank).sum::<usize>()).sum()
        };
        (0..self.optimizers()).map(of).collect()
    }

    /// Ranks whose optimizers see something else.
    fn optimizers(&self) -> usize {
        if self.choice.stage >= 1 { self.terms.world_size } else { 1 }
    }

    /// Bytes of a segment's records of optimizer state on one rank, piece by piece.
    fn records(&self, segment: &SegmentFacts, sizes: &Sizes, rank: usize) -> impl Iterator<Item = usize> + use<> {
        let (owned, small_from, state) = (sizes.owned, segment.small_from, self.terms.state);
        pieces_of(self.piece(), owned)
            .map(move |piece| RecordLayout::new(state, rank * owned + piece.start, piece.len(), small_from).bytes())
    }

    /// Elements that the optimizer updates at a time.
    fn piece(&self) -> usize {
        self.place().optimizer_piece(self.terms.apart)
    }

    /// The device's parameters while segment i is used and `next` is on its way. Memory for a way is taken when it
    /// begins and held until its end is waited for.
    fn on_the_way(&self, i: usize, next: Option<usize>) -> Flight {
        if self.resident() {
            return Flight { begins: self.publishing(i), goes_on: 0 };
        }
        let next = next.filter(|_| self.terms.prefetch).map_or(0, |next| self.bring(next));
        Flight { begins: self.bring(i), goes_on: self.sizes[i].full * self.terms.used() + next }
    }

    /// What bringing a segment takes.
    fn bring(&self, i: usize) -> usize {
        let (sizes, used, rest) = (self.sizes[i], self.terms.used(), self.terms.rest());
        let (whole, drive) = (sizes.owned == sizes.full, self.place().parameters == Place::Nvme);
        let converted = self.terms.rest_differs() && (!whole || drive);
        let resting = if converted { sizes.full * rest } else { 0 };
        let shard = if !whole && drive { sizes.owned * rest } else { 0 };
        sizes.full * used + resting + shard
    }

    /// A rank's shard on its way to the others' resident copies.
    fn publishing(&self, i: usize) -> usize {
        let publishes = self.resident() && self.several() && self.choice.stage >= 1;
        if publishes { self.sizes[i].shard * self.terms.used() } else { 0 }
    }

    /// The device's gradients while segment i runs backward: its bucket, and the one before it on its way to where it
    /// rests, with what its reduction takes.
    fn leaving(&self, i: usize) -> Flight {
        let bucket = |sizes: &Sizes| if sizes.trains && !self.rests_in_slot() { 4 * sizes.full } else { 0 };
        let before = self.sizes.get(i + 1).filter(|sizes| sizes.trains);
        let leaving = before.map_or(0, |before| bucket(before) + self.reducing(before));
        Flight { begins: leaving, goes_on: leaving + bucket(&self.sizes[i]) }
    }

    /// What the reduction of a bucket takes beside it.
    fn reducing(&self, sizes: &Sizes) -> usize {
        if !self.several() {
            return 0;
        }
        let shard = if self.choice.stage >= 1 { sizes.shard } else { 0 };
        4 * shard + if self.terms.reduce_half { 2 * (sizes.full + shard) } else { 0 }
    }

    /// Where the optimizer computes.
    fn optimizer_side(&self) -> Place {
        match self.terms.apart && self.place().optimizer == Place::Device {
            true => Place::Device,
            false => Place::Host,
        }
    }

    /// Pieces on the optimizer's side that do not rest there, reserved for as many as are there at a time: of parameters,
    /// gradients, state.
    fn staging(&self, rank: usize) -> [usize; 3] {
        let Placement { parameters, optimizer, gradients } = self.place();
        let apart = |place: Place| self.terms.apart && (place == Place::Device) != (optimizer == Place::Device);
        let staged = |place: Place, bytes: usize| if place == Place::Nvme || apart(place) { bytes } else { 0 };
        let (mut count, mut most) = (0, [0; 3]);
        for (sizes, segment) in self.sizes.iter().zip(&self.facts.segments).filter(|(sizes, _)| sizes.trains) {
            for (k, record) in self.records(segment, sizes, rank).enumerate() {
                let elements = (sizes.owned - k * self.piece()).min(self.piece());
                let master = if self.terms.has_master() { 4 * elements } else { 0 };
                let weights = staged(parameters, elements * self.terms.rest()) + staged(optimizer, master);
                let grads = staged(gradients, elements * self.terms.grad());
                let of_piece = [weights, grads, staged(optimizer, record)];
                count += 1;
                most = std::array::from_fn(|i| most[i].max(of_piece[i]));
            }
        }
        most.map(|bytes| bytes * IN_FLIGHT.min(count))
    }

    /// All of it.
    pub fn bytes(&self, profile: &Profile) -> Bytes {
        let [parameters, masters, gradients, state] = self.at_rest();
        let place = self.place();
        let on = |tier: Place, at: Place, bytes: usize| if tier == at { bytes } else { 0 };
        let rest = |tier: Place| {
            [
                on(tier, place.parameters, parameters) + on(tier, place.optimizer, masters),
                on(tier, place.gradients, gradients),
                on(tier, place.optimizer, state),
            ]
        };
        let staging: Vec<[usize; 3]> = (0..self.optimizers()).map(|rank| self.staging(rank)).collect();
        let state_staged: Vec<usize> = staging.iter().map(|[_, _, state]| *state).collect();
        // Ranks differ in state alone.
        let most = [staging[0][0], staging[0][1], state_staged.iter().copied().max().unwrap_or(0)];
        let [staged_here, staged_there] = match self.optimizer_side() {
            Place::Device => [most, [0; 3]],
            Place::Host | Place::Nvme => [[0; 3], most],
        };
        let at_rest = rest(Place::Device);
        let [parameters_here, gradients_here, state_here] = std::array::from_fn(|i| at_rest[i] + staged_here[i]);
        let mut device = TierBytes {
            parameters: parameters_here,
            gradients: gradients_here,
            optimizer: state_here,
            // Where parameters rest elsewhere, its weights stay in their files.
            frozen: if place.parameters == Place::Device { self.facts.encoder.weights } else { 0 },
            ..TierBytes::default()
        };
        let always = parameters_here + gradients_here + state_here + device.frozen;
        let pictures = self.pictures();
        let around = if self.terms.apart { 0 } else { self.facts.kept + self.facts.around };
        let mut fullest = String::new();
        let mut turn = |name: &dyn Fn() -> String, parameters: Flight, gradients: Flight, activations: Turn| {
            device.parameters = device.parameters.max(parameters_here + parameters.begins.max(parameters.goes_on));
            device.gradients = device.gradients.max(gradients_here + gradients.begins.max(gradients.goes_on));
            device.activations = device.activations.max(around + activations.most.max(activations.before));
            let begins = parameters.begins + gradients.begins + activations.before;
            let goes_on = parameters.goes_on + gradients.goes_on + activations.most;
            let total = always + around + begins.max(goes_on);
            if total > device.total {
                (device.total, fullest) = (total, name());
            }
        };
        let steady = |bytes: usize| Flight { begins: bytes, goes_on: bytes };
        let at_once = |bytes: usize| Turn { before: bytes, most: bytes };
        let none = Flight::default();
        if !self.terms.apart {
            // Rows come after the first picture; the bound below knows that they may be there at the last.
            let decoding = pictures.decoding.saturating_sub(self.facts.around);
            turn(&|| "decoding of a picture".to_string(), none, none, at_once(decoding));
        }
        for &[weights, next, activations] in &self.facts.encoder.turns {
            let next = if self.terms.prefetch { next } else { 0 };
            let read = if place.parameters == Place::Device { 0 } else { weights + next };
            turn(&|| "encoding of a picture".to_string(), steady(read), none, at_once(activations));
        }
        let count = self.sizes.len();
        for (i, &activations) in profile.forward.iter().enumerate() {
            let next = if i + 1 < count { i + 1 } else { i };
            turn(&|| self.named("forward", i), self.on_the_way(i, Some(next)), none, activations);
        }
        turn(&|| "loss".to_string(), none, none, at_once(profile.objective));
        for (i, &activations) in profile.backward.iter().enumerate() {
            turn(&|| self.named("backward", i), self.on_the_way(i, i.checked_sub(1)), self.leaving(i), activations);
        }
        if let Some([decoder, activations]) = self.facts.validation {
            let of = |i: usize| self.on_the_way(i, (i + 1 < count).then_some(i + 1));
            let most = (0..count).map(|i| of(i).begins.max(of(i).goes_on)).max().unwrap_or(0);
            turn(&|| "making of a validation picture".to_string(), steady(decoder + most), none, at_once(activations));
        }
        // The pipeline at the end is written segment by segment, each whole and in fp32, beside this rank's shard of it.
        let whole = |s: &Sizes| 4 * (s.full + if self.several() { s.shard } else { 0 });
        let written = self.sizes.iter().filter(|s| s.trains).map(whole).max().unwrap_or(0);
        let [parameters_there, gradients_there, state_there] = rest(Place::Host);
        let mut host = TierBytes {
            parameters: parameters_there + staged_there[0] + written,
            gradients: gradients_there + staged_there[1],
            optimizer: state_there + staged_there[2],
            activations: profile.host + pictures.on_host,
            ..TierBytes::default()
        };
        host.total = host.parameters + host.gradients + host.optimizer + host.activations;
        let decoding = if self.terms.apart { 0 } else { always + around + pictures.decoding };
        (host.bound, device.bound) = (host.total, device.total.max(decoding) + self.facts.scratch);
        let gaps = if self.terms.apart { device.bound / GAPS } else { 0 };
        (host.room, device.room) = (host.bound, device.bound + gaps);
        Bytes {
            state_by_rank: if place.optimizer == Place::Nvme { state_staged } else { self.state_by_rank() },
            device,
            host,
            pictures,
            drive: self.drive(),
            traffic: self.traffic(profile),
            fullest,
        }
    }

    fn pictures(&self) -> PictureBytes {
        let Facts { kept, around, decoding, .. } = *self.facts;
        PictureBytes { decoding, on_host: if self.terms.apart { kept + around + decoding } else { 0 } }
    }

    fn named(&self, what: &str, i: usize) -> String {
        format!("{what} of {}", self.facts.segments[i].name)
    }

    /// What the state file holds.
    fn drive(&self) -> usize {
        let place = self.place();
        let sector = |bytes: usize| StateFile::room(bytes) as usize;
        let mut bytes = 0;
        for (sizes, segment) in self.sizes.iter().zip(&self.facts.segments) {
            if place.parameters == Place::Nvme {
                bytes += sector(sizes.owned * self.terms.rest());
            }
            if place.optimizer == Place::Nvme && sizes.trains {
                bytes += if self.terms.has_master() { sector(4 * sizes.owned) } else { 0 };
                bytes += self.records(segment, sizes, 0).map(sector).sum::<usize>();
            }
        }
        bytes
    }
}

/// Bytes of a choice.
pub fn bytes(facts: &Facts, wiring: &Wiring, terms: Terms, choice: &Choice) -> Bytes {
    Ledger::new(facts, terms, choice).bytes(&wiring.profile(&choice.keep))
}

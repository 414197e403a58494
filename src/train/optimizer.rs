//! The optimizer at work: a thread that updates segment after segment, piece by piece, wherever weights and state rest.
//! While one piece is computed the next ones are read and the last ones written; and while all that goes on the network
//! runs, as far as it does not need what is being changed ([`crate::zero::ParamStore::updating`]).

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};
use candle_core::DType;

use super::step::Group;
use super::update::{OnAccelerator, Step, update_here};
use crate::checkpoint::OptimizerState;
use crate::device::threads::same_threads;
use crate::device::trace::{self, Row};
use crate::device::{Arena, Buffer, Pending, Promise, promise};
use crate::optim::{RecordLayout, StateKind, StochasticRounding};
use crate::zero::{
    AHEAD, BEHIND, Coming, GradReducer, IN_FLIGHT, OwnedComing, OwnedGrads, OwnedPiece, OwnedWeights, ParamStore,
    Piece, Rest, Staging, Start, Tiers, pieces_of,
};

/// What every segment of a step has in common.
#[derive(Clone, Copy, Debug)]
pub struct StepScale {
    /// From 1.
    pub step: u64,
    /// What gradients are multiplied by: clip factor, and one over the loss scale.
    pub grad_scale: f32,
}

/// Optimizer state of every segment that trains, and the thread that uses it.
pub struct Optimizer {
    kind: StateKind,
    segments: Vec<Option<Arc<Segment>>>,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// One segment's weights, gradients and state, of what this rank's optimizer sees.
struct Segment {
    index: u64,
    weights: OwnedWeights,
    grads: OwnedGrads,
    chunks: Vec<Chunk>,
    /// Of stochastic rounding.
    seed: u64,
}

/// A piece's state: one record.
struct Chunk {
    /// Counted from the first owned element.
    range: Range<usize>,
    layout: RecordLayout,
    record: Rest,
}

/// One segment's update.
struct Job {
    segment: Arc<Segment>,
    scale: StepScale,
    group: Group,
    done: Arc<Mutex<Option<Promise<()>>>>,
}

impl Optimizer {
    /// State of the given kind for every segment that trains, zero moments.
    pub fn new(tiers: &Tiers, store: &ParamStore, reducer: &GradReducer, kind: StateKind, seed: u64) -> Result<Self> {
        let segment = |i: usize| match (store.trains(i), reducer.owned(i)) {
            (true, Some(grads)) => Segment::new(tiers, store, i, grads, kind, seed).map(Arc::new).map(Some),
            _ => Ok(None),
        };
        let segments = (0..store.len()).map(segment).collect::<Result<Vec<_>>>()?;
        let (jobs, todo) = channel();
        let sides = Sides::reserve(tiers, segments.iter().flatten())?;
        let far = OnAccelerator::new(&tiers.optimizer_states().optimizer, kind, segments.len())?;
        let thread = std::thread::Builder::new()
            .name("optimizer".into())
            .spawn(same_threads(move || Pipeline::new(todo, sides, far).run()))
            .context("starting the optimizer's thread")?;
        Ok(Optimizer { kind, segments, jobs: Some(jobs), thread: Some(thread) })
    }

    /// Prepares the update of segment `i`: the first result is waited for before its weights are used again, the second
    /// one starts the work. None if the segment does not train.
    pub fn prepare(&self, i: usize, scale: StepScale, group: Group) -> Option<(Pending<()>, Start)> {
        let (segment, jobs) = (self.segments[i].clone()?, self.jobs.clone()?);
        let (promise, pending) = promise();
        let job = Job { segment, scale, group, done: Arc::new(Mutex::new(Some(promise))) };
        // Without its thread the promise is dropped, which the wait reports.
        Some((pending, Box::new(move || drop(jobs.send(job)))))
    }

    /// The records of segment `i`, one for each piece, in order; nothing may be at work on it.
    pub fn records(&self, i: usize) -> impl Iterator<Item = Record<'_>> {
        self.segments[i].iter().flat_map(|segment| &segment.chunks).map(Record)
    }
}

impl OptimizerState for Optimizer {
    fn kind(&self) -> StateKind {
        self.kind
    }

    fn records(&self, i: usize, show: &mut dyn FnMut(&RecordLayout, &[u8]) -> Result<()>) -> Result<()> {
        Optimizer::records(self, i).try_for_each(|record| record.read(|bytes| show(record.layout(), bytes))?)
    }
}

impl Drop for Optimizer {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the work was told to whoever waited for it.
            let _ = thread.join();
        }
    }
}

/// One piece's state, for checkpoints.
pub struct Record<'a>(&'a Chunk);

impl Record<'_> {
    pub fn layout(&self) -> &RecordLayout {
        &self.0.layout
    }

    /// Hands the record's bytes to `read`.
    pub fn read<R>(&self, read: impl FnOnce(&[u8]) -> R) -> Result<R> {
        let Chunk { record, .. } = self.0;
        let all = 0..record.len();
        let mut piece = record.begin(all.clone(), &Staging::on_host("checkpoint"), "optimizer state")?.wait()?;
        Ok(record.with(all, &mut piece, |bytes, _| read(bytes.bytes())))
    }

    /// Lets `fill` make the record anew; it begins as zero moments.
    pub fn write<R>(&self, fill: impl FnOnce(&mut [u8]) -> R) -> Result<R> {
        let Chunk { record, layout, .. } = self.0;
        let all = 0..record.len();
        let side = Staging::on_host("checkpoint");
        let mut piece = record.blank(all.clone(), &side, "optimizer state")?.wait()?;
        let result = record.with(all.clone(), &mut piece, |bytes, _| {
            layout.initialise(bytes.bytes_mut());
            fill(bytes.bytes_mut())
        });
        record.end(all, piece, &side).map_or(Ok(()), |written| written.wait().map(drop))?;
        Ok(result)
    }
}

/// Memory for pieces that do not rest where the optimizer computes, reserved for as long as it lives.
struct Sides {
    weights: Staging,
    records: Staging,
    grads: Staging,
}

impl Sides {
    fn reserve<'s>(tiers: &Tiers, segments: impl Iterator<Item = &'s Arc<Segment>>) -> Result<Self> {
        let here = tiers.optimizer_states();
        let side = tiers.staging(here.optimizer.clone());
        let of = |segment: &'s Arc<Segment>| segment.chunks.iter().map(|chunk| segment.staged_bytes(chunk, &side));
        let (mut count, mut most) = (0, [0; 3]);
        for staged in segments.flat_map(of) {
            count += 1;
            most = std::array::from_fn(|i| most[i].max(staged[i]));
        }
        let [weights, records, grads] = most.map(|bytes| bytes * IN_FLIGHT.min(count));
        let reserved = |arena: &Arena, bytes, what| arena.reserved(bytes, what).map(|arena| tiers.staging(arena));
        Ok(Sides {
            weights: reserved(&here.parameters, weights, "weights on their way through the optimizer")?,
            records: reserved(&here.optimizer, records, "optimizer state on its way")?,
            grads: reserved(&here.gradients, grads, "gradients on their way to the optimizer")?,
        })
    }
}

impl Segment {
    fn new(tiers: &Tiers, store: &ParamStore, i: usize, grads: OwnedGrads, kind: StateKind, seed: u64) -> Result<Self> {
        let weights = store.owned(i);
        let owned = weights.range();
        let small_from = store.layout(i).small_from;
        let chunk = |range: Range<usize>| {
            let layout = RecordLayout::new(kind, owned.start + range.start, range.len(), small_from);
            let place = tiers.placement.optimizer;
            let record = Rest::allocate(tiers, place, |s| &s.optimizer, DType::U8, layout.bytes(), store.name(i))?;
            let chunk = Chunk { range, layout, record };
            Record(&chunk).write(|_| ())?;
            Ok(chunk)
        };
        let chunks = pieces_of(tiers.optimizer_piece(), owned.len()).map(chunk).collect::<Result<_>>()?;
        Ok(Segment { index: i as u64, weights, grads, chunks, seed })
    }

    /// Bytes of a piece's weights, record and gradients in memory beside where they rest.
    fn staged_bytes(&self, chunk: &Chunk, side: &Staging) -> [usize; 3] {
        let elements = chunk.range.len();
        [
            self.weights.staged_bytes(elements, side),
            chunk.record.staged_bytes(chunk.record.len(), side),
            self.grads.staged_bytes(elements, side),
        ]
    }

    fn rounding(&self, scale: StepScale, chunk: &Chunk) -> StochasticRounding {
        let start = (self.weights.range().start + chunk.range.start) as u64;
        StochasticRounding { seed: self.seed, step: scale.step, bucket: self.index, start }
    }

    /// Computes one piece's update, or launches it.
    fn update(&self, chunk: &Chunk, job: &Job, near: &mut Near, far: Option<&OnAccelerator>) -> Result<()> {
        let Chunk { range, layout, record } = chunk;
        let step = Step { scale: job.scale, group: job.group, layout, rounding: self.rounding(job.scale, chunk) };
        let Near { weights, record: near_record, grads } = near;
        record.with(0..record.len(), near_record, |record, _| {
            self.grads.with(range.clone(), grads, |grads, from| {
                self.weights.change(range.clone(), weights, |weights| match far {
                    Some(far) => far.launch(self.index, &step, record, weights, (grads, from)),
                    None => update_here(&step, record, weights, (grads, from)),
                })
            })
        })??
    }
}

/// A piece where the optimizer computes, for a moment.
struct Near {
    weights: OwnedPiece,
    record: Piece,
    grads: Piece,
}

/// A piece on its way to memory.
struct Reading {
    job: Arc<Job>,
    chunk: usize,
    weights: OwnedComing,
    record: Coming,
    grads: Coming,
}

/// A piece on its way back.
struct Writing {
    job: Arc<Job>,
    last: bool,
    writes: Vec<Pending<Buffer>>,
}

/// The thread's state.
struct Pipeline {
    jobs: Receiver<Job>,
    sides: Sides,
    /// Where kernels do the work.
    far: Option<OnAccelerator>,
    /// Jobs of which pieces are still to be begun, each with the next one.
    waiting: Vec<(Arc<Job>, usize)>,
    reading: VecDeque<Reading>,
    writing: VecDeque<Writing>,
}

impl Pipeline {
    fn new(jobs: Receiver<Job>, sides: Sides, far: Option<OnAccelerator>) -> Self {
        Pipeline { jobs, sides, far, waiting: Vec::new(), reading: VecDeque::new(), writing: VecDeque::new() }
    }

    fn run(mut self) {
        loop {
            while self.reading.len() <= AHEAD
                && let Some((job, chunk)) = self.next_piece()
            {
                self.begin(job, chunk);
            }
            if let Some(reading) = self.reading.pop_front() {
                self.compute(reading);
            }
            let idle = self.reading.is_empty() && self.waiting.is_empty();
            while self.writing.len() > if idle { 0 } else { BEHIND } {
                self.end();
            }
            if idle {
                match self.jobs.recv() {
                    Ok(job) => self.waiting.push((Arc::new(job), 0)),
                    Err(_) => return,
                }
            }
        }
    }

    /// The next piece to begin, without waiting for one: of the segment that the next forward needs first. Gradients
    /// are complete in the order of the backward, so the first segments' come last, and would wait behind all others.
    fn next_piece(&mut self) -> Option<(Arc<Job>, usize)> {
        self.waiting.extend(self.jobs.try_iter().map(|job| (Arc::new(job), 0)));
        let first = (0..self.waiting.len()).min_by_key(|&at| self.waiting[at].0.segment.index)?;
        Some(self.waiting.swap_remove(first))
    }

    fn begin(&mut self, job: Arc<Job>, chunk: usize) {
        let segment = job.segment.clone();
        let Some(part) = segment.chunks.get(chunk) else {
            // An empty shard: done before it began.
            return job.done(Ok(()));
        };
        let begun = || {
            let name = segment.weights.name();
            let weights = segment.weights.begin(part.range.clone(), &self.sides.weights)?;
            let record = part.record.begin(0..part.record.len(), &self.sides.records, name)?;
            Ok((weights, record, segment.grads.begin(part.range.clone(), &self.sides.grads)?))
        };
        match begun() {
            Ok((weights, record, grads)) => {
                self.reading.push_back(Reading { job: job.clone(), chunk, weights, record, grads });
                if chunk + 1 < segment.chunks.len() {
                    self.waiting.push((job, chunk + 1));
                }
            }
            Err(error) => job.done(Err(error)),
        }
    }

    fn compute(&mut self, reading: Reading) {
        let Reading { job, chunk, weights, record, grads } = reading;
        let (segment, part) = (&job.segment, &job.segment.chunks[chunk]);
        let updated = || {
            let mut near = Near { weights: weights.wait()?, record: record.wait()?, grads: grads.wait()? };
            let _span = trace::span(Row::Optimizer, || format!("update {}", segment.weights.name()));
            if let Some(far) = self.far.as_ref().filter(|_| chunk == 0) {
                far.begin(segment.index)?;
            }
            segment.update(part, &job, &mut near, self.far.as_ref())?;
            Ok(near)
        };
        match updated() {
            Ok(Near { weights, record, .. }) => {
                let mut writes = segment.weights.end(part.range.clone(), weights, &self.sides.weights);
                writes.extend(part.record.end(0..part.record.len(), record, &self.sides.records));
                let last = chunk + 1 == segment.chunks.len();
                self.writing.push_back(Writing { job: job.clone(), last, writes });
            }
            Err(error) => job.done(Err(error)),
        }
    }

    /// Waits for the oldest piece that is on its way back.
    fn end(&mut self) {
        let Some(Writing { job, last, writes }) = self.writing.pop_front() else { return };
        let written = writes.into_iter().try_for_each(|write| write.wait_for("piece").map(drop));
        match written {
            Err(error) => job.done(Err(error.context("writing what the optimizer changed"))),
            Ok(()) if last => job.done(self.verdict(&job.segment)),
            Ok(()) => {}
        }
    }

    /// What kernels have to say once they have run.
    fn verdict(&self, segment: &Segment) -> Result<()> {
        match &self.far {
            Some(far) if !far.was_finite(segment.index)? => {
                bail!("a gradient of {} is not finite", segment.weights.name())
            }
            _ => Ok(()),
        }
    }
}

impl Job {
    /// Tells who waits; only the first word counts.
    fn done(&self, result: Result<()>) {
        if let Some(promise) = self.done.lock().unwrap_or_else(|e| e.into_inner()).take() {
            promise.keep(result.with_context(|| format!("updating {}", self.segment.weights.name())));
        }
    }
}

//! Ranks of one machine, as processes or threads, over a [`Window`] of shared memory. Data streams through it in chunks
//! with one meeting each (`meeting.rs`); nothing here allocates in proportion to the data.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Error, Result, bail, ensure};

use super::call::Call;
use super::meeting::Meeting;
use super::process;
use super::reduce::{Summand, copy, sum};
use super::slice::{self, as_bytes, as_bytes_mut, from_bytes, from_bytes_mut};
use super::window::Window;
use super::{Communicator, PeerFailure, Slice, SliceMut};

/// Parts of a staging buffer start on multiples of this many bytes.
const ALIGN: usize = 64;
/// An all_reduce of up to this many bytes is summed by every rank for itself: one meeting instead of two.
const SMALL: usize = 16 << 10;

/// One rank's end of the shared memory.
pub struct Shared {
    window: Arc<Window>,
    rank: usize,
    timeout: Duration,
    turn: Mutex<Turn>,
}

struct Turn {
    /// The last meeting; every rank counts alike.
    meeting: u32,
    /// The last collective's running number.
    sequence: u64,
    /// Why no further collective can run.
    broken: Option<Broken>,
}

enum Broken {
    Peer(PeerFailure),
    Own(String),
}

impl Shared {
    /// Joins as `rank`; others may come later, and whoever waits for them waits at most `timeout`. An error if there is
    /// no such rank or somebody already has its place.
    pub fn join(window: Arc<Window>, rank: usize, timeout: Duration) -> Result<Shared> {
        ensure!(rank < window.world_size(), "rank {rank} in a world of {}", window.world_size());
        ensure!(window.claim(rank), "another process already is rank {rank}");
        let turn = Turn { meeting: 0, sequence: 0, broken: None };
        Ok(Shared { window, rank, timeout, turn: Mutex::new(turn) })
    }

    /// A world whose ranks are threads of this process, for tests; entry r is for the r-th thread.
    pub fn threads(world_size: usize, timeout: Duration) -> Result<Vec<Shared>> {
        let window = Arc::new(Window::create(world_size)?);
        (0..world_size).map(|rank| Shared::join(window.clone(), rank, timeout)).collect()
    }

    /// Runs `body` as the collective `call`, and keeps the order: once one has failed, none follows.
    fn collective(&self, call: Result<Call>, body: impl FnOnce(&mut Meeting) -> Result<()>) -> Result<()> {
        let mut turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
        match &turn.broken {
            Some(Broken::Peer(failure)) => return Err(failure.clone().into()),
            Some(Broken::Own(message)) => bail!("no collective can follow one that failed: {message}"),
            None => {}
        }
        let result = self.attempt(&mut turn, call, body);
        if let Err(error) = &result {
            turn.broken = Some(match error.downcast_ref::<PeerFailure>() {
                Some(failure) => Broken::Peer(failure.clone()),
                None => Broken::Own(format!("{error:#}")),
            });
        }
        result
    }

    fn attempt(
        &self,
        turn: &mut Turn,
        call: Result<Call>,
        body: impl FnOnce(&mut Meeting) -> Result<()>,
    ) -> Result<()> {
        // Wrong arguments keep this rank from joining, so the others must not wait for it.
        let call = call.inspect_err(|error| self.abort(&format!("{error:#}")))?;
        if let Some((rank, message)) = self.window.aborted() {
            ensure!(rank != self.rank, "this rank has given up: {message}");
            return Err(Error::new(PeerFailure { rank, message }));
        }
        turn.sequence += 1;
        let control = self.window.control(self.rank);
        control.seen.store(process::milliseconds(), Ordering::Relaxed);
        control.inside.store(1, Ordering::Relaxed);
        let (window, rank, timeout, sequence) = (&*self.window, self.rank, self.timeout, turn.sequence);
        let mut meeting = Meeting { window, rank, timeout, turn: turn.meeting, sequence, call };
        let result = body(&mut meeting);
        turn.meeting = meeting.turn;
        control.seen.store(process::milliseconds(), Ordering::Relaxed);
        control.inside.store(0, Ordering::Relaxed);
        result
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.window.world_size()).filter(move |&r| r != rank)
    }

    fn reduce_scatter_of<T: Summand>(&self, meeting: &mut Meeting, input: &[T], output: &mut [T]) -> Result<()> {
        let (rank, size, length) = (self.rank, size_of::<T>(), output.len());
        // A buffer holds one part for every other rank: part r at place r, or r - 1 behind this rank's own.
        let part = self.part(self.window.world_size() - 1);
        for chunk in chunks(length, part / size) {
            let staging = meeting.own();
            for r in self.others() {
                let place = if r < rank { r } else { r - 1 } * part;
                let from = &input[r * length..][chunk.clone()];
                copy(as_bytes(from), &mut staging[place..place + chunk.len() * size]);
            }
            meeting.meet()?;
            let sources: Vec<&[T]> = (0..self.window.world_size())
                .map(|r| {
                    let place = if rank < r { rank } else { rank.saturating_sub(1) } * part;
                    if r == rank {
                        &input[rank * length..][chunk.clone()]
                    } else {
                        from_bytes(&meeting.staged(r)[place..place + chunk.len() * size])
                    }
                })
                .collect();
            sum(&sources, &mut output[chunk]);
        }
        Ok(())
    }

    /// Every rank sums everything for itself.
    fn all_reduce_small<T: Summand>(&self, meeting: &mut Meeting, data: &mut [T]) -> Result<()> {
        let bytes = size_of_val(data);
        copy(as_bytes(data), &mut meeting.own()[..bytes]);
        meeting.meet()?;
        let sources: Vec<&[T]> =
            (0..self.window.world_size()).map(|r| from_bytes(&meeting.staged(r)[..bytes])).collect();
        sum(&sources, data);
        Ok(())
    }

    /// Rank r sums the r-th part of every chunk; the sums of one chunk travel with the summands of the next.
    fn all_reduce_large<T: Summand>(&self, meeting: &mut Meeting, data: &mut [T]) -> Result<()> {
        let (rank, world_size, size) = (self.rank, self.window.world_size(), size_of::<T>());
        // A buffer holds a part for every rank; this rank's own place holds its sums of the chunk before.
        let part = self.part(world_size);
        let parts = |chunk: &Range<usize>, r: usize| {
            let start = |r: usize| chunk.end.min(chunk.start + r * (part / size));
            start(r)..start(r + 1)
        };
        let chunks: Vec<_> = chunks(data.len(), world_size * (part / size)).collect();
        for i in 0..=chunks.len() {
            if let Some(chunk) = chunks.get(i) {
                let staging = meeting.own();
                for r in self.others() {
                    let from = &data[parts(chunk, r)];
                    copy(as_bytes(from), &mut staging[r * part..r * part + size_of_val(from)]);
                }
            }
            meeting.meet()?;
            if let Some(chunk) = i.checked_sub(1).map(|before| &chunks[before]) {
                for r in self.others() {
                    let to = &mut data[parts(chunk, r)];
                    copy(&meeting.staged(r)[r * part..r * part + size_of_val(to)], as_bytes_mut(to));
                }
            }
            if let Some(chunk) = chunks.get(i) {
                let (staged, next) = meeting.buffers();
                let mine = &mut data[parts(chunk, rank)];
                let place = rank * part..rank * part + size_of_val(mine);
                let sources: Vec<&[T]> = (0..world_size)
                    .map(|r| if r == rank { &*mine } else { from_bytes(&staged[r][place.clone()]) })
                    .collect();
                sum(&sources, from_bytes_mut(&mut next[place.clone()]));
                copy(&next[place], as_bytes_mut(mine));
            }
        }
        Ok(())
    }

    fn all_reduce_of<T: Summand>(&self, meeting: &mut Meeting, data: &mut [T]) -> Result<()> {
        match size_of_val(data) <= SMALL.min(self.window.buffer()) {
            true => self.all_reduce_small(meeting, data),
            false => self.all_reduce_large(meeting, data),
        }
    }

    /// Bytes of one of `parts` equal parts of a staging buffer.
    fn part(&self, parts: usize) -> usize {
        self.window.buffer() / parts.max(1) / ALIGN * ALIGN
    }
}

/// `length` in pieces of `size`; at least one, if only an empty one, since even then ranks meet.
fn chunks(length: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..length.div_ceil(size).max(1)).map(move |i| i * size..length.min((i + 1) * size))
}

impl Communicator for Shared {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.window.world_size()
    }

    fn all_reduce(&self, data: SliceMut) -> Result<()> {
        self.collective(slice::all_reduce_call(&data), |meeting| match data {
            SliceMut::F32(data) => self.all_reduce_of(meeting, data),
            SliceMut::F64(data) => self.all_reduce_of(meeting, data),
            SliceMut::BF16(data) => self.all_reduce_of(meeting, data),
            SliceMut::F16(data) => self.all_reduce_of(meeting, data),
            SliceMut::U8(_) => bail!("bytes cannot be summed"),
        })
    }

    fn reduce_scatter(&self, input: Slice, output: SliceMut) -> Result<()> {
        let call = slice::reduce_scatter_call(&input, &output, self.world_size());
        self.collective(call, |meeting| match (input, output) {
            (Slice::F32(input), SliceMut::F32(output)) => self.reduce_scatter_of(meeting, input, output),
            (Slice::F64(input), SliceMut::F64(output)) => self.reduce_scatter_of(meeting, input, output),
            (Slice::BF16(input), SliceMut::BF16(output)) => self.reduce_scatter_of(meeting, input, output),
            (Slice::F16(input), SliceMut::F16(output)) => self.reduce_scatter_of(meeting, input, output),
            _ => bail!("bytes cannot be summed"),
        })
    }

    fn all_gather(&self, input: Slice, output: SliceMut) -> Result<()> {
        let call = slice::all_gather_call(&input, &output, self.world_size());
        self.collective(call, |meeting| {
            let (input, output) = (input.bytes(), output.bytes());
            let length = input.len();
            for chunk in chunks(length, self.window.buffer()) {
                copy(&input[chunk.clone()], &mut meeting.own()[..chunk.len()]);
                // Before the meeting, so that this rank works while others are still on their way.
                copy(&input[chunk.clone()], &mut output[self.rank * length..][chunk.clone()]);
                meeting.meet()?;
                for r in self.others() {
                    copy(&meeting.staged(r)[..chunk.len()], &mut output[r * length..][chunk.clone()]);
                }
            }
            Ok(())
        })
    }

    fn broadcast(&self, data: SliceMut, root: usize) -> Result<()> {
        self.collective(slice::broadcast_call(&data, root, self.world_size()), |meeting| {
            let data = data.bytes();
            for chunk in chunks(data.len(), self.window.buffer()) {
                if self.rank == root {
                    copy(&data[chunk.clone()], &mut meeting.own()[..chunk.len()]);
                }
                meeting.meet()?;
                if self.rank != root {
                    copy(&meeting.staged(root)[..chunk.len()], &mut data[chunk]);
                }
            }
            Ok(())
        })
    }

    fn barrier(&self) -> Result<()> {
        self.collective(Ok(Call::barrier()), |meeting| meeting.meet())
    }

    fn abort(&self, message: &str) {
        self.window.abort(self.rank, message);
    }

    fn failed_peer(&self) -> Option<PeerFailure> {
        if let Some((rank, message)) = self.window.aborted() {
            return (rank != self.rank).then_some(PeerFailure { rank, message });
        }
        self.others().find_map(|rank| {
            let control = self.window.control(rank);
            // One that left said so before its process ended.
            let process = control.process().filter(|process| process.pid != std::process::id() && !process.lives())?;
            let left = control.left.load(Ordering::Acquire) == 1;
            (!left).then(|| PeerFailure { rank, message: format!("its process ({}) died", process.pid) })
        })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort("it panicked");
        }
        let control = self.window.control(self.rank);
        control.left.store(1, Ordering::Release);
        process::wake(&control.arrived);
    }
}

#[cfg(test)]
mod tests;

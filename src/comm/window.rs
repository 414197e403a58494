//! The memory that ranks share: one bounded mapping with a header, a control block for every rank, and two staging
//! buffers for every rank. What the fields mean between ranks is the protocol of `meeting.rs` and `shared.rs`.

use std::collections::hash_map::RandomState;
use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use memmap2::{MmapOptions, MmapRaw};

use super::call::Call;
use super::process::{self, Process};

/// A staging buffer, where few ranks share the window: large enough that a barrier costs little, small enough that both
/// of a rank's buffers stay in its cache.
const BUFFER: usize = 512 << 10;
/// All staging together.
const STAGING: usize = 64 << 20;
/// More ranks than this on one machine are a mistake.
pub const MAX_RANKS: usize = 256;
const PAGE: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"dblaun\x00\x01");
const TEXT: usize = 4096 - 40;

/// What concerns all ranks.
#[repr(C)]
struct Header {
    magic: AtomicU64,
    nonce: AtomicU64,
    world_size: AtomicU32,
    buffer: AtomicU32,
    /// 0: all is well; 1: a rank is writing why it gave up; 2: it has written it.
    abort: AtomicU32,
    abort_rank: AtomicU32,
    abort_length: AtomicU32,
    abort_text: [AtomicU8; TEXT],
}

/// What one rank says of itself. `calls` has two entries, used in turn like the staging buffers: what a rank brought to
/// meeting k stays readable until everyone has come to meeting k + 1.
#[repr(C, align(128))]
pub struct Control {
    /// The last meeting this rank came to; also the word that others sleep on.
    pub arrived: AtomicU32,
    /// How many sleep on `arrived`.
    pub sleepers: AtomicU32,
    /// 1 while the rank is inside a collective.
    pub inside: AtomicU32,
    /// 1 once the rank has closed its communicator.
    pub left: AtomicU32,
    /// 0 until the rank has come.
    pub pid: AtomicU32,
    pub started: AtomicU64,
    /// When it last entered or left a collective, by `process::milliseconds`.
    pub seen: AtomicU64,
    calls: [Named; 2],
}

#[repr(C)]
struct Named {
    sequence: AtomicU64,
    call: AtomicU64,
    length: AtomicU64,
}

impl Control {
    /// Writes what this rank brings to meeting `turn`; to be published by storing `arrived`.
    pub fn announce(&self, turn: u32, sequence: u64, call: &Call) {
        let named = &self.calls[turn as usize & 1];
        named.sequence.store(sequence, Ordering::Relaxed);
        named.call.store(call.pack(), Ordering::Relaxed);
        named.length.store(call.length as u64, Ordering::Relaxed);
    }

    /// The call, and its running number, that this rank brought to meeting `turn`.
    pub fn announced(&self, turn: u32) -> (u64, Call) {
        let named = &self.calls[turn as usize & 1];
        let word = named.call.load(Ordering::Relaxed);
        (named.sequence.load(Ordering::Relaxed), Call::unpack(word, named.length.load(Ordering::Relaxed)))
    }

    /// The process of this rank, once it has come.
    pub fn process(&self) -> Option<Process> {
        let pid = self.pid.load(Ordering::Acquire);
        (pid != 0).then(|| Process { pid, started: self.started.load(Ordering::Relaxed) })
    }
}

/// One mapping of the shared memory. Every process has its own; threads of one process share one.
pub struct Window {
    map: MmapRaw,
    file: File,
    world_size: usize,
    buffer: usize,
}

impl Window {
    /// A fresh window for `world_size` ranks (1 to 256), in memory that disappears with the last process that has it.
    /// Its size does not depend on that of /dev/shm: at most 64 MiB of staging, of which only what is used takes memory.
    pub fn create(world_size: usize) -> Result<Window> {
        let file = process::anonymous_file().context("cannot make memory for the ranks to share")?;
        Window::create_in(file, world_size)
    }

    /// As [`Window::create`], in an empty file.
    pub(super) fn create_in(file: File, world_size: usize) -> Result<Window> {
        ensure!((1..=MAX_RANKS).contains(&world_size), "{world_size} ranks; one machine takes 1 to {MAX_RANKS}");
        let buffer = (STAGING / (2 * world_size) / PAGE * PAGE).min(BUFFER);
        file.set_len(total(world_size, buffer) as u64).context("cannot size the ranks' shared memory")?;
        let window = Window { map: map(&file)?, file, world_size, buffer };
        let header = window.header();
        header.world_size.store(world_size as u32, Ordering::Relaxed);
        header.buffer.store(buffer as u32, Ordering::Relaxed);
        // A hasher's keys are the system's random bits; ours needs no more than to differ from other windows'.
        header.nonce.store(RandomState::new().build_hasher().finish(), Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
        Ok(window)
    }

    /// The window in a file that another process made and this one inherited or opened.
    pub fn open(file: impl Into<OwnedFd>) -> Result<Window> {
        let file = File::from(file.into());
        let size = file.metadata().context("cannot look at the ranks' shared memory")?.len() as usize;
        ensure!(size >= total(1, PAGE), "the ranks' shared memory is cut short ({size} bytes)");
        let mut window = Window { map: map(&file)?, file, world_size: 1, buffer: PAGE };
        let header = window.header();
        if header.magic.load(Ordering::Acquire) != MAGIC {
            bail!("the ranks' shared memory is not of this version of dblaunch");
        }
        let (world_size, buffer) = (header.world_size.load(Ordering::Relaxed), header.buffer.load(Ordering::Relaxed));
        (window.world_size, window.buffer) = (world_size as usize, buffer as usize);
        ensure!(
            (1..=MAX_RANKS).contains(&window.world_size) && size == total(window.world_size, window.buffer),
            "the ranks' shared memory is damaged"
        );
        Ok(window)
    }

    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Differs between any two windows.
    pub fn nonce(&self) -> u64 {
        self.header().nonce.load(Ordering::Relaxed)
    }

    /// The file behind it, to be inherited.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of one staging buffer; a multiple of 4096.
    pub(super) fn buffer(&self) -> usize {
        self.buffer
    }

    fn header(&self) -> &Header {
        // SAFETY: the mapping is page-aligned, at least this long, lives as long as `self`, and holds atomics only,
        // for which every bit pattern is valid and which other processes may change.
        unsafe { &*self.map.as_ptr().cast::<Header>() }
    }

    pub(super) fn control(&self, rank: usize) -> &Control {
        assert!(rank < self.world_size);
        // SAFETY: as for the header; the blocks follow it, and `total` left room for `world_size` of them.
        unsafe { &*self.map.as_ptr().add(size_of::<Header>()).cast::<Control>().add(rank) }
    }

    fn staging(&self, rank: usize, turn: u32, range: Range<usize>) -> *mut u8 {
        assert!(rank < self.world_size && range.start <= range.end && range.end <= self.buffer);
        let offset = controls_end(self.world_size) + (2 * rank + (turn as usize & 1)) * self.buffer + range.start;
        // SAFETY: `total` left room for two buffers of every rank.
        unsafe { self.map.as_mut_ptr().add(offset) }
    }

    /// What `rank` brought to meeting `turn`.
    ///
    /// # Safety
    /// Everyone has come to meeting `turn` and this rank not yet to the next, so that nobody writes there.
    pub(super) unsafe fn staged(&self, rank: usize, turn: u32) -> &[u8] {
        // SAFETY: inside the mapping; nobody writes, by the caller's word.
        unsafe { std::slice::from_raw_parts(self.staging(rank, turn, 0..self.buffer), self.buffer) }
    }

    /// Where `rank`, which is this rank, prepares what it will bring to meeting `turn`.
    ///
    /// # Safety
    /// Everyone has come to meeting `turn - 1`, so that nobody still reads what was brought to `turn - 2`; this rank has
    /// not yet come to `turn`; and there is no other reference to this buffer.
    #[allow(clippy::mut_from_ref)] // The memory is shared with other processes; the protocol, not `self`, makes it exclusive.
    pub(super) unsafe fn own(&self, rank: usize, turn: u32) -> &mut [u8] {
        // SAFETY: inside the mapping; nobody else reads or writes, by the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.staging(rank, turn, 0..self.buffer), self.buffer) }
    }

    /// Takes the place of `rank` for this process; false if somebody has it.
    pub(super) fn claim(&self, rank: usize) -> bool {
        let (control, this) = (self.control(rank), Process::this());
        let claimed = control.pid.compare_exchange(0, this.pid, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if claimed {
            control.seen.store(process::milliseconds(), Ordering::Relaxed);
            control.started.store(this.started, Ordering::Release);
        }
        claimed
    }

    /// Whether every rank has come.
    pub(super) fn complete(&self) -> bool {
        (0..self.world_size).all(|rank| self.control(rank).pid.load(Ordering::Acquire) != 0)
    }

    /// Says that `rank` gives up, and why; the first to say so is heard.
    pub(super) fn abort(&self, rank: usize, message: &str) {
        let header = self.header();
        if header.abort.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            let text = &message.as_bytes()[..message.len().min(TEXT)];
            text.iter().zip(&header.abort_text).for_each(|(byte, place)| place.store(*byte, Ordering::Relaxed));
            header.abort_rank.store(rank as u32, Ordering::Relaxed);
            header.abort_length.store(text.len() as u32, Ordering::Relaxed);
            header.abort.store(2, Ordering::Release);
            (0..self.world_size).for_each(|rank| process::wake(&self.control(rank).arrived));
        }
    }

    /// Who gave up, and why.
    pub(super) fn aborted(&self) -> Option<(usize, String)> {
        let header = self.header();
        if header.abort.load(Ordering::Acquire) != 2 {
            return None;
        }
        let length = (header.abort_length.load(Ordering::Relaxed) as usize).min(TEXT);
        let text: Vec<u8> = header.abort_text[..length].iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        Some((header.abort_rank.load(Ordering::Relaxed) as usize, String::from_utf8_lossy(&text).into_owned()))
    }
}

fn map(file: &File) -> Result<MmapRaw> {
    MmapOptions::new().map_raw(file).context("cannot map the ranks' shared memory")
}

/// Where the staging starts.
fn controls_end(world_size: usize) -> usize {
    (size_of::<Header>() + world_size * size_of::<Control>()).next_multiple_of(PAGE)
}

fn total(world_size: usize, buffer: usize) -> usize {
    controls_end(world_size) + 2 * world_size * buffer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_is_bounded_whatever_the_number_of_ranks() {
        for ranks in [1, 2, 3, 7, 64, MAX_RANKS] {
            let window = Window::create(ranks).unwrap();
            assert!(window.buffer() >= PAGE && window.buffer() * 2 * ranks <= STAGING);
            let other = Window::open(window.file().try_clone().unwrap()).unwrap();
            assert_eq!((other.world_size(), other.buffer(), other.nonce()), (ranks, window.buffer(), window.nonce()));
            assert!(other.claim(ranks - 1) && !window.claim(ranks - 1));
        }
        assert!(Window::create(0).is_err() && Window::create(MAX_RANKS + 1).is_err());
    }

    #[test]
    fn another_file_is_no_window() {
        let file = process::anonymous_file().unwrap();
        assert!(Window::open(file.try_clone().unwrap()).is_err());
        file.set_len(1 << 20).unwrap();
        assert!(Window::open(file).is_err());
    }

    #[test]
    fn the_first_to_give_up_is_heard() {
        let window = Window::create(3).unwrap();
        assert_eq!(window.aborted(), None);
        window.abort(2, "no memory");
        window.abort(1, "too late");
        assert_eq!(window.aborted(), Some((2, "no memory".into())));
    }
}

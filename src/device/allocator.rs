//! Memory for activations. A training step frees and takes the same large blocks over and over; asking the system for
//! fresh pages each time costs more than many an op (every page is cleared anew). So large blocks are kept and handed
//! out again; small ones go to the allocator beneath. All are counted (`heap`), as many bytes as were asked for.

use std::alloc::{GlobalAlloc, Layout};
use std::ptr::null_mut;
use std::sync::Mutex;

use super::{dry::is_dry, heap};

/// Blocks of this many bytes and more are ours.
const LARGE: usize = 1 << 20;
/// Eight sizes to every doubling: a block is at most an eighth larger than what was asked for.
const SIZES_PER_DOUBLING: usize = 8;
const SIZES: usize = 27 * SIZES_PER_DOUBLING;

/// Keeps large blocks, over an allocator for the small ones. What is in use and what is kept together stay within
/// five quarters of the most that was ever in use.
pub struct Keeping<A> {
    small: A,
    large: Mutex<Large>,
}

struct Large {
    /// For each size the first free block; a free block's first word is the next one.
    free: [*mut u8; SIZES],
    in_use: usize,
    kept: usize,
    peak: usize,
}

// SAFETY: the pointers are to blocks that nobody else has, and are only followed under the lock.
unsafe impl Send for Large {}

impl<A> Keeping<A> {
    pub const fn over(small: A) -> Self {
        Keeping { small, large: Mutex::new(Large { free: [null_mut(); SIZES], in_use: 0, kept: 0, peak: 0 }) }
    }
}

/// The size class of `bytes` (at least [`LARGE`]), and the bytes of its blocks.
fn class(bytes: usize) -> (usize, usize) {
    let doubling = bytes.ilog2() as usize;
    let step = (1usize << doubling) / SIZES_PER_DOUBLING;
    let rounded = bytes.next_multiple_of(step);
    let doubling = rounded.ilog2() as usize;
    let eighth = (rounded - (1 << doubling)) / ((1 << doubling) / SIZES_PER_DOUBLING);
    ((doubling - LARGE.ilog2() as usize) * SIZES_PER_DOUBLING + eighth, rounded)
}

fn bytes_of(class: usize) -> usize {
    let whole = LARGE << (class / SIZES_PER_DOUBLING);
    whole + class % SIZES_PER_DOUBLING * (whole / SIZES_PER_DOUBLING)
}

impl Large {
    /// A block of this class and whether it is fresh from the system (zeroed), or null.
    fn take(&mut self, class: usize, bytes: usize) -> (*mut u8, bool) {
        self.in_use += bytes;
        self.peak = self.peak.max(self.in_use);
        let block = self.free[class];
        if !block.is_null() {
            // SAFETY: a free block's first word was written by `give`.
            self.free[class] = unsafe { block.cast::<*mut u8>().read() };
            self.kept -= bytes;
            return (block, false);
        }
        self.shrink(self.peak / 4);
        let block = map(bytes);
        if block.is_null() {
            self.in_use -= bytes;
        }
        (block, true)
    }

    fn give(&mut self, block: *mut u8, class: usize, bytes: usize) {
        // A block that was mapped in a dry run was never counted here.
        self.in_use = self.in_use.saturating_sub(bytes);
        self.kept += bytes;
        // SAFETY: the block is ours again, page-aligned and larger than a pointer.
        unsafe { block.cast::<*mut u8>().write(self.free[class]) };
        self.free[class] = block;
        self.shrink(self.peak / 4);
    }

    /// Gives kept blocks back to the system, the largest first, until use and keep are within `slack` of the peak.
    fn shrink(&mut self, slack: usize) {
        let mut class = SIZES;
        while self.in_use + self.kept > self.peak + slack && class > 0 {
            class -= 1;
            while !self.free[class].is_null() && self.in_use + self.kept > self.peak + slack {
                let block = self.free[class];
                // SAFETY: as in `take`; the block was mapped with its class's size.
                unsafe {
                    self.free[class] = block.cast::<*mut u8>().read();
                    libc::munmap(block.cast(), bytes_of(class));
                }
                self.kept -= bytes_of(class);
            }
        }
    }
}

/// Fresh zeroed pages, huge ones where the system has them; null if there are none left.
fn map(bytes: usize) -> *mut u8 {
    // SAFETY: an anonymous private mapping touches no existing memory.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let block = libc::mmap(null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if block == libc::MAP_FAILED {
            return null_mut();
        }
        #[cfg(target_os = "linux")]
        libc::madvise(block, bytes, libc::MADV_HUGEPAGE);
        block.cast()
    }
}

fn is_large(layout: Layout) -> bool {
    layout.size() >= LARGE && layout.size() < bytes_of(SIZES - SIZES_PER_DOUBLING) && layout.align() <= 4096
}

// SAFETY: large blocks are mapped memory of at least the layout's size, aligned to pages, each handed out once until it
// is given back; which of the two allocators a block belongs to depends on its layout alone.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Keeping<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        heap::taken(layout.size());
        if !is_large(layout) {
            // SAFETY: the caller's promise.
            return unsafe { self.small.alloc(layout) };
        }
        let (class, bytes) = class(layout.size());
        if is_dry() {
            return map(bytes);
        }
        self.large.lock().unwrap_or_else(|e| e.into_inner()).take(class, bytes).0
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        heap::taken(layout.size());
        if !is_large(layout) {
            // SAFETY: the caller's promise.
            return unsafe { self.small.alloc_zeroed(layout) };
        }
        let (class, bytes) = class(layout.size());
        if is_dry() {
            return map(bytes);
        }
        let (block, fresh) = self.large.lock().unwrap_or_else(|e| e.into_inner()).take(class, bytes);
        if !fresh && !block.is_null() {
            // SAFETY: the block has at least the layout's size.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        heap::given(layout.size());
        if !is_large(layout) {
            // SAFETY: the caller's promise.
            return unsafe { self.small.dealloc(block, layout) };
        }
        let (class, bytes) = class(layout.size());
        if is_dry() {
            // Never touched, mostly: keeping it would touch it.
            // SAFETY: the block was mapped with its class's size, and is nobody's any more.
            unsafe { libc::munmap(block.cast(), bytes) };
            return;
        }
        self.large.lock().unwrap_or_else(|e| e.into_inner()).give(block, class, bytes);
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller promises that this layout is valid.
        let new = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        match (is_large(layout), is_large(new)) {
            (false, false) => {
                // SAFETY: the caller's promise.
                let moved = unsafe { self.small.realloc(block, layout, new_size) };
                if !moved.is_null() {
                    heap::taken(new_size);
                    heap::given(layout.size());
                }
                moved
            }
            (true, true) if class(layout.size()) == class(new_size) => {
                heap::taken(new_size);
                heap::given(layout.size());
                block
            }
            // SAFETY: a new block, the common part copied, and the old one given back once.
            _ => unsafe {
                let moved = self.alloc(new);
                if !moved.is_null() {
                    moved.copy_from_nonoverlapping(block, layout.size().min(new_size));
                    self.dealloc(block, layout);
                }
                moved
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::alloc::System;

    #[test]
    fn classes_are_near_and_invertible() {
        for bytes in [LARGE, LARGE + 1, 3 << 20, (1 << 25) - 1, 41_943_040, (1 << 33) + 5] {
            let (class, rounded) = class(bytes);
            assert_eq!(bytes_of(class), rounded);
            assert!(rounded >= bytes && rounded <= bytes + bytes / 8 + 1, "{bytes} {rounded}");
        }
    }

    #[test]
    fn blocks_come_back_zeroed_and_grow_with_their_contents() {
        let allocator = Keeping::over(System);
        let layout = Layout::from_size_align(2 << 20, 64).unwrap();
        // SAFETY: every block is used within its layout and given back once.
        unsafe {
            let first = allocator.alloc(layout);
            first.write_bytes(7, layout.size());
            allocator.dealloc(first, layout);
            let second = allocator.alloc_zeroed(layout);
            assert_eq!(second, first);
            assert!(std::slice::from_raw_parts(second, layout.size()).iter().all(|&b| b == 0));
            second.write(9);
            let grown = allocator.realloc(second, layout, 5 << 20);
            assert_eq!(grown.read(), 9);
            let small = allocator.realloc(grown, Layout::from_size_align(5 << 20, 64).unwrap(), 100);
            assert_eq!(small.read(), 9);
            allocator.dealloc(small, Layout::from_size_align(100, 64).unwrap());
        }
        let large = allocator.large.lock().unwrap();
        assert_eq!(large.in_use, 0);
        assert!(large.kept <= large.peak + large.peak / 4);
    }
}

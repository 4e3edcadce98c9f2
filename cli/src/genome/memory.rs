//! Bytes that each rank holds, counted by the program's allocator: it writes in front of every piece which rank's thread
//! asked for it, so that a piece counts for that rank until it is freed, on whatever thread.
//!
//! Pieces that no rank asked for, all those of other commands, are not counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Ranks of a process that are counted.
pub(super) const MAX_RANKS: usize = 64;
/// Bytes in front of a piece, at least: its owner, and alignment for anything.
const HEADER_BYTES: usize = 16;

static LIVE: [AtomicUsize; MAX_RANKS + 1] = [const { AtomicUsize::new(0) }; MAX_RANKS + 1];
static PEAK: [AtomicUsize; MAX_RANKS + 1] = [const { AtomicUsize::new(0) }; MAX_RANKS + 1];

thread_local! {
    /// 0, or a rank plus 1.
    static OWNER: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The system's allocator, with an owner in front of every piece.
struct Counting;

/// From now on, what this thread allocates is that rank's.
pub(super) fn enter(rank: usize) {
    OWNER.set(if rank < MAX_RANKS { rank + 1 } else { 0 });
}

/// Bytes a rank holds from a moment on, beyond those that it held then.
#[derive(Debug)]
pub(super) struct Growth {
    rank: usize,
    before: usize,
}

impl Growth {
    /// From now on.
    pub(super) fn of(rank: usize) -> Self {
        let before = LIVE[rank + 1].load(Ordering::Relaxed);
        PEAK[rank + 1].store(before, Ordering::Relaxed);
        Self { rank, before }
    }

    /// Those that there are now.
    pub(super) fn bytes(&self) -> usize {
        LIVE[self.rank + 1].load(Ordering::Relaxed).saturating_sub(self.before)
    }

    /// The most there were at a time, until now.
    pub(super) fn peak_bytes(&self) -> usize {
        PEAK[self.rank + 1].load(Ordering::Relaxed).saturating_sub(self.before)
    }
}

/// Room for the owner and the piece, and where the piece begins.
fn with_header(layout: Layout) -> Option<(Layout, usize)> {
    let offset = layout.align().max(HEADER_BYTES);
    let size = layout.size().checked_add(offset)?;
    Some((Layout::from_size_align(size, offset).ok()?, offset))
}

fn add(owner: usize, bytes: usize) {
    if owner != 0 {
        let live = LIVE[owner].fetch_add(bytes, Ordering::Relaxed) + bytes;
        PEAK[owner].fetch_max(live, Ordering::Relaxed);
    }
}

fn subtract(owner: usize, bytes: usize) {
    if owner != 0 {
        LIVE[owner].fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Writes the owner of a new piece, and counts it; null stays null.
///
/// # Safety
/// `base` is null, or begins memory of `bytes` and `offset`, which is a multiple of [`HEADER_BYTES`], as is the address.
unsafe fn begin(base: *mut u8, offset: usize, bytes: usize) -> *mut u8 {
    if base.is_null() {
        return base;
    }
    let owner = OWNER.try_with(Cell::get).unwrap_or(0);
    // SAFETY: the header is part of the memory.
    let piece = unsafe { base.add(offset) };
    // SAFETY: 16 bytes before the piece belong to its header and are aligned for usize.
    unsafe { piece.sub(HEADER_BYTES).cast::<usize>().write(owner) };
    add(owner, bytes);
    piece
}

/// The owner of a piece.
///
/// # Safety
/// `piece` came from [`begin`] and was not freed.
unsafe fn owner_of(piece: *mut u8) -> usize {
    // SAFETY: `begin` wrote it there.
    unsafe { piece.sub(HEADER_BYTES).cast::<usize>().read() }
}

// SAFETY: memory comes from the system's allocator with room for the header; a piece begins `offset` behind it, which is a
// multiple of the alignment asked for; the same layout gives the same offset when the piece is changed or freed.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some((whole, offset)) = with_header(layout) else { return std::ptr::null_mut() };
        // SAFETY: the size is not 0.
        let base = unsafe { System.alloc(whole) };
        // SAFETY: memory of that layout, or null.
        unsafe { begin(base, offset, layout.size()) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let Some((whole, offset)) = with_header(layout) else { return std::ptr::null_mut() };
        // SAFETY: the size is not 0.
        let base = unsafe { System.alloc_zeroed(whole) };
        // SAFETY: memory of that layout, or null.
        unsafe { begin(base, offset, layout.size()) }
    }

    unsafe fn dealloc(&self, piece: *mut u8, layout: Layout) {
        let Some((whole, offset)) = with_header(layout) else { return };
        // SAFETY: the caller's piece is one of this allocator's.
        let owner = unsafe { owner_of(piece) };
        subtract(owner, layout.size());
        // SAFETY: where its memory begins.
        let base = unsafe { piece.sub(offset) };
        // SAFETY: allocated with this layout.
        unsafe { System.dealloc(base, whole) };
    }

    unsafe fn realloc(&self, piece: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Some((whole, offset)) = with_header(layout) else { return std::ptr::null_mut() };
        let Some(new_size) = size.checked_add(offset) else { return std::ptr::null_mut() };
        // SAFETY: the caller's piece is one of this allocator's.
        let owner = unsafe { owner_of(piece) };
        // SAFETY: where its memory begins.
        let base = unsafe { piece.sub(offset) };
        // SAFETY: allocated with this layout; the new size is not 0.
        let base = unsafe { System.realloc(base, whole, new_size) };
        if base.is_null() {
            return base;
        }
        subtract(owner, layout.size());
        add(owner, size);
        // SAFETY: the header came along, owner included.
        unsafe { base.add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_counts_for_who_asked_until_it_is_freed_by_anyone() {
        const BYTES: usize = 1 << 20;
        let rank = MAX_RANKS - 1;
        let (growth, kept) = std::thread::spawn(move || {
            enter(rank);
            let growth = Growth::of(rank);
            let mut kept = vec![1_u8; BYTES];
            kept.reserve_exact(BYTES);
            drop(vec![0_u64; BYTES / 8]);
            (growth, kept)
        })
        .join()
        .unwrap();
        let peak = growth.peak_bytes();
        assert!((3 * BYTES..3 * BYTES + BYTES / 2).contains(&peak), "{peak}");
        drop(vec![0_u8; 8 * BYTES]);
        assert_eq!(growth.peak_bytes(), peak, "no rank's");
        assert!((2 * BYTES..2 * BYTES + BYTES / 2).contains(&growth.bytes()), "{growth:?}");
        drop(kept);
        assert!(growth.bytes() < BYTES / 2, "{growth:?}");
    }

    #[test]
    fn pieces_are_aligned_and_zero() {
        for align in [1, 8, 64, 4096] {
            let layout = Layout::from_size_align(100, align).unwrap();
            // SAFETY: the size is not 0.
            let piece = unsafe { Counting.alloc_zeroed(layout) };
            assert_eq!(piece.addr() % align, 0);
            // SAFETY: a piece of 100 bytes.
            assert!(unsafe { std::slice::from_raw_parts(piece, 100) }.iter().all(|&byte| byte == 0));
            // SAFETY: from this allocator, with this layout.
            unsafe { Counting.dealloc(piece, layout) };
        }
    }
}

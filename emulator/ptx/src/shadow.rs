//! Who touched a byte last: the evidence for races between the threads of a block and between the blocks of a launch.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::fault::{Access, FaultKind, OtherBlock};

const THREAD_BITS: u32 = 10;
const ATOMIC: u32 = 1 << THREAD_BITS;
const TIME_SHIFT: u32 = THREAD_BITS + 1;
/// Synchronisations of a block after which its shadow starts anew.
pub(crate) const LAST_TIME: u32 = (1 << (32 - TIME_SHIFT)) - 1;

/// One touch of a byte: the time (synchronisations of the block so far), whether it was atomic, and the thread.
fn touch(time: u32, thread: u32, atomic: bool) -> u32 {
    time << TIME_SHIFT | if atomic { ATOMIC } else { 0 } | thread
}

fn thread_of(touch: u32) -> u32 {
    touch & (ATOMIC - 1)
}

/// What one warp knows of the others: touches of warp `w` before time `seen[w]` happened before its next access.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) by_warp: Vec<u32>,
    /// The least of them: whatever is older needs no closer look.
    floor: u32,
}

impl Seen {
    pub(crate) fn new(warps: usize, time: u32) -> Self {
        Self { by_warp: vec![time; warps], floor: time }
    }

    pub(crate) fn update(&mut self) {
        self.floor = self.by_warp.iter().copied().min().unwrap_or(0);
    }

    fn orders(&self, touch: u32) -> bool {
        self.by_warp[(thread_of(touch) / 32) as usize] > touch >> TIME_SHIFT
    }
}

/// The last write and two reads of every byte of shared memory.
///
/// Two readers suffice: between barriers of the whole block any two different ones clash with every other thread's
/// write. Where named barriers join only some warps, a third reader may go unseen.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedShadow {
    writes: Vec<u32>,
    reads: Vec<u32>,
    other_reads: Vec<u32>,
}

/// A clash, at an offset from the start of the access.
pub(crate) struct Clash {
    pub(crate) at: usize,
    pub(crate) earlier: Access,
    pub(crate) other: u32,
}

impl SharedShadow {
    pub(crate) fn resize(&mut self, bytes: usize) {
        self.writes.resize(bytes, 0);
        self.reads.resize(bytes, 0);
        self.other_reads.resize(bytes, 0);
    }

    pub(crate) fn clear(&mut self) {
        self.writes.fill(0);
        self.reads.fill(0);
        self.other_reads.fill(0);
    }

    #[inline]
    fn clash(touches: &[u32], mine: u32, seen: &Seen) -> Option<Clash> {
        let floor = seen.floor << TIME_SHIFT;
        if touches.iter().all(|&t| t < floor) {
            return None;
        }
        let mut passed = 0;
        for (at, &touch) in touches.iter().enumerate() {
            if touch == passed || touch < floor {
                continue;
            }
            let both_atomic = touch & mine & ATOMIC != 0;
            if !both_atomic && thread_of(touch) != thread_of(mine) && !seen.orders(touch) {
                let earlier = if touch & ATOMIC != 0 { Access::Atomic } else { Access::Write };
                return Some(Clash { at, earlier, other: thread_of(touch) });
            }
            passed = touch;
        }
        None
    }

    /// Notes a read of `bytes` from `start`.
    #[inline]
    pub(crate) fn read(
        &mut self,
        start: usize,
        bytes: usize,
        thread: u32,
        time: u32,
        seen: &Seen,
    ) -> Result<(), Clash> {
        let mine = touch(time, thread, false);
        if let Some(clash) = Self::clash(&self.writes[start..start + bytes], mine, seen) {
            return Err(clash);
        }
        let floor = seen.floor << TIME_SHIFT;
        let reads = &mut self.reads[start..start + bytes];
        let others = &mut self.other_reads[start..start + bytes];
        for (read, other) in reads.iter_mut().zip(others) {
            let first = *read < floor || thread_of(*read) == thread;
            let second = *other < floor || thread_of(*other) == thread;
            *read = if first { mine } else { *read };
            *other = if !first && second { mine } else { *other };
        }
        Ok(())
    }

    /// Notes a write of `bytes` from `start`.
    #[inline]
    pub(crate) fn write(
        &mut self,
        start: usize,
        bytes: usize,
        writer: (u32, bool),
        time: u32,
        seen: &Seen,
    ) -> Result<(), Clash> {
        let (thread, atomic) = writer;
        let mine = touch(time, thread, atomic);
        if let Some(clash) = Self::clash(&self.writes[start..start + bytes], mine, seen) {
            return Err(clash);
        }
        for reads in [&self.reads, &self.other_reads] {
            if let Some(clash) = Self::clash(&reads[start..start + bytes], touch(time, thread, false), seen) {
                return Err(Clash { earlier: Access::Read, ..clash });
            }
        }
        self.writes[start..start + bytes].fill(mine);
        Ok(())
    }
}

/// Which block of a launch wrote and read every byte of an allocation.
#[derive(Debug)]
pub(crate) struct LaunchShadow {
    writers: Box<[AtomicU32]>,
    readers: Box<[AtomicU32]>,
}

/// Marks of a byte: 0 nobody, else block + 1; with this bit set, so far by atomic operations alone.
const ATOMICALLY: u32 = 1 << 31;
const SEVERAL: u32 = u32::MAX >> 1;
/// Atomic operations of several blocks.
const SEVERAL_ATOMICALLY: u32 = ATOMICALLY | SEVERAL;
/// Blocks that a launch may have so that their marks stay apart from `SEVERAL`.
pub(crate) const MOST_BLOCKS: u64 = (SEVERAL - 2) as u64;

impl LaunchShadow {
    pub(crate) fn new(bytes: u64) -> Option<Self> {
        let bytes = usize::try_from(bytes).ok()?;
        let zeroed = || bytemuck::allocation::try_zeroed_slice_box(bytes).ok();
        Some(Self { writers: zeroed()?, readers: zeroed()? })
    }

    /// Notes a read of one byte by a block.
    #[inline]
    fn read_byte(&self, at: usize, mark: u32) -> Result<(), u32> {
        let reader = &self.readers[at];
        let old = reader.load(Ordering::Relaxed);
        if old != mark && old != SEVERAL {
            let new = if old == 0 { mark } else { SEVERAL };
            // Sequentially consistent, as is the writer's mark: of a read and a write at once, one sees the other.
            if reader.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_err() {
                reader.store(SEVERAL, Ordering::SeqCst);
            }
        }
        let writer = self.writers[at].load(Ordering::SeqCst);
        if writer == 0 || writer & !ATOMICALLY == mark { Ok(()) } else { Err(writer) }
    }

    #[inline]
    fn write_byte(&self, at: usize, mark: u32) -> Result<(), (Access, u32)> {
        let writer = &self.writers[at];
        let old = writer.load(Ordering::Relaxed);
        if old != mark {
            let mine = old == 0 || old == mark | ATOMICALLY;
            if !mine {
                return Err((Access::Write, old));
            }
            writer
                .compare_exchange(old, mark, Ordering::SeqCst, Ordering::SeqCst)
                .map_err(|now| (Access::Write, now))?;
        }
        let reader = self.readers[at].load(Ordering::SeqCst);
        if reader == 0 || reader == mark { Ok(()) } else { Err((Access::Read, reader)) }
    }

    #[inline]
    pub(crate) fn read(&self, offset: u64, bytes: u32, block: u32) -> Result<(), (u32, FaultKind)> {
        for byte in 0..bytes {
            let at = offset as usize + byte as usize;
            if let Err(writer) = self.read_byte(at, block + 1) {
                return Err((byte, race(Access::Read, Access::Write, writer)));
            }
        }
        Ok(())
    }

    #[inline]
    pub(crate) fn write(&self, offset: u64, bytes: u32, block: u32) -> Result<(), (u32, FaultKind)> {
        for byte in 0..bytes {
            let at = offset as usize + byte as usize;
            if let Err((earlier, other)) = self.write_byte(at, block + 1) {
                return Err((byte, race(Access::Write, earlier, other)));
            }
        }
        Ok(())
    }

    /// Notes an atomic access, which may meet atomic accesses of other blocks.
    pub(crate) fn atomic(&self, offset: u64, bytes: u32, block: u32) -> Result<(), (u32, FaultKind)> {
        for byte in 0..bytes {
            let at = offset as usize + byte as usize;
            let mark = block + 1;
            // A block's own plain writes stay the stronger mark.
            let update = |old: u32| match old {
                0 => Some(mark | ATOMICALLY),
                old if old & !ATOMICALLY == mark => Some(old),
                old if old & ATOMICALLY != 0 => Some(SEVERAL_ATOMICALLY),
                _ => None,
            };
            if let Err(old) = self.writers[at].fetch_update(Ordering::SeqCst, Ordering::SeqCst, update) {
                return Err((byte, race(Access::Atomic, Access::Write, old)));
            }
            let reader = self.readers[at].load(Ordering::SeqCst);
            if reader != 0 && reader != block + 1 {
                return Err((byte, race(Access::Atomic, Access::Read, reader)));
            }
        }
        Ok(())
    }
}

fn race(access: Access, earlier: Access, mark: u32) -> FaultKind {
    let earlier = if mark & ATOMICALLY == 0 { earlier } else { Access::Atomic };
    let other = match mark & !ATOMICALLY {
        SEVERAL => OtherBlock::Several,
        block => OtherBlock::Block(block - 1),
    };
    // The caller knows the address.
    FaultKind::GlobalRace { address: 0, access, earlier, other }
}

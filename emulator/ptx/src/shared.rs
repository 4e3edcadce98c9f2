//! Shared memory of one block: bytes, their state, and who touched them.

use crate::fault::{Access, FaultKind};
use crate::layout::START;
use crate::shadow::{Clash, LAST_TIME, Seen, SharedShadow};

/// State of a byte; `GUARD` lies between variables and belongs to none.
const UNSET: u8 = 0;
const SET: u8 = 1;
const PENDING: u8 = 2;
const GUARD: u8 = 3;

const SPACE: &str = "shared";

#[derive(Clone, Debug)]
pub(crate) struct Shared {
    bytes: Vec<u8>,
    states: Vec<u8>,
    /// States at the start of a block.
    fresh: Vec<u8>,
    shadow: SharedShadow,
    /// Synchronisations so far: the clock of races. It runs on from block to block, so that old touches are old.
    pub(crate) time: u32,
}

/// The thread of an access and what its warp knows of the others.
#[derive(Clone, Copy)]
pub(crate) struct Actor<'a> {
    pub(crate) thread: u32,
    pub(crate) seen: &'a Seen,
}

impl Shared {
    /// Memory with the given variables, and dynamic memory from `dynamic.0` on.
    pub(crate) fn new(ranges: &[(u64, u64)], dynamic: (u64, u64)) -> Self {
        let end = ranges.iter().chain([&dynamic]).map(|&(start, bytes)| start + bytes).max().unwrap_or(START);
        let length = (end - START) as usize;
        let mut fresh = vec![GUARD; length];
        for &(start, bytes) in ranges.iter().chain([&dynamic]) {
            let start = (start - START) as usize;
            fresh[start..start + bytes as usize].fill(UNSET);
        }
        let mut shadow = SharedShadow::default();
        shadow.resize(length);
        Self { bytes: vec![0; length], states: fresh.clone(), fresh, shadow, time: 1 }
    }

    /// Starts a new block.
    pub(crate) fn reset(&mut self) {
        self.states.copy_from_slice(&self.fresh);
        self.advance();
    }

    /// Another synchronisation has happened; gives the new time.
    pub(crate) fn advance(&mut self) -> u32 {
        if self.time == LAST_TIME {
            // Starts anew and forgets: a race across this one moment may go unseen, none is made up.
            self.shadow.clear();
            self.time = 0;
        }
        self.time += 1;
        self.time
    }

    #[inline]
    fn locate(&self, address: u64, bytes: u32) -> Result<usize, FaultKind> {
        if !address.is_multiple_of(u64::from(bytes)) {
            return Err(FaultKind::Misaligned { space: SPACE, address, bytes });
        }
        let outside = |detail: String| Err(FaultKind::OutOfBounds { space: SPACE, address, bytes, detail });
        let start = address.wrapping_sub(START);
        if start >= self.bytes.len() as u64 || self.bytes.len() as u64 - start < u64::from(bytes) {
            return outside(format!("shared memory lies from {START:#x} to {:#x}", START + self.bytes.len() as u64));
        }
        let start = start as usize;
        if self.states[start..start + bytes as usize].contains(&GUARD) {
            return outside("between two variables".to_owned());
        }
        Ok(start)
    }

    #[inline]
    pub(crate) fn read(&mut self, address: u64, bytes: u32, actor: Actor<'_>) -> Result<u128, FaultKind> {
        let start = self.locate(address, bytes)?;
        let range = start..start + bytes as usize;
        if self.states[range.clone()].iter().any(|&state| state != SET) {
            return Err(self.unreadable(address, bytes, start));
        }
        let noted = self.shadow.read(start, bytes as usize, actor.thread, self.time, actor.seen);
        noted.map_err(|clash| race(address, Access::Read, &clash))?;
        let mut value = [0; 16];
        value[..bytes as usize].copy_from_slice(&self.bytes[range]);
        Ok(u128::from_le_bytes(value))
    }

    fn unreadable(&self, address: u64, bytes: u32, start: usize) -> FaultKind {
        match self.states[start..start + bytes as usize].iter().position(|&state| state == PENDING) {
            Some(at) => FaultKind::PendingCopy { address: address + at as u64 },
            None => FaultKind::Uninitialised { space: SPACE, address, bytes },
        }
    }

    #[inline]
    fn claim(
        &mut self,
        address: u64,
        bytes: u32,
        actor: Actor<'_>,
        access: Access,
    ) -> Result<std::ops::Range<usize>, FaultKind> {
        let start = self.locate(address, bytes)?;
        let range = start..start + bytes as usize;
        if let Some(at) = self.states[range.clone()].iter().position(|&state| state == PENDING) {
            return Err(FaultKind::PendingCopy { address: address + at as u64 });
        }
        let writer = (actor.thread, access == Access::Atomic);
        let noted = self.shadow.write(start, bytes as usize, writer, self.time, actor.seen);
        noted.map_err(|clash| race(address, access, &clash))?;
        Ok(range)
    }

    #[inline]
    pub(crate) fn write(&mut self, address: u64, bytes: u32, value: u128, actor: Actor<'_>) -> Result<(), FaultKind> {
        let range = self.claim(address, bytes, actor, Access::Write)?;
        self.bytes[range.clone()].copy_from_slice(&value.to_le_bytes()[..bytes as usize]);
        self.states[range].fill(SET);
        Ok(())
    }

    pub(crate) fn update(
        &mut self,
        address: u64,
        bytes: u32,
        actor: Actor<'_>,
        f: impl Fn(u64) -> u64,
    ) -> Result<u64, FaultKind> {
        let range = self.claim(address, bytes, actor, Access::Atomic)?;
        if self.states[range.clone()].iter().any(|&state| state != SET) {
            return Err(FaultKind::Uninitialised { space: SPACE, address, bytes });
        }
        let mut old = [0; 8];
        old[..bytes as usize].copy_from_slice(&self.bytes[range.clone()]);
        let old = u64::from_le_bytes(old);
        self.bytes[range].copy_from_slice(&f(old).to_le_bytes()[..bytes as usize]);
        Ok(old)
    }

    /// Starts an asynchronous copy into these bytes: nobody may touch them until `arrive`.
    pub(crate) fn start_copy(&mut self, address: u64, bytes: u32, actor: Actor<'_>) -> Result<(), FaultKind> {
        let range = self.claim(address, bytes, actor, Access::Write)?;
        self.states[range].fill(PENDING);
        Ok(())
    }

    /// The copy has been waited for: its bytes are now as if its thread had just written them.
    pub(crate) fn arrive(&mut self, address: u64, bytes: u32, value: u128, actor: Actor<'_>) -> Result<(), FaultKind> {
        let start = self.locate(address, bytes)?;
        self.states[start..start + bytes as usize].fill(SET);
        self.write(address, bytes, value, actor)
    }
}

fn race(address: u64, access: Access, clash: &Clash) -> FaultKind {
    FaultKind::SharedRace { address: address + clash.at as u64, access, earlier: clash.earlier, other: clash.other }
}

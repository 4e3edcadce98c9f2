//! Global memory as one launch sees it: the allocations there at its start, with the marks of its blocks.

use std::sync::{Arc, OnceLock};

use crate::fault::FaultKind;
use crate::memory::{Allocation, Slot, describe, slot_of};
use crate::shadow::LaunchShadow;

#[derive(Debug)]
struct Mapped {
    allocation: Arc<Allocation>,
    shadow: OnceLock<LaunchShadow>,
}

#[derive(Debug)]
pub(crate) struct Global {
    mapped: Vec<Option<Mapped>>,
    slots: Vec<Slot>,
}

const SPACE: &str = "global";

impl Global {
    pub(crate) fn new(slots: Vec<Slot>) -> Self {
        let mapped = slots.iter().map(|slot| match slot {
            Slot::Live(allocation) => Some(Mapped { allocation: Arc::clone(allocation), shadow: OnceLock::new() }),
            Slot::Freed { .. } => None,
        });
        Self { mapped: mapped.collect(), slots }
    }

    #[inline]
    fn locate(&self, address: u64, bytes: u32) -> Result<(&Mapped, u64), FaultKind> {
        if !address.is_multiple_of(u64::from(bytes)) {
            return Err(FaultKind::Misaligned { space: SPACE, address, bytes });
        }
        if let Some(Some(mapped)) = slot_of(address).and_then(|index| self.mapped.get(index)) {
            // Below the base the difference wraps to more than any allocation has.
            let offset = address.wrapping_sub(mapped.allocation.base);
            if offset < mapped.allocation.bytes && u64::from(bytes) <= mapped.allocation.bytes - offset {
                return Ok((mapped, offset));
            }
        }
        let detail = describe(&self.slots, address, u64::from(bytes));
        Err(FaultKind::OutOfBounds { space: SPACE, address, bytes, detail })
    }

    fn shadow(mapped: &Mapped) -> Result<&LaunchShadow, FaultKind> {
        if let Some(shadow) = mapped.shadow.get() {
            return Ok(shadow);
        }
        let Some(shadow) = LaunchShadow::new(mapped.allocation.bytes) else {
            let what = format!("no host memory to follow {} bytes of global memory", mapped.allocation.bytes);
            return Err(FaultKind::Launch { what });
        };
        Ok(mapped.shadow.get_or_init(|| shadow))
    }

    pub(crate) fn read(&self, address: u64, bytes: u32, block: u32, strong: bool) -> Result<u128, FaultKind> {
        let (mapped, offset) = self.locate(address, bytes)?;
        let value = mapped.allocation.load(offset, bytes);
        let value = value.ok_or(FaultKind::Uninitialised { space: SPACE, address, bytes })?;
        let shadow = Self::shadow(mapped)?;
        let noted = if strong { shadow.atomic(offset, bytes, block) } else { shadow.read(offset, bytes, block) };
        noted.map_err(|clash| at(address, clash))?;
        Ok(value)
    }

    pub(crate) fn write(
        &self,
        address: u64,
        bytes: u32,
        value: u128,
        block: u32,
        strong: bool,
    ) -> Result<(), FaultKind> {
        let (mapped, offset) = self.locate(address, bytes)?;
        let shadow = Self::shadow(mapped)?;
        let noted = if strong { shadow.atomic(offset, bytes, block) } else { shadow.write(offset, bytes, block) };
        noted.map_err(|clash| at(address, clash))?;
        mapped.allocation.store(offset, bytes, value);
        Ok(())
    }

    /// An atomic operation; gives the old value.
    pub(crate) fn update(
        &self,
        address: u64,
        bytes: u32,
        block: u32,
        f: impl Fn(u64) -> u64,
    ) -> Result<u64, FaultKind> {
        let (mapped, offset) = self.locate(address, bytes)?;
        Self::shadow(mapped)?.atomic(offset, bytes, block).map_err(|clash| at(address, clash))?;
        let old = mapped.allocation.update(offset, bytes, f);
        old.ok_or(FaultKind::Uninitialised { space: SPACE, address, bytes })
    }
}

fn at(address: u64, (byte, kind): (u32, FaultKind)) -> FaultKind {
    match kind {
        FaultKind::GlobalRace { access, earlier, other, .. } => {
            FaultKind::GlobalRace { address: address + u64::from(byte), access, earlier, other }
        }
        other => other,
    }
}

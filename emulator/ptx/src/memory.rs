//! The device's global memory: allocations far apart, with every byte's state known.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::layout::WINDOWS_END;
use crate::module::Module;
use crate::syntax::StateSpace;

/// Address where slot 0 starts.
const BASE: u64 = 1 << 40;
/// Every allocation has a slot of 64 GiB of addresses to itself and lies in its middle, so that an offset that has
/// lost its upper half, or its sign, misses every allocation.
const SLOT_BITS: u32 = 36;
/// CUDA promises 256 bytes of alignment and no more: neither do the addresses here.
const START_IN_SLOT: u64 = (1 << (SLOT_BITS - 1)) + 256;
const LARGEST: u64 = 1 << (SLOT_BITS - 2);
/// Freed slots that wait before their addresses are given out again.
const QUARANTINE: usize = 4096;
/// Slots between the first ones of two devices: what one has in quarantine and as many live allocations.
const DEVICE_SLOTS: usize = 4 * QUARANTINE;

const _: () = assert!(BASE >= WINDOWS_END);

/// An error of the host's side of memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The device has not that much left.
    #[error("out of memory: {asked} bytes asked, {free} free")]
    OutOfMemory {
        /// Bytes asked for.
        asked: u64,
        /// Bytes left.
        free: u64,
    },
    /// An address that starts no allocation.
    #[error("{address:#x} is no allocation: {detail}")]
    NotAllocated {
        /// The address.
        address: u64,
        /// Where it lies.
        detail: String,
    },
    /// An access that leaves its allocation.
    #[error("{bytes} bytes at {address:#x} are out of bounds: {detail}")]
    OutOfBounds {
        /// The address.
        address: u64,
        /// Bytes of the access.
        bytes: u64,
        /// Where it lies.
        detail: String,
    },
    /// A read of bytes that nobody has written.
    #[error("the byte at {address:#x} was never written")]
    Uninitialised {
        /// The first such byte.
        address: u64,
    },
    /// An address that is no multiple of the element's size.
    #[error("{address:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// The address.
        address: u64,
        /// The alignment.
        align: u64,
    },
}

/// Four bytes of data below, and above them one bit for each byte that was written.
const WRITTEN: u64 = 0xF << 32;

/// One allocation.
#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) base: u64,
    pub(crate) bytes: u64,
    cells: Box<[AtomicU64]>,
    /// Held by atomic operations wider than a cell.
    wide: Mutex<()>,
}

impl Allocation {
    fn new(base: u64, bytes: u64) -> Option<Self> {
        let cells = usize::try_from(bytes.div_ceil(4)).ok()?;
        let cells = bytemuck::allocation::try_zeroed_slice_box(cells).ok()?;
        Some(Self { base, bytes, cells, wide: Mutex::new(()) })
    }

    #[inline]
    fn cell(&self, offset: u64) -> &AtomicU64 {
        &self.cells[(offset / 4) as usize]
    }

    /// Bytes at an aligned offset, lowest first; `None` when one of them was never written.
    #[inline]
    pub(crate) fn load(&self, offset: u64, bytes: u32) -> Option<u128> {
        if bytes < 4 {
            let cell = self.cell(offset).load(Ordering::Relaxed);
            let at = (offset % 4) as u32;
            let needed = ((1u64 << bytes) - 1) << (32 + at);
            return (cell & needed == needed).then(|| u128::from(cell >> (8 * at) & ((1 << (8 * bytes)) - 1)));
        }
        let (mut value, mut written) = (0u128, WRITTEN);
        for part in 0..bytes / 4 {
            let cell = self.cell(offset + u64::from(4 * part)).load(Ordering::Relaxed);
            value |= u128::from(cell as u32) << (32 * part);
            written &= cell;
        }
        (written == WRITTEN).then_some(value)
    }

    /// Stores bytes at an aligned offset, lowest first.
    #[inline]
    pub(crate) fn store(&self, offset: u64, bytes: u32, value: u128) {
        if bytes < 4 {
            self.merge(offset, bytes, value as u32);
            return;
        }
        for part in 0..bytes / 4 {
            let data = (value >> (32 * part)) as u32;
            self.cell(offset + u64::from(4 * part)).store(WRITTEN | u64::from(data), Ordering::Relaxed);
        }
    }

    fn merge(&self, offset: u64, bytes: u32, value: u32) {
        let at = (offset % 4) as u32;
        let data = ((1u64 << (8 * bytes)) - 1) << (8 * at);
        let written = ((1u64 << bytes) - 1) << (32 + at);
        let bits = u64::from(value) << (8 * at) & data | written;
        let update = |cell: u64| Some(cell & !data | bits);
        // The closure always gives a value, so the update cannot fail.
        let _ = self.cell(offset).fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
    }

    /// An atomic update of 4 or 8 bytes; the old value, or `None` when it was never written.
    pub(crate) fn update(&self, offset: u64, bytes: u32, f: impl Fn(u64) -> u64) -> Option<u64> {
        if bytes == 4 {
            let change =
                |cell: u64| (cell & WRITTEN == WRITTEN).then(|| WRITTEN | u64::from(f(cell & 0xFFFF_FFFF) as u32));
            let old = self.cell(offset).fetch_update(Ordering::Relaxed, Ordering::Relaxed, change).ok()?;
            return Some(old & 0xFFFF_FFFF);
        }
        let _guard = lock(&self.wide);
        let old = self.load(offset, bytes)? as u64;
        self.store(offset, bytes, u128::from(f(old)));
        Some(old)
    }

    /// The byte, if it was written.
    fn byte(&self, offset: u64) -> Option<u8> {
        self.load(offset, 1).map(|value| value as u8)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Debug)]
pub(crate) enum Slot {
    Live(Arc<Allocation>),
    Freed { bytes: u64 },
}

#[derive(Debug, Default)]
struct Table {
    slots: Vec<Slot>,
    quarantine: VecDeque<usize>,
    used_bytes: u64,
    /// Addresses of module variables, by module and variable.
    variables: HashMap<(u64, usize), u64>,
}

/// The global memory of one virtual device.
#[derive(Debug)]
pub struct Memory {
    capacity_bytes: u64,
    table: RwLock<Table>,
    /// Held while a module's variables are set up, so that two first launches do it once.
    loading: Mutex<()>,
}

impl Memory {
    /// Memory that gives out at most `capacity_bytes`; the host's memory is only taken as it is touched.
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Self {
        Self { capacity_bytes, table: RwLock::default(), loading: Mutex::new(()) }
    }

    /// Memory whose addresses no device with another number gives out, as devices share one space of addresses.
    #[must_use]
    pub fn of_device(number: usize, capacity_bytes: u64) -> Self {
        let memory = Self::new(capacity_bytes);
        memory.write_table().slots = vec![Slot::Freed { bytes: 0 }; number * DEVICE_SLOTS];
        memory
    }

    /// All bytes of the device.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Bytes not given out.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.capacity_bytes - self.read_table().used_bytes
    }

    fn read_table(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_table(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new allocation, aligned to 256 bytes, with no byte written.
    ///
    /// # Errors
    /// [`MemoryError::OutOfMemory`].
    pub fn allocate(&self, bytes: u64) -> Result<u64, MemoryError> {
        let mut table = self.write_table();
        let free = self.capacity_bytes - table.used_bytes;
        let refused = MemoryError::OutOfMemory { asked: bytes, free };
        if bytes > free || bytes > LARGEST {
            return Err(refused);
        }
        let reused = if table.quarantine.len() > QUARANTINE { table.quarantine.pop_front() } else { None };
        let index = reused.unwrap_or(table.slots.len());
        let base = BASE + ((index as u64) << SLOT_BITS) + START_IN_SLOT;
        let allocation = Allocation::new(base, bytes).ok_or(refused)?;
        let slot = Slot::Live(Arc::new(allocation));
        match table.slots.get_mut(index) {
            Some(old) => *old = slot,
            None => table.slots.push(slot),
        }
        table.used_bytes += bytes;
        Ok(base)
    }

    /// Gives an allocation back; its address is not given out again for a long while.
    ///
    /// # Errors
    /// [`MemoryError::NotAllocated`] when no live allocation starts at `address`.
    pub fn free(&self, address: u64) -> Result<(), MemoryError> {
        let mut table = self.write_table();
        let index = slot_of(address);
        let bytes = match index.and_then(|i| table.slots.get(i)) {
            Some(Slot::Live(allocation)) if allocation.base == address => allocation.bytes,
            _ => return Err(MemoryError::NotAllocated { address, detail: describe(&table.slots, address, 1) }),
        };
        if let Some(index) = index {
            table.slots[index] = Slot::Freed { bytes };
            table.quarantine.push_back(index);
            table.used_bytes -= bytes;
        }
        Ok(())
    }

    fn locate(&self, address: u64, bytes: u64) -> Result<(Arc<Allocation>, u64), MemoryError> {
        let table = self.read_table();
        if let Some(Slot::Live(allocation)) = slot_of(address).and_then(|i| table.slots.get(i))
            && let Some(offset) = address.checked_sub(allocation.base)
            && offset.checked_add(bytes).is_some_and(|end| end <= allocation.bytes)
        {
            return Ok((Arc::clone(allocation), offset));
        }
        Err(MemoryError::OutOfBounds { address, bytes, detail: describe(&table.slots, address, bytes) })
    }

    /// Bytes of the live allocation that starts at `address`.
    #[must_use]
    pub fn allocation_bytes(&self, address: u64) -> Option<u64> {
        let (allocation, offset) = self.locate(address, 0).ok()?;
        (offset == 0).then_some(allocation.bytes)
    }

    /// Start and bytes of the live allocation that holds `address`.
    #[must_use]
    pub fn allocation_of(&self, address: u64) -> Option<(u64, u64)> {
        let (allocation, _) = self.locate(address, 1).ok()?;
        Some((allocation.base, allocation.bytes))
    }

    /// Host to device.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let (allocation, offset) = self.locate(address, bytes.len() as u64)?;
        let mut at = 0;
        while at < bytes.len() {
            let place = offset + at as u64;
            if place.is_multiple_of(4)
                && let Some(word) = bytes.get(at..at + 4)
            {
                let word = word.iter().rev().fold(0u32, |value, &byte| value << 8 | u32::from(byte));
                allocation.store(place, 4, u128::from(word));
                at += 4;
            } else {
                allocation.store(place, 1, u128::from(bytes[at]));
                at += 1;
            }
        }
        Ok(())
    }

    /// Device to host.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`], and [`MemoryError::Uninitialised`] for bytes that nobody has written.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let (allocation, offset) = self.locate(address, bytes.len() as u64)?;
        let mut at = 0;
        while at < bytes.len() {
            let place = offset + at as u64;
            if place.is_multiple_of(4)
                && let Some(word) = bytes.get_mut(at..at + 4)
                && let Some(value) = allocation.load(place, 4)
            {
                word.copy_from_slice(&(value as u32).to_le_bytes());
                at += 4;
            } else {
                let value = allocation.byte(place);
                bytes[at] = value.ok_or(MemoryError::Uninitialised { address: address + at as u64 })?;
                at += 1;
            }
        }
        Ok(())
    }

    /// Device to device; bytes that were never written stay unwritten. The ranges may overlap.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn copy(&self, from: u64, to: u64, bytes: u64) -> Result<(), MemoryError> {
        let (source, start) = self.locate(from, bytes)?;
        let (target, place) = self.locate(to, bytes)?;
        let read: Vec<Option<u8>> = (0..bytes).map(|i| source.byte(start + i)).collect();
        for (at, byte) in read.into_iter().enumerate() {
            let at = place + at as u64;
            match byte {
                Some(byte) => target.store(at, 1, u128::from(byte)),
                None => target.forget(at),
            }
        }
        Ok(())
    }

    fn fill(&self, address: u64, width: u32, value: u32, count: u64) -> Result<(), MemoryError> {
        let align = u64::from(width);
        let bytes = count.saturating_mul(align);
        let (allocation, offset) = self.locate(address, bytes)?;
        if !address.is_multiple_of(align) {
            return Err(MemoryError::Misaligned { address, align });
        }
        for at in 0..count {
            allocation.store(offset + at * align, width, u128::from(value));
        }
        Ok(())
    }

    /// Sets `count` bytes.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn fill8(&self, address: u64, value: u8, count: u64) -> Result<(), MemoryError> {
        self.fill(address, 1, u32::from(value), count)
    }

    /// Sets `count` elements of two bytes.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`], [`MemoryError::Misaligned`].
    pub fn fill16(&self, address: u64, value: u16, count: u64) -> Result<(), MemoryError> {
        self.fill(address, 2, u32::from(value), count)
    }

    /// Sets `count` elements of four bytes.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`], [`MemoryError::Misaligned`].
    pub fn fill32(&self, address: u64, value: u32, count: u64) -> Result<(), MemoryError> {
        self.fill(address, 4, value, count)
    }

    /// Address and bytes of a module's global variable; it is allocated and set on the first use of the module.
    ///
    /// # Errors
    /// [`MemoryError::OutOfMemory`].
    pub fn variable(&self, module: &Module, name: &str) -> Result<Option<(u64, u64)>, MemoryError> {
        let addresses = self.load_variables(module)?;
        let found = module.variables.iter().position(|v| v.name == name && v.space == StateSpace::Global);
        Ok(found.map(|at| (addresses[&at], module.variables[at].bytes)))
    }

    /// Addresses of the module's global variables by their index.
    pub(crate) fn load_variables(&self, module: &Module) -> Result<HashMap<usize, u64>, MemoryError> {
        let _loading = lock(&self.loading);
        let mut addresses = HashMap::new();
        for (at, variable) in module.variables.iter().enumerate().filter(|(_, v)| v.space == StateSpace::Global) {
            let known = self.read_table().variables.get(&(module.id, at)).copied();
            let address = match known {
                Some(address) => address,
                None => {
                    let address = self.allocate(variable.bytes)?;
                    self.fill8(address, 0, variable.bytes)?;
                    self.write(address, &variable.initial)?;
                    self.write_table().variables.insert((module.id, at), address);
                    address
                }
            };
            addresses.insert(at, address);
        }
        Ok(addresses)
    }

    /// Gives the module's global variables back.
    pub fn unload(&self, module: &Module) {
        let held: Vec<u64> = {
            let mut table = self.write_table();
            let mine: Vec<_> = table.variables.keys().filter(|(id, _)| *id == module.id).copied().collect();
            mine.iter().filter_map(|key| table.variables.remove(key)).collect()
        };
        for address in held {
            // Only an address that the caller has freed himself can fail here, and then nothing is left to do.
            let _ = self.free(address);
        }
    }

    pub(crate) fn snapshot(&self) -> Vec<Slot> {
        self.read_table().slots.clone()
    }
}

impl Allocation {
    fn forget(&self, offset: u64) {
        let at = (offset % 4) as u32;
        self.cell(offset).fetch_and(!(1u64 << (32 + at)), Ordering::Relaxed);
    }
}

pub(crate) fn slot_of(address: u64) -> Option<usize> {
    usize::try_from(address.checked_sub(BASE)? >> SLOT_BITS).ok()
}

/// Where an address lies, in words.
pub(crate) fn describe(slots: &[Slot], address: u64, bytes: u64) -> String {
    let Some(index) = slot_of(address).filter(|&index| index < slots.len()) else {
        return "near no allocation".to_owned();
    };
    let base = BASE + ((index as u64) << SLOT_BITS) + START_IN_SLOT;
    let (size, state) = match &slots[index] {
        Slot::Live(allocation) => (allocation.bytes, "an allocation"),
        Slot::Freed { bytes } => (*bytes, "a freed allocation"),
    };
    let at = i128::from(address) - i128::from(base);
    if at < 0 {
        format!("{} bytes before {state} of {size} bytes", -at)
    } else if at + i128::from(bytes) > i128::from(size) {
        format!("offset {at} in {state} of {size} bytes")
    } else {
        format!("inside {state} of {size} bytes, at offset {at}")
    }
}

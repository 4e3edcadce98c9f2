//! Host memory that fails with an error instead of an abort.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

use tilefold_core::{DeviceError, DeviceId, DeviceResult, Storage};

/// Alignment of every block: a cache line, and the widest vector.
const ALIGN_BYTES: usize = 64;

/// Alignment asked of the allocator: up to here the system hands out fresh zero pages; beyond it, the standard library
/// takes memory as it is and writes zeros itself, which touches every page.
const SYSTEM_ALIGN_BYTES: usize = 16;

/// Blocks from here on ask for large pages.
#[cfg(target_os = "linux")]
const HUGE_BYTES: usize = 4 << 20;

/// What advice about memory must be aligned to: the largest small page of any Linux.
#[cfg(target_os = "linux")]
const PAGE_BYTES: usize = 64 << 10;

/// A zeroed, aligned block, freed on drop.
#[derive(Debug)]
pub(crate) struct Block {
    base: NonNull<u8>,
    layout: Layout,
    bytes: usize,
}

// SAFETY: the block owns its memory and hands it out only through `&mut self` or as a raw address.
unsafe impl Send for Block {}
// SAFETY: `&Block` gives no access to the memory.
unsafe impl Sync for Block {}

impl Block {
    /// A zeroed block of at least one byte.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub(crate) fn zeroed(bytes: usize) -> DeviceResult<Self> {
        let padded = bytes.max(1).checked_add(ALIGN_BYTES - SYSTEM_ALIGN_BYTES).ok_or_else(|| out_of_memory(bytes))?;
        let layout = Layout::from_size_align(padded, SYSTEM_ALIGN_BYTES).map_err(|_| out_of_memory(bytes))?;
        // SAFETY: the layout's size is not 0.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(|| out_of_memory(bytes))?;
        #[cfg(target_os = "linux")]
        if padded >= HUGE_BYTES {
            ask_for_huge_pages(base, padded);
        }
        Ok(Self { base, layout, bytes: bytes.max(1) })
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// First byte.
    pub(crate) fn address(&mut self) -> *mut u8 {
        // At most ALIGN_BYTES - SYSTEM_ALIGN_BYTES further, since the base is a multiple of the latter.
        let base = self.base.as_ptr();
        base.wrapping_add(base.align_offset(ALIGN_BYTES))
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout, and freed only here.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// Asks for large pages: a fault each 4 KiB, and a miss of the address cache each row of a head, cost more than a tenth of
/// a pass. Only advice: without them everything works, slower.
#[cfg(target_os = "linux")]
fn ask_for_huge_pages(base: NonNull<u8>, bytes: usize) {
    let skipped = base.as_ptr().align_offset(PAGE_BYTES);
    let whole = bytes.saturating_sub(skipped) / PAGE_BYTES * PAGE_BYTES;
    // SAFETY: whole pages inside the allocation; the advice changes no contents.
    let refused = unsafe { libc::madvise(base.as_ptr().add(skipped).cast(), whole, libc::MADV_HUGEPAGE) } != 0;
    if refused {
        tracing::debug!(bytes, error = %std::io::Error::last_os_error(), "no huge pages");
    }
}

/// Zeroed memory as a tensor's storage.
///
/// # Errors
/// [`DeviceError::OutOfMemory`].
pub(crate) fn storage(bytes: usize) -> DeviceResult<Storage> {
    let mut block = Block::zeroed(bytes)?;
    let address = block.address();
    // SAFETY: the block is initialised, lives as long as its owner, and the owner gives no access to it.
    Ok(unsafe { Storage::from_raw(address, bytes, DeviceId::CPU, Arc::new(block)) })
}

fn out_of_memory(bytes: usize) -> DeviceError {
    let free = host_memory().available_bytes;
    DeviceError::OutOfMemory { asked: u64::try_from(bytes).unwrap_or(u64::MAX), free }
}

/// Memory that this process may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostMemory {
    /// Of the machine, or as much as its container allows; 0 when the system does not tell.
    pub total_bytes: u64,
    /// Of that, what can still be had without swapping; 0 when the system does not tell.
    pub available_bytes: u64,
}

/// Asks the system for the host's memory, now.
#[must_use]
pub fn host_memory() -> HostMemory {
    with_system(|system| {
        system.refresh_memory();
        let (total, available) = (system.total_memory(), system.available_memory());
        let Some(container) = system.cgroup_limits() else {
            return HostMemory { total_bytes: total, available_bytes: available };
        };
        // Pages of files that a container holds can be taken back.
        let free = container.total_memory.saturating_sub(container.rss);
        HostMemory { total_bytes: total.min(container.total_memory), available_bytes: available.min(free) }
    })
}

/// Name and maker of the processor, empty when they cannot be told.
pub(crate) fn processor() -> (String, String) {
    with_system(|system| {
        system.refresh_cpu_list(sysinfo::CpuRefreshKind::nothing());
        let first = system.cpus().first();
        first.map(|cpu| (cpu.brand().trim().to_owned(), cpu.vendor_id().to_owned())).unwrap_or_default()
    })
}

/// What the operating system tells, or a default where it tells nothing.
fn with_system<T: Default>(read: impl FnOnce(&mut sysinfo::System) -> T) -> T {
    sysinfo::System::new().map(|mut system| read(&mut system)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_beyond_memory_is_an_error() {
        for bytes in [usize::MAX, usize::MAX / 2 - 4096] {
            let error = Block::zeroed(bytes).unwrap_err();
            assert!(matches!(error, DeviceError::OutOfMemory { asked, .. } if asked > 1 << 40), "{error}");
        }
    }

    #[test]
    fn available_memory_is_a_part_of_the_whole() {
        let memory = host_memory();
        assert!(memory.available_bytes <= memory.total_bytes, "{memory:?}");
        assert!(memory.available_bytes > 0 || cfg!(not(target_os = "linux")), "{memory:?}");
    }

    #[test]
    fn blocks_are_zeroed_and_aligned() {
        let mut storage = storage(100).unwrap();
        assert_eq!(storage.address().addr() % ALIGN_BYTES, 0);
        assert!(storage.host_bytes_mut().unwrap().iter().all(|&byte| byte == 0));
    }
}

//! Memory: allocations with guard zones, copies, fills. Whoever touches what is not allocated, or was freed, is told.

use std::ffi::{c_int, c_uint, c_void};

use tilefold_emulator_ptx::{Memory, MemoryError};

use super::{export, int, put};
use crate::fault::remember;
use crate::handles::Handle;
use crate::status::{Answer, Status};
use crate::system::System;

/// Attributes of a pointer that are known, by the driver's numbers.
const POINTER_CONTEXT: c_uint = 1;
const POINTER_MEMORY_TYPE: c_uint = 2;
const POINTER_DEVICE: c_uint = 9;
/// The kind of memory all of it is.
const MEMORY_TYPE_DEVICE: c_uint = 2;

/// The first fields of `CUmemPoolProps`.
#[repr(C)]
#[derive(Debug)]
struct PoolProperties {
    allocation_type: c_int,
    handle_types: c_int,
    location_type: c_int,
    location: c_int,
}

/// An error of memory as a driver would report it, with the details kept.
fn status(error: &MemoryError) -> Status {
    let status = match error {
        MemoryError::OutOfMemory { .. } => Status::OutOfMemory,
        MemoryError::Uninitialised { .. } => Status::LaunchFailed,
        _ => Status::InvalidValue,
    };
    remember(status, error.to_string());
    status
}

/// Works on the current device's memory.
fn here(work: impl FnOnce(&Memory) -> Result<(), MemoryError>) -> Answer {
    let system = System::get()?;
    work(&system.devices[system.current()?].memory).map_err(|error| status(&error))
}

/// As [`here`], on a stream.
fn on(stream: Handle, work: impl FnOnce(&Memory) -> Result<(), MemoryError>) -> Answer {
    System::get()?.stream_here(stream)?;
    here(work)
}

/// # Safety
/// `address` is null or valid for a write.
unsafe fn allocate(address: *mut u64, bytes: usize) -> Answer {
    if bytes == 0 {
        return Err(Status::InvalidValue);
    }
    here(|memory| {
        let new = memory.allocate(bytes as u64)?;
        // SAFETY: the caller's.
        match unsafe { put(address, new) } {
            Ok(()) => Ok(()),
            Err(_) => memory.free(new),
        }
    })
}

fn free(memory: &Memory, address: u64) -> Result<(), MemoryError> {
    if address == 0 { Ok(()) } else { memory.free(address) }
}

/// # Safety
/// `from` is valid for `bytes`.
unsafe fn upload(memory: &Memory, to: u64, from: *const c_void, bytes: usize) -> Result<(), MemoryError> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the caller's.
    memory.write(to, unsafe { std::slice::from_raw_parts(from.cast(), bytes) })
}

/// # Safety
/// `to` is valid for `bytes`.
unsafe fn download(memory: &Memory, to: *mut c_void, from: u64, bytes: usize) -> Result<(), MemoryError> {
    if bytes == 0 {
        return Ok(());
    }
    let mut data = vec![0_u8; bytes];
    memory.read(from, &mut data)?;
    // SAFETY: the caller's.
    unsafe { to.cast::<u8>().copy_from_nonoverlapping(data.as_ptr(), bytes) };
    Ok(())
}

export! {
    /// Memory without an order.
    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) {
        // SAFETY: the caller's.
        unsafe { allocate(address, bytes) }
    }

    /// Memory, ordered with a stream.
    fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: Handle) {
        System::get()?.stream_here(stream)?;
        // SAFETY: the caller's.
        unsafe { allocate(address, bytes) }
    }

    /// Memory of a pool, ordered with a stream.
    fn cuMemAllocFromPoolAsync(address: *mut u64, bytes: usize, pool: Handle, stream: Handle) {
        let system = System::get()?;
        if system.pools.get(pool)? != system.stream_here(stream)?.device {
            return Err(Status::InvalidValue);
        }
        // SAFETY: the caller's.
        unsafe { allocate(address, bytes) }
    }

    /// Ends an allocation.
    fn cuMemFree_v2(address: u64) {
        here(|memory| free(memory, address))
    }

    /// Ends an allocation in the order of a stream.
    fn cuMemFreeAsync(address: u64, stream: Handle) {
        on(stream, |memory| free(memory, address))
    }

    /// Free and all bytes of the current device.
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let system = System::get()?;
        let memory = &system.devices[system.current()?].memory;
        let size = |bytes| usize::try_from(bytes).unwrap_or(usize::MAX);
        // SAFETY: the caller's.
        unsafe { put(free, size(memory.free_bytes())).and_then(|()| put(total, size(memory.capacity_bytes()))) }
    }

    /// A pool of a device.
    fn cuMemPoolCreate(pool: *mut Handle, properties: *const PoolProperties) {
        let system = System::get()?;
        if system.settings.pools == 0 {
            return Err(Status::NotSupported);
        }
        // SAFETY: the caller's.
        let properties = unsafe { properties.as_ref() }.ok_or(Status::InvalidValue)?;
        if (properties.allocation_type, properties.handle_types, properties.location_type) != (1, 0, 1) {
            return Err(Status::NotSupported);
        }
        let device = system.device(properties.location)?;
        // SAFETY: the caller's.
        unsafe { put(pool, system.pools.insert(device)) }
    }

    /// Ends a pool.
    fn cuMemPoolDestroy(pool: Handle) {
        System::get()?.pools.remove(pool).map(drop)
    }

    /// What a pool keeps makes no difference here.
    fn cuMemPoolSetAttribute(pool: Handle, _attribute: c_uint, _value: *mut c_void) {
        System::get()?.pools.get(pool).map(drop)
    }

    /// A pool keeps nothing here.
    fn cuMemPoolTrimTo(pool: Handle, _bytes: usize) {
        System::get()?.pools.get(pool).map(drop)
    }

    /// Host to device.
    fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) {
        // SAFETY: the caller's.
        here(|memory| unsafe { upload(memory, to, from, bytes) })
    }

    /// Host to device, on a stream.
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle) {
        // SAFETY: the caller's.
        on(stream, |memory| unsafe { upload(memory, to, from, bytes) })
    }

    /// Device to host.
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) {
        // SAFETY: the caller's.
        here(|memory| unsafe { download(memory, to, from, bytes) })
    }

    /// Device to host, on a stream.
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Handle) {
        // SAFETY: the caller's.
        on(stream, |memory| unsafe { download(memory, to, from, bytes) })
    }

    /// Within a device.
    fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) {
        here(|memory| memory.copy(from, to, bytes as u64))
    }

    /// Within a device, on a stream.
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) {
        on(stream, |memory| memory.copy(from, to, bytes as u64))
    }

    /// Sets bytes.
    fn cuMemsetD8_v2(address: u64, value: u8, count: usize) {
        here(|memory| memory.fill8(address, value, count as u64))
    }

    /// Sets bytes, on a stream.
    fn cuMemsetD8Async(address: u64, value: u8, count: usize, stream: Handle) {
        on(stream, |memory| memory.fill8(address, value, count as u64))
    }

    /// Sets elements of two bytes.
    fn cuMemsetD16_v2(address: u64, value: u16, count: usize) {
        here(|memory| memory.fill16(address, value, count as u64))
    }

    /// Sets elements of two bytes, on a stream.
    fn cuMemsetD16Async(address: u64, value: u16, count: usize, stream: Handle) {
        on(stream, |memory| memory.fill16(address, value, count as u64))
    }

    /// Sets elements of four bytes.
    fn cuMemsetD32_v2(address: u64, value: c_uint, count: usize) {
        here(|memory| memory.fill32(address, value, count as u64))
    }

    /// Sets elements of four bytes, on a stream.
    fn cuMemsetD32Async(address: u64, value: c_uint, count: usize, stream: Handle) {
        on(stream, |memory| memory.fill32(address, value, count as u64))
    }

    /// Whose memory an address is.
    fn cuPointerGetAttribute(value: *mut c_void, attribute: c_uint, address: u64) {
        let system = System::get()?;
        let holds = |device: &usize| system.devices[*device].memory.allocation_of(address).is_some();
        let device = (0..system.devices.len()).find(holds).ok_or(Status::InvalidValue)?;
        // SAFETY: the caller's; each attribute has its type.
        unsafe {
            match attribute {
                POINTER_CONTEXT => put(value.cast(), system.context_of(device)),
                POINTER_MEMORY_TYPE => put(value.cast(), MEMORY_TYPE_DEVICE),
                POINTER_DEVICE => put(value.cast(), int(device as u64)),
                _ => Err(Status::NotSupported),
            }
        }
    }
}

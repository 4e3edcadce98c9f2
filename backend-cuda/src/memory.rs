//! Memory of a device: zeroed, ordered with the work of its streams, freed behind the launches that use it.

use std::any::Any;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute, CUmemPool_attribute, CUmemoryPool, CUpointer_attribute, CUresult};
use tilefold_core::{DeviceError, DeviceResult, Storage};

use crate::context::{Context, ignore};
use crate::driver::Driver;
use crate::error::Failure;
use crate::stream::CudaStream;

/// The device's own pool of memory for stream-ordered allocation. It keeps what is freed, for the next allocation.
#[derive(Debug)]
pub(crate) struct Pool(CUmemoryPool);

impl Pool {
    /// A pool, where the device has such.
    ///
    /// # Errors
    /// What the driver reports.
    pub(crate) fn new(context: &Context) -> Result<Option<Self>, Failure> {
        let driver = context.driver;
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
        let mut supported = 0;
        // SAFETY: the pointer is valid.
        unsafe { driver.cuDeviceGetAttribute(&raw mut supported, attribute, context.device)? };
        if supported == 0 {
            return Ok(None);
        }
        let _entered = context.enter()?;
        // SAFETY: a struct of numbers and pointers, in which 0 is the default everywhere.
        let mut properties: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
        properties.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        properties.location.id = context.device;
        let mut pool = null_mut();
        // SAFETY: both pointers are valid.
        unsafe { driver.cuMemPoolCreate(&raw mut pool, &raw const properties)? };
        let mut keep_bytes = u64::MAX;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the attribute is a u64.
        unsafe { driver.cuMemPoolSetAttribute(pool, attribute, (&raw mut keep_bytes).cast())? };
        Ok(Some(Self(pool)))
    }

    /// The end of the pool: nothing of it is in use.
    pub(crate) fn destroy(&self, driver: &Driver) {
        // SAFETY: created in `new`, not used again.
        ignore(unsafe { driver.cuMemPoolDestroy(self.0) });
    }
}

/// An allocation, freed on drop.
#[derive(Debug)]
pub(crate) struct Block {
    context: Arc<Context>,
    address: u64,
}

impl Block {
    /// Memory with any content, that work of `stream` may use from now on.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], and what the driver reports.
    pub(crate) fn new(stream: &CudaStream, bytes: usize) -> DeviceResult<Self> {
        let context = &stream.context;
        let _entered = context.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both pointers are valid.
        unsafe { context.driver.cuMemGetInfo_v2(&raw mut free, &raw mut total)? };
        // The driver rounds sizes up, and overflows with those near the end.
        let fits = bytes <= total;
        let first = if fits { allocate(stream, bytes)? } else { None };
        let address = match first {
            None if fits => {
                give_back_unused(context)?;
                allocate(stream, bytes)?
            }
            first => first,
        };
        let address = address.ok_or_else(|| {
            let wide = |bytes| u64::try_from(bytes).unwrap_or(u64::MAX);
            DeviceError::OutOfMemory { asked: wide(bytes), free: wide(free) }
        })?;
        Ok(Self { context: Arc::clone(context), address })
    }

    /// First byte.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    fn free(&self) -> Result<(), Failure> {
        let context = &*self.context;
        let _entered = context.enter()?;
        if context.pool.is_some() {
            let stream = context.streams.behind_all(context.driver)?;
            // SAFETY: allocated from the pool, behind all work that may use it.
            return unsafe { context.driver.cuMemFreeAsync(self.address, stream.0) };
        }
        context.streams.synchronize(context.driver)?;
        // SAFETY: allocated by `cuMemAlloc`, and all work that may use it is done.
        unsafe { context.driver.cuMemFree_v2(self.address) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        ignore(self.free());
    }
}

/// An address, or `None` when memory ran out. The context is current.
fn allocate(stream: &CudaStream, bytes: usize) -> Result<Option<u64>, Failure> {
    let (driver, mut address) = (stream.context.driver, 0);
    let bytes = bytes.max(1);
    let result = match &stream.context.pool {
        // SAFETY: pool and stream are of the current context.
        Some(pool) => unsafe { driver.cuMemAllocFromPoolAsync(&raw mut address, bytes, pool.0, stream.raw.0) },
        // SAFETY: the pointer is valid.
        None => unsafe { driver.cuMemAlloc_v2(&raw mut address, bytes) },
    };
    match result {
        Ok(()) => Ok(Some(address)),
        Err(failure) if failure.is(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// Waits for frees that are enqueued, and gives what the pool keeps to whoever needs it. The context is current.
fn give_back_unused(context: &Context) -> Result<(), Failure> {
    context.streams.synchronize(context.driver)?;
    match &context.pool {
        // SAFETY: the pool lives as long as the context.
        Some(pool) => unsafe { context.driver.cuMemPoolTrimTo(pool.0, 0) },
        None => Ok(()),
    }
}

/// Zeroed memory as a tensor's storage.
///
/// # Errors
/// As [`Block::new`].
pub(crate) fn storage(stream: &CudaStream, bytes: usize) -> DeviceResult<Storage> {
    let block = Block::new(stream, bytes)?;
    let (context, address) = (&stream.context, block.address());
    let _entered = context.enter()?;
    // SAFETY: the block has as many bytes.
    unsafe { context.driver.cuMemsetD8Async(address, 0, bytes.max(1), stream.raw.0)? };
    // SAFETY: memory of this device that lives as long as its owner, which gives no access to it.
    Ok(unsafe { Storage::from_raw(pointer(address), bytes, context.id, Arc::new(block)) })
}

/// Memory of the caller's as a tensor's storage.
///
/// # Safety
/// As [`Storage::from_raw`].
///
/// # Errors
/// [`DeviceError::Unsupported`] for an address that is not of this device, and what the driver reports.
pub(crate) unsafe fn external(
    context: &Context,
    address: u64,
    bytes: usize,
    owner: Arc<dyn Any + Send + Sync>,
) -> DeviceResult<Storage> {
    let _entered = context.enter()?;
    let mut device: c_int = -1;
    let attribute = CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
    // SAFETY: the attribute is an int.
    let known = unsafe { context.driver.cuPointerGetAttribute((&raw mut device).cast(), attribute, address) };
    match known {
        Ok(()) if device == context.device => {}
        Err(failure) if !failure.is(CUresult::CUDA_ERROR_INVALID_VALUE) => return Err(failure.into()),
        _ => {
            let limit = format!("address {address:#x} is no memory of {}", context.id);
            return Err(DeviceError::Unsupported { limit });
        }
    }
    // SAFETY: the caller's.
    Ok(unsafe { Storage::from_raw(pointer(address), bytes, context.id, owner) })
}

/// A device's address as a storage holds it.
fn pointer(address: u64) -> *mut u8 {
    std::ptr::without_provenance_mut(usize::try_from(address).unwrap_or(usize::MAX))
}

/// A storage's address as the driver takes it.
pub(crate) fn address_of(pointer: *const u8) -> u64 {
    u64::try_from(pointer.addr()).unwrap_or(u64::MAX)
}

/// Copies host bytes to the front of a storage; the bytes may change when this returns.
///
/// # Errors
/// [`DeviceError::WrongDevice`], [`DeviceError::Unsupported`] when the storage is smaller, and what the driver reports.
pub(crate) fn upload(stream: &CudaStream, source: &[u8], destination: &mut Storage) -> DeviceResult<()> {
    check(stream, destination, source.len())?;
    if source.is_empty() {
        return Ok(());
    }
    copy_to(stream, source, address_of(destination.address()))?;
    // From memory that is pinned, or that the device reads itself, the copy may still be running.
    Ok(stream.synchronize()?)
}

/// Copies a list that is dropped here to the device, without waiting.
///
/// # Errors
/// What the driver reports.
pub(crate) fn send(stream: &CudaStream, source: Vec<u8>, address: u64) -> DeviceResult<()> {
    copy_to(stream, &source, address)?;
    let _entered = stream.context.enter()?;
    Ok(stream.keep(source)?)
}

fn copy_to(stream: &CudaStream, source: &[u8], address: u64) -> Result<(), Failure> {
    let _entered = stream.context.enter()?;
    let from = source.as_ptr().cast::<c_void>();
    // SAFETY: both sides have as many bytes.
    unsafe { stream.context.driver.cuMemcpyHtoDAsync_v2(address, from, source.len(), stream.raw.0) }
}

/// Copies the front of a storage to host bytes and waits for it.
///
/// # Errors
/// As [`upload`].
pub(crate) fn download(stream: &CudaStream, source: &Storage, destination: &mut [u8]) -> DeviceResult<()> {
    check(stream, source, destination.len())?;
    if destination.is_empty() {
        return Ok(());
    }
    let from = address_of(source.address());
    {
        let _entered = stream.context.enter()?;
        let (to, bytes) = (destination.as_mut_ptr().cast::<c_void>(), destination.len());
        // SAFETY: both sides have as many bytes, and the copy is waited for while `destination` is borrowed.
        unsafe { stream.context.driver.cuMemcpyDtoHAsync_v2(to, from, bytes, stream.raw.0)? };
    }
    Ok(stream.synchronize()?)
}

fn check(stream: &CudaStream, storage: &Storage, bytes: usize) -> DeviceResult<()> {
    let expected = stream.context.id;
    if storage.device() != expected {
        return Err(DeviceError::WrongDevice { what: "storage", expected, got: storage.device() });
    }
    if bytes > storage.bytes() {
        let limit = format!("a copy of {bytes} bytes from or to a storage of {}", storage.bytes());
        return Err(DeviceError::Unsupported { limit });
    }
    Ok(())
}

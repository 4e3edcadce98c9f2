//! Memory with an owner: freed when its last user is gone, whoever allocated it.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::{DeviceId, Element};

/// A block of memory on one device.
///
/// It frees through its owner: a backend's allocation, a `Vec`, or memory of another library.
pub struct Storage {
    address: *mut u8,
    bytes: usize,
    device: DeviceId,
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory is reached only through tensor views, whose borrows follow `&` and `&mut`; the address itself is data.
unsafe impl Send for Storage {}
// SAFETY: as above.
unsafe impl Sync for Storage {}

impl Storage {
    /// Memory of the caller's, kept alive by `owner`.
    ///
    /// # Safety
    /// `address..address + bytes` is memory of `device`, valid for reads and writes and reached through nothing else
    /// while `owner` lives; on a host device it is initialised.
    #[must_use]
    pub unsafe fn from_raw(
        address: *mut u8,
        bytes: usize,
        device: DeviceId,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self { address, bytes, device, owner }
    }

    /// Host memory that takes over a vector, without a copy.
    #[must_use]
    pub fn from_vec<T: Element>(mut data: Vec<T>) -> Self {
        let (address, bytes) = (data.as_mut_ptr().cast::<u8>(), size_of_val(data.as_slice()));
        // SAFETY: the vector's buffer does not move when the vector does, and the owner gives no access to it.
        unsafe { Self::from_raw(address, bytes, DeviceId::CPU, Arc::new(Kept(data))) }
    }

    /// First byte; an address of the device's own space.
    #[must_use]
    pub fn address(&self) -> *mut u8 {
        self.address
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device whose memory it is.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// What keeps the memory alive; a backend finds its own handle here.
    #[must_use]
    pub fn owner(&self) -> &Arc<dyn Any + Send + Sync> {
        &self.owner
    }

    /// The bytes, when the host can read them.
    #[must_use]
    pub fn host_bytes(&self) -> Option<&[u8]> {
        // SAFETY: `from_raw` promises initialised host memory of this size, and `&self` excludes writers.
        self.device.is_host().then(|| unsafe { std::slice::from_raw_parts(self.address, self.bytes) })
    }

    /// The bytes, when the host can write them.
    #[must_use]
    pub fn host_bytes_mut(&mut self) -> Option<&mut [u8]> {
        // SAFETY: `from_raw` promises initialised host memory of this size, and `&mut self` excludes everyone else.
        self.device.is_host().then(|| unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) })
    }
}

/// A vector kept alive for its memory alone. Private to this crate, so that nobody who holds the owner can name it and
/// reach the elements beside the tensor.
#[derive(Debug)]
pub(crate) struct Kept<T>(#[allow(dead_code, reason = "dropped, never read")] pub(crate) Vec<T>);

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, bytes, device, .. } = self;
        write!(f, "Storage({bytes} bytes at {address:?} on {device})")
    }
}

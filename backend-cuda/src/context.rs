//! The context of one device: retained from the driver or given by the caller, and what belongs to it.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::sys::CUcontext;
use tilefold_core::{DeviceId, DeviceKind, OpenError};

use crate::driver::Driver;
use crate::error::Failure;
use crate::memory::Pool;
use crate::module::Modules;
use crate::stream::Streams;

/// A device's context. All backends of this process for one device share it, and with it memory, streams and modules.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) driver: &'static Driver,
    pub(crate) id: DeviceId,
    pub(crate) device: c_int,
    pub(crate) raw: CUcontext,
    /// Retained here, to be released with the last user.
    retained: bool,
    pub(crate) streams: Streams,
    /// `None` on devices without stream-ordered allocation.
    pub(crate) pool: Option<Pool>,
    pub(crate) modules: Modules,
}

// SAFETY: a context may be made current on any thread, and on several at once; the driver's calls are thread-safe.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// Contexts in use.
static CONTEXTS: Mutex<Vec<Weak<Context>>> = Mutex::new(Vec::new());

impl Context {
    /// The primary context of a device, shared with every other user of it in this process.
    ///
    /// # Errors
    /// What the driver reports.
    pub(crate) fn primary(driver: &'static Driver, ordinal: usize, device: c_int) -> Result<Arc<Self>, OpenError> {
        let mut raw = null_mut();
        // SAFETY: the device is one the driver named.
        unsafe { driver.cuDevicePrimaryCtxRetain(&raw mut raw, device) }.map_err(|f| f.describe(driver))?;
        Self::shared(Self::new(driver, ordinal, device, raw, true))
    }

    /// A context of the caller's.
    ///
    /// # Safety
    /// It stays valid while the result or anything made with it lives.
    ///
    /// # Errors
    /// What the driver reports.
    pub(crate) unsafe fn external(
        driver: &'static Driver,
        ordinal: usize,
        device: c_int,
        raw: CUcontext,
    ) -> Result<Arc<Self>, OpenError> {
        Self::shared(Self::new(driver, ordinal, device, raw, false))
    }

    fn new(driver: &'static Driver, ordinal: usize, device: c_int, raw: CUcontext, retained: bool) -> Self {
        let id = DeviceId { kind: DeviceKind::Cuda, ordinal };
        let (streams, modules) = (Streams::default(), Modules::default());
        Self { driver, id, device, raw, retained, streams, pool: None, modules }
    }

    /// The context in use that is the same one, or this one with a pool. What frees memory must know of all streams that
    /// may use it: two lists of streams for one context would not do.
    fn shared(mut new: Self) -> Result<Arc<Self>, OpenError> {
        let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        contexts.retain(|context| context.strong_count() > 0);
        if let Some(known) = contexts.iter().filter_map(Weak::upgrade).find(|context| context.raw == new.raw) {
            return Ok(known);
        }
        new.pool = Pool::new(&new).map_err(|failure| failure.describe(new.driver))?;
        let context = Arc::new(new);
        contexts.push(Arc::downgrade(&context));
        Ok(context)
    }

    /// Makes the context current on this thread until the result is dropped; the caller's own context comes back then.
    ///
    /// # Errors
    /// What the driver reports.
    pub(crate) fn enter(&self) -> Result<Entered, Failure> {
        // SAFETY: the context is valid while `self` lives.
        unsafe { self.driver.cuCtxPushCurrent_v2(self.raw) }.map(|()| Entered(self.driver))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Ok(_entered) = self.enter() {
            self.modules.unload(self.driver);
            self.streams.destroy(self.driver);
            if let Some(pool) = &self.pool {
                pool.destroy(self.driver);
            }
        }
        if self.retained {
            // SAFETY: retained once in `primary`.
            ignore(unsafe { self.driver.cuDevicePrimaryCtxRelease_v2(self.device) });
        }
    }
}

/// A context that is current.
#[derive(Debug)]
pub(crate) struct Entered(&'static Driver);

impl Drop for Entered {
    fn drop(&mut self) {
        let mut popped = null_mut();
        // SAFETY: pushed in `enter`.
        ignore(unsafe { self.0.cuCtxPopCurrent_v2(&raw mut popped) });
    }
}

/// For calls in a `drop`, which has nobody to report to: what failed is logged.
pub(crate) fn ignore(result: Result<(), Failure>) {
    if let Err(Failure { call, status }) = result {
        tracing::debug!(call, status, "failed while resources were released");
    }
}

//! Events: points in a stream that another stream, or the host, can wait for.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{CUevent, CUevent_flags, CUresult};
use tilefold_core::{DeviceError, DeviceResult, Event};

use crate::context::{Context, ignore};
use crate::driver::Driver;
use crate::error::Failure;
use crate::stream::{CudaStream, RawStream};

/// An event as the driver knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawEvent(CUevent);

// SAFETY: an event may be used from any thread.
unsafe impl Send for RawEvent {}
// SAFETY: as above.
unsafe impl Sync for RawEvent {}

impl RawEvent {
    /// A new event behind what the stream holds now. The context is current.
    ///
    /// # Errors
    /// What the driver reports.
    pub(crate) fn record(driver: &Driver, stream: RawStream) -> Result<Self, Failure> {
        let mut event = null_mut();
        // SAFETY: the pointer is valid, a context is current.
        unsafe { driver.cuEventCreate(&raw mut event, CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)? };
        let event = Self(event);
        // SAFETY: event and stream are of the current context.
        let recorded = unsafe { driver.cuEventRecord(event.0, stream.0) };
        if recorded.is_err() {
            event.destroy(driver);
        }
        recorded.map(|()| event)
    }

    /// Makes later work of the stream wait.
    ///
    /// # Errors
    /// What the driver reports.
    pub(crate) fn wait(self, driver: &Driver, stream: RawStream) -> Result<(), Failure> {
        // SAFETY: event and stream live; 0 is the default.
        unsafe { driver.cuStreamWaitEvent(stream.0, self.0, 0) }
    }

    /// Whether it may still lie ahead.
    pub(crate) fn is_pending(self, driver: &Driver) -> bool {
        // SAFETY: the event lives.
        unsafe { driver.cuEventQuery(self.0) }.is_err_and(|failure| failure.is(CUresult::CUDA_ERROR_NOT_READY))
    }

    /// Ends it; who waits already goes on waiting.
    pub(crate) fn destroy(self, driver: &Driver) {
        // SAFETY: created in `record`, and nobody uses it after this.
        ignore(unsafe { driver.cuEventDestroy_v2(self.0) });
    }
}

/// What an [`Event`] of this backend holds.
#[derive(Debug)]
struct CudaEvent {
    context: Arc<Context>,
    raw: RawEvent,
}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            self.raw.destroy(self.context.driver);
        }
    }
}

/// Marks the work enqueued on the stream so far.
///
/// # Errors
/// What the driver reports.
pub(crate) fn record(stream: &CudaStream) -> DeviceResult<Event> {
    let context = &stream.context;
    let _entered = context.enter()?;
    let raw = RawEvent::record(context.driver, stream.raw)?;
    Ok(Event::new(context.id, Arc::new(CudaEvent { context: Arc::clone(context), raw })))
}

/// Makes later work of the stream wait for the event.
///
/// # Errors
/// [`DeviceError::WrongDevice`], [`DeviceError::Unsupported`] for an event that some other backend made, and what the
/// driver reports.
pub(crate) fn wait(stream: &CudaStream, event: &Event) -> DeviceResult<()> {
    let context = &stream.context;
    if event.device() != context.id {
        return Err(DeviceError::WrongDevice { what: "event", expected: context.id, got: event.device() });
    }
    let event = event.handle::<CudaEvent>().ok_or_else(|| DeviceError::Unsupported {
        limit: format!("an event that this backend of {} did not make", context.id),
    })?;
    let _entered = context.enter()?;
    Ok(event.raw.wait(context.driver, stream.raw)?)
}

//! Events: points in the device's one queue. Work behind them waits anyway.

use std::sync::Arc;

use tilefold_core::{DeviceError, DeviceResult, Event};

use crate::context::Context;

/// What an [`Event`] of this backend holds.
#[derive(Debug)]
struct WgpuEvent;

/// Marks the work enqueued so far.
pub(crate) fn record(context: &Context) -> Event {
    Event::new(context.id, Arc::new(WgpuEvent))
}

/// Later work waits for the event, since all work of a device is in order.
///
/// # Errors
/// [`DeviceError::WrongDevice`], [`DeviceError::Unsupported`] for an event that some other backend made.
pub(crate) fn wait(context: &Context, event: &Event) -> DeviceResult<()> {
    let expected = context.id;
    if event.device() != expected {
        return Err(DeviceError::WrongDevice { what: "event", expected, got: event.device() });
    }
    let foreign =
        || DeviceError::Unsupported { limit: format!("an event that this backend of {expected} did not make") };
    event.handle::<WgpuEvent>().map(|_| ()).ok_or_else(foreign)
}

//! Streams: all of a device share its one queue, in which work runs in the order in which it was submitted.

use std::sync::Arc;

use tilefold_core::{DeviceError, DeviceResult, Stream};

use crate::context::Context;

/// What a [`Stream`] of this backend holds.
#[derive(Debug)]
pub(crate) struct WgpuStream {
    pub(crate) context: Arc<Context>,
}

impl WgpuStream {
    pub(crate) fn open(context: &Arc<Context>) -> Stream {
        Stream::new(context.id, Arc::new(Self { context: Arc::clone(context) }))
    }

    /// The context of a stream, which must be this one.
    ///
    /// # Errors
    /// [`DeviceError::WrongDevice`], [`DeviceError::Unsupported`] for a stream of a device that was lost and opened again,
    /// or that some other backend made.
    pub(crate) fn check(context: &Arc<Context>, stream: &Stream) -> DeviceResult<()> {
        if stream.device() != context.id {
            return Err(DeviceError::WrongDevice { what: "stream", expected: context.id, got: stream.device() });
        }
        let is_ours = stream.handle::<Self>().is_some_and(|stream| Arc::ptr_eq(&stream.context, context));
        if is_ours {
            return Ok(());
        }
        Err(DeviceError::Unsupported { limit: format!("a stream that this backend of {} did not make", context.id) })
    }
}

//! Streams. Work is done when it is enqueued, so that order comes by itself; failures wait for the next call.

use std::ffi::c_uint;

use super::{export, put};
use crate::handles::Handle;
use crate::system::{Stream, System};

export! {
    /// A stream of the current context.
    fn cuStreamCreate(stream: *mut Handle, _flags: c_uint) {
        let system = System::get()?;
        let new = Stream::new(system.current()?);
        // SAFETY: the caller's.
        unsafe { put(stream, system.streams.insert(new)) }
    }

    /// Ends a stream.
    fn cuStreamDestroy_v2(stream: Handle) {
        System::get()?.streams.remove(stream).map(drop)
    }

    /// Reports what went wrong.
    fn cuStreamSynchronize(stream: Handle) {
        System::get()?.stream_here(stream).map(drop)
    }

    /// As synchronising: nothing is ever left to do.
    fn cuStreamQuery(stream: Handle) {
        System::get()?.stream_here(stream).map(drop)
    }

    /// The event is reached already.
    fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: c_uint) {
        let system = System::get()?;
        system.events.get(event)?;
        system.stream_here(stream).map(drop)
    }

    /// The context a stream was made in.
    fn cuStreamGetCtx(stream: Handle, context: *mut Handle) {
        let system = System::get()?;
        let device = if stream.is_null() { system.current()? } else { system.streams.get(stream)?.device };
        // SAFETY: the caller's.
        unsafe { put(context, system.context_of(device)) }
    }
}

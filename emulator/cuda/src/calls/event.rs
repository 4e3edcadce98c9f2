//! Events. Their times are those of the host's clock: nothing about hardware.

use std::ffi::c_uint;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::{export, put};
use crate::handles::Handle;
use crate::status::{Answer, Status};
use crate::system::{Event, System};

/// The flag of an event that has no time.
const DISABLE_TIMING: c_uint = 2;

export! {
    /// An event of the current context.
    fn cuEventCreate(event: *mut Handle, flags: c_uint) {
        let system = System::get()?;
        system.current()?;
        let new = Event { timing: flags & DISABLE_TIMING == 0, recorded: Arc::default() };
        // SAFETY: the caller's.
        unsafe { put(event, system.events.insert(new)) }
    }

    /// Marks the present end of a stream.
    fn cuEventRecord(event: Handle, stream: Handle) {
        let system = System::get()?;
        let event = system.events.get(event)?;
        system.stream_here(stream)?;
        *event.recorded.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        Ok(())
    }

    /// Every event is reached.
    fn cuEventQuery(event: Handle) {
        System::get()?.events.get(event).map(drop)
    }

    /// Every event is reached.
    fn cuEventSynchronize(event: Handle) {
        System::get()?.events.get(event).map(drop)
    }

    /// Milliseconds of the host's clock between two events.
    fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle) {
        let system = System::get()?;
        let (start, end) = (time(&system.events.get(start)?)?, time(&system.events.get(end)?)?);
        let elapsed = end.saturating_duration_since(start).as_secs_f32() * 1e3;
        // SAFETY: the caller's.
        unsafe { put(milliseconds, elapsed) }
    }

    /// Ends an event.
    fn cuEventDestroy_v2(event: Handle) {
        System::get()?.events.remove(event).map(drop)
    }
}

fn time(event: &Event) -> Answer<Instant> {
    let recorded = *event.recorded.lock().unwrap_or_else(PoisonError::into_inner);
    recorded.filter(|_| event.timing).ok_or(Status::InvalidHandle)
}

//! Contexts: one for each device, and the stack of current ones of each thread.

use std::ffi::c_int;

use super::{export, int, put};
use crate::handles::Handle;
use crate::status::Status;
use crate::system::{System, with_stack};

export! {
    /// The device's context.
    fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) {
        let system = System::get()?;
        let device = system.device(device)?;
        // SAFETY: the caller's.
        unsafe { put(context, system.context_of(device)) }
    }

    /// A virtual device's context costs nothing, and stays.
    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        System::get()?.device(device).map(drop)
    }

    /// Makes a context current.
    fn cuCtxPushCurrent_v2(context: Handle) {
        System::get()?.contexts.get(context).map_err(|_| Status::InvalidContext)?;
        with_stack(|stack| stack.push(context));
        Ok(())
    }

    /// Makes the one before it current again.
    fn cuCtxPopCurrent_v2(context: *mut Handle) {
        System::get()?;
        let top = with_stack(Vec::pop).ok_or(Status::InvalidContext)?;
        // SAFETY: the caller's; null is allowed here.
        if context.is_null() { Ok(()) } else { unsafe { put(context, top) } }
    }

    /// Replaces the current context; null takes it away.
    fn cuCtxSetCurrent(context: Handle) {
        let system = System::get()?;
        if !context.is_null() {
            system.contexts.get(context).map_err(|_| Status::InvalidContext)?;
        }
        with_stack(|stack| {
            stack.pop();
            if !context.is_null() {
                stack.push(context);
            }
        });
        Ok(())
    }

    /// The current context, or null.
    fn cuCtxGetCurrent(context: *mut Handle) {
        System::get()?;
        let top = with_stack(|stack| stack.last().copied()).unwrap_or(std::ptr::null_mut());
        // SAFETY: the caller's.
        unsafe { put(context, top) }
    }

    /// The device of the current context.
    fn cuCtxGetDevice(device: *mut c_int) {
        let current = System::get()?.current()?;
        // SAFETY: the caller's.
        unsafe { put(device, int(current as u64)) }
    }

    /// Work is done when it is enqueued.
    fn cuCtxSynchronize() {
        System::get()?.current().map(drop)
    }
}

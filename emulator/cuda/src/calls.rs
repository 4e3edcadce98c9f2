//! The exported calls, by what they are about.

mod context;
mod device;
mod event;
mod launch;
mod memory;
mod module;
mod stream;

use std::ffi::c_int;

use crate::status::{Answer, Status};

/// Exports calls of the driver: the body of each gives a result and runs behind a guard.
macro_rules! export {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// Pointers are valid for what the driver's documentation says about this call.
        #[allow(non_snake_case, clippy::too_many_arguments, reason = "the driver's own names and arguments")]
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: $type),*) -> std::ffi::c_int {
            $crate::fault::guard(|| $body)
        }
    )*};
}
pub(crate) use export;

/// Writes an output.
///
/// # Errors
/// [`Status::InvalidValue`] for null.
///
/// # Safety
/// `to` is null or valid for a write.
pub(crate) unsafe fn put<T>(to: *mut T, value: T) -> Answer {
    if to.is_null() {
        return Err(Status::InvalidValue);
    }
    // SAFETY: the caller's.
    unsafe { to.write(value) };
    Ok(())
}

/// A number the driver's interface has as an int.
pub(crate) fn int(value: u64) -> c_int {
    c_int::try_from(value).unwrap_or(c_int::MAX)
}

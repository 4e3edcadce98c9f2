//! What wgpu reports, as errors of the contract.

use tilefold_core::DeviceError;
use tilefold_kernels::wgsl::DispatchError;

/// Status of errors that have no number of their own.
const NO_STATUS: i64 = -1;

/// An error that a scope has caught in `call`.
pub(crate) fn caught(call: &'static str, error: &wgpu::Error) -> DeviceError {
    match error {
        wgpu::Error::OutOfMemory { .. } => {
            tracing::warn!(call, "the driver is out of memory");
            DeviceError::OutOfMemory { asked: 0, free: 0 }
        }
        error => driver(call, error.to_string()),
    }
}

/// An error of a call that asks for so many bytes, with that number.
pub(crate) fn asked(bytes: u64) -> impl Fn(DeviceError) -> DeviceError {
    move |error| match error {
        DeviceError::OutOfMemory { free, .. } => DeviceError::OutOfMemory { asked: bytes, free },
        error => error,
    }
}

/// A failure of `call`.
pub(crate) fn driver(call: &'static str, message: String) -> DeviceError {
    DeviceError::Driver { call, status: NO_STATUS, message }
}

/// A call that the device's limits do not allow.
pub(crate) fn unsupported(error: &DispatchError) -> DeviceError {
    DeviceError::Unsupported { limit: error.to_string() }
}

/// Either of what a call can end with before anything is enqueued.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) DeviceError);

impl From<DispatchError> for Refused {
    fn from(error: DispatchError) -> Self {
        Self(unsupported(&error))
    }
}

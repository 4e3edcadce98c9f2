//! From a driver's status to a typed error that says what to do.

use std::ffi::c_int;

use cudarc::driver::sys::CUresult;
use tilefold_core::DeviceError;

use crate::driver::Driver;

/// A call that did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The call.
    pub(crate) call: &'static str,
    /// Its status.
    pub(crate) status: c_int,
}

/// After these the context is unusable, whatever is called next.
const POISONED: [CUresult; 6] = [
    CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
    CUresult::CUDA_ERROR_LAUNCH_FAILED,
    CUresult::CUDA_ERROR_MISALIGNED_ADDRESS,
    CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION,
    CUresult::CUDA_ERROR_LAUNCH_TIMEOUT,
    CUresult::CUDA_ERROR_ASSERT,
];

/// The device, or its driver, is gone.
const LOST: [CUresult; 5] = [
    CUresult::CUDA_ERROR_DEINITIALIZED,
    CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE,
    CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED,
    CUresult::CUDA_ERROR_ECC_UNCORRECTABLE,
    CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE,
];

/// A driver that refuses an image with one of these may take another form of it.
const REFUSED: [CUresult; 4] = [
    CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU,
    CUresult::CUDA_ERROR_INVALID_IMAGE,
    CUresult::CUDA_ERROR_INVALID_SOURCE,
    CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
];

impl Failure {
    /// Reads a status.
    pub(crate) fn check(call: &'static str, status: c_int) -> Result<(), Self> {
        if status == CUresult::CUDA_SUCCESS as c_int { Ok(()) } else { Err(Self { call, status }) }
    }

    /// Whether the status is this one.
    pub(crate) fn is(self, status: CUresult) -> bool {
        self.status == status as c_int
    }

    /// Whether the driver cannot use the code it was given.
    pub(crate) fn refuses_image(self) -> bool {
        REFUSED.into_iter().any(|status| self.is(status))
    }

    /// The error of a call to a driver that is loaded.
    pub(crate) fn describe(self, driver: &Driver) -> DeviceError {
        let message = driver.message(self.status);
        if LOST.into_iter().any(|status| self.is(status)) {
            return DeviceError::Lost { message: format!("{}: {message}", self.call) };
        }
        let advice = if POISONED.into_iter().any(|status| self.is(status)) {
            "; the driver lets this process use the device no longer, start it again"
        } else if self.is(CUresult::CUDA_ERROR_OUT_OF_MEMORY) {
            "; free memory of the device, other processes' included"
        } else {
            ""
        };
        DeviceError::Driver { call: self.call, status: self.status.into(), message: message + advice }
    }
}

impl From<Failure> for DeviceError {
    fn from(failure: Failure) -> Self {
        match Driver::get() {
            Ok(driver) => failure.describe(driver),
            Err(error) => {
                Self::Driver { call: failure.call, status: failure.status.into(), message: error.to_string() }
            }
        }
    }
}

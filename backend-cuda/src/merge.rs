//! Merging (out, lse) pairs over disjoint keys: equations (17)-(18).

use tilefold_core::{DeviceError, DeviceResult, MergeArgs};

use crate::device::Limits;
use crate::stream::CudaStream;

/// Adds the operands' part into their accumulator.
///
/// # Errors
/// [`DeviceError::Unsupported`].
pub(crate) fn merge(_: &CudaStream, _: Limits, _: MergeArgs<'_>) -> DeviceResult<()> {
    Err(DeviceError::Unsupported { limit: "merging on CUDA devices; merge on the CPU".to_owned() })
}

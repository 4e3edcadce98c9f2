//! Attention: plan, forward, backward.

use tilefold_core::{
    AttentionPlan, AttentionProblem, BackwardArgs, DeviceError, DeviceId, DeviceResult, ForwardArgs,
};

use crate::device::Limits;
use crate::stream::CudaStream;

/// Tiles and workspace of a problem.
///
/// # Errors
/// [`DeviceError::Unsupported`] naming the limit.
pub(crate) fn plan(_: &AttentionProblem, _: DeviceId, _: Limits) -> DeviceResult<AttentionPlan> {
    Err(DeviceError::Unsupported { limit: "attention on CUDA devices; compute on the CPU".to_owned() })
}

/// Enqueues a forward launch.
///
/// # Errors
/// What compiler and driver report.
pub(crate) fn forward(_: &CudaStream, _: Limits, _: ForwardArgs<'_>) -> DeviceResult<()> {
    Err(DeviceError::Unsupported { limit: "attention on CUDA devices; compute on the CPU".to_owned() })
}

/// Enqueues the launches of a backward pass.
///
/// # Errors
/// What compiler and driver report.
pub(crate) fn backward(_: &CudaStream, _: Limits, _: BackwardArgs<'_>) -> DeviceResult<()> {
    Err(DeviceError::Unsupported { limit: "attention gradients on CUDA devices; compute on the CPU".to_owned() })
}

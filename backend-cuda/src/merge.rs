//! Merging (out, lse) pairs over disjoint keys: equations (17)-(18).

use tilefold_core::{DeviceResult, MergeArgs};

use crate::device::Limits;
use crate::module::launch_all;
use crate::stream::CudaStream;

/// Adds the operands' part into their accumulator.
///
/// # Errors
/// What compiler and driver report.
pub(crate) fn merge(stream: &CudaStream, limits: Limits, args: MergeArgs<'_>) -> DeviceResult<()> {
    launch_all(stream, limits, tilefold_kernels::merge(&args.into_operands()))
}

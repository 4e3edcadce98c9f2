//! Rotary position embedding: equations (19)-(21).

use tilefold_core::{DeviceResult, RopeArgs};

use crate::device::Limits;
use crate::module::launch_all;
use crate::stream::CudaStream;

/// Turns the pairs of every head.
///
/// # Errors
/// What compiler and driver report.
pub(crate) fn rope(stream: &CudaStream, limits: Limits, args: RopeArgs<'_>) -> DeviceResult<()> {
    let (spec, angles) = (args.spec().clone(), args.spec().angles());
    let (source, destination) = args.into_parts();
    launch_all(stream, limits, tilefold_kernels::rope(&spec, &angles, &source, destination.as_view()))
}

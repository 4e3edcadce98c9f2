//! `destination += source`.

use tilefold_core::{AccumulateArgs, DeviceResult};

use crate::device::Limits;
use crate::module::launch_all;
use crate::stream::CudaStream;

/// Adds source to destination element by element.
///
/// # Errors
/// What compiler and driver report.
pub(crate) fn accumulate(stream: &CudaStream, limits: Limits, args: AccumulateArgs<'_>) -> DeviceResult<()> {
    let (source, destination) = args.into_parts();
    launch_all(stream, limits, tilefold_kernels::accumulate(&source, destination.as_view()))
}

//! Fills, strided copies and casts.

use tilefold_core::{DeviceResult, RelayoutArgs, TensorViewMut};

use crate::device::Limits;
use crate::module::launch_all;
use crate::stream::CudaStream;

/// Copies source to destination element by element, rounding where the dtypes differ.
///
/// # Errors
/// What compiler and driver report.
pub(crate) fn relayout(stream: &CudaStream, limits: Limits, args: RelayoutArgs<'_>) -> DeviceResult<()> {
    let (source, destination) = args.into_parts();
    launch_all(stream, limits, tilefold_kernels::relayout(&source, destination.as_view()))
}

/// Sets every element to `value`.
///
/// # Errors
/// What compiler and driver report.
pub(crate) fn fill(
    stream: &CudaStream,
    limits: Limits,
    destination: &TensorViewMut<'_>,
    value: f64,
) -> DeviceResult<()> {
    launch_all(stream, limits, tilefold_kernels::fill_view(destination.as_view(), value))
}

//! Fills, strided copies and casts.

use tilefold_core::{DeviceResult, RelayoutArgs, TensorViewMut};
use tilefold_kernels::wgsl;

use crate::context::Context;
use crate::error::unsupported;
use crate::module::submit;

/// Copies source to destination element by element, rounding where the dtypes differ.
///
/// # Errors
/// [`tilefold_core::DeviceError::Unsupported`] for more axes than kernels take, and what wgpu reports.
pub(crate) fn relayout(context: &Context, args: RelayoutArgs<'_>) -> DeviceResult<()> {
    let (source, destination) = args.into_parts();
    let dispatches =
        wgsl::relayout(&source, destination.as_view(), &context.limits).map_err(|error| unsupported(&error))?;
    submit(context, dispatches)
}

/// Sets every element to `value`.
///
/// # Errors
/// As [`relayout`].
pub(crate) fn fill(context: &Context, destination: &TensorViewMut<'_>, value: f64) -> DeviceResult<()> {
    let dispatches = wgsl::fill(destination.as_view(), value, &context.limits).map_err(|error| unsupported(&error))?;
    submit(context, dispatches)
}

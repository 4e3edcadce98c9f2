//! Fills, strided copies and casts.

use std::sync::Arc;

use tilefold_core::{DeviceResult, RelayoutArgs, TensorViewMut};
use tilefold_kernels::wgsl;

use crate::calls::{What, enqueue};
use crate::context::Context;
use crate::error::unsupported;

/// Copies source to destination element by element, rounding where the dtypes differ.
///
/// # Errors
/// [`tilefold_core::DeviceError::Unsupported`] for more axes than kernels take, and what wgpu reports.
pub(crate) fn relayout(context: &Arc<Context>, args: RelayoutArgs<'_>) -> DeviceResult<()> {
    let (source, destination) = args.into_parts();
    let destination = destination.as_view();
    enqueue(context, What::Relayout, &[Some(&source), Some(destination)], |_| {
        wgsl::relayout(&source, destination, &context.limits).map_err(|error| unsupported(&error))
    })
}

/// Sets every element to `value`.
///
/// # Errors
/// As [`relayout`].
pub(crate) fn fill(context: &Arc<Context>, destination: &TensorViewMut<'_>, value: f64) -> DeviceResult<()> {
    let destination = destination.as_view();
    enqueue(context, What::Fill(value), &[Some(destination)], |_| {
        wgsl::fill(destination, value, &context.limits).map_err(|error| unsupported(&error))
    })
}

//! `destination += source`.

use std::sync::Arc;

use tilefold_core::{AccumulateArgs, DeviceResult};
use tilefold_kernels::wgsl;

use crate::calls::{What, enqueue};
use crate::context::Context;
use crate::error::unsupported;

/// Adds source to destination element by element.
///
/// # Errors
/// [`tilefold_core::DeviceError::Unsupported`] for more axes than kernels take, and what wgpu reports.
pub(crate) fn accumulate(context: &Arc<Context>, args: AccumulateArgs<'_>) -> DeviceResult<()> {
    let (source, destination) = args.into_parts();
    let destination = destination.as_view();
    enqueue(context, What::Accumulate, &[Some(&source), Some(destination)], |_| {
        wgsl::accumulate(&source, destination, &context.limits).map_err(|error| unsupported(&error))
    })
}

//! Rotary position embedding: equations (19)-(21).

use std::sync::Arc;

use tilefold_core::{DeviceResult, RopeArgs};
use tilefold_kernels::wgsl;

use crate::calls::{What, enqueue};
use crate::context::Context;
use crate::error::unsupported;

/// Turns the pairs of every head.
///
/// # Errors
/// [`tilefold_core::DeviceError::Unsupported`] for a layout that no binding can show, and what wgpu reports.
pub(crate) fn rope(context: &Arc<Context>, args: RopeArgs<'_>) -> DeviceResult<()> {
    let spec = args.spec().clone();
    let (source, destination) = args.into_parts();
    let destination = destination.as_view();
    enqueue(context, What::Rope(&spec), &[Some(&source), Some(destination)], |_| {
        let angles = spec.angles();
        wgsl::rope(&spec, &angles, &source, destination, &context.limits).map_err(|error| unsupported(&error))
    })
}

//! Merging (out, lse) pairs over disjoint keys: equations (17)-(18).

use tilefold_core::{DeviceResult, MergeArgs};
use tilefold_kernels::wgsl;

use crate::context::Context;
use crate::error::unsupported;
use crate::module::submit;

/// Adds the operands' part into their accumulator.
///
/// # Errors
/// [`tilefold_core::DeviceError::Unsupported`] for a layout that no binding can show, and what wgpu reports.
pub(crate) fn merge(context: &Context, args: MergeArgs<'_>) -> DeviceResult<()> {
    let dispatches = wgsl::merge(&args.into_operands(), &context.limits).map_err(|error| unsupported(&error))?;
    submit(context, dispatches)
}

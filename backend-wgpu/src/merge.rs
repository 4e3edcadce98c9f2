//! Merging (out, lse) pairs over disjoint keys: equations (17)-(18).

use std::sync::Arc;

use tilefold_core::{DeviceResult, MergeArgs, MergeOperands};
use tilefold_kernels::wgsl;

use crate::calls::{What, enqueue};
use crate::context::Context;
use crate::error::unsupported;

/// Adds the operands' part into their accumulator.
///
/// # Errors
/// [`tilefold_core::DeviceError::Unsupported`] for a layout that no binding can show, and what wgpu reports.
pub(crate) fn merge(context: &Arc<Context>, args: MergeArgs<'_>) -> DeviceResult<()> {
    let operands = args.into_operands();
    let MergeOperands { out, lse, lse_low, acc_out, acc_lse, acc_lse_low } = &operands;
    let parts = [out, lse, lse_low, acc_out.as_view(), acc_lse.as_view(), acc_lse_low.as_view()].map(Some);
    enqueue(context, What::Merge, &parts, |_| {
        wgsl::merge(&operands, &context.limits).map_err(|error| unsupported(&error))
    })
}

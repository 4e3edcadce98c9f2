//! Attention: plan, forward, backward.

use std::sync::Arc;

use tilefold_core::{
    AttentionPlan, AttentionProblem, BackwardArgs, DeviceResult, ForwardArgs, ForwardOperands, MAX_BIASES, TensorView,
    TensorViewMut,
};
use tilefold_kernels::params::Operand;
use tilefold_kernels::{AttentionOperands, BackwardOperands, DeviceLists, wgsl};

use crate::calls::{Space, What, enqueue};
use crate::context::Context;
use crate::error::{Refused, unsupported};
use crate::memory::write;

/// Tiles and workspace of a problem.
///
/// # Errors
/// [`DeviceError::Unsupported`] naming the limit.
pub(crate) fn plan(context: &Context, problem: &AttentionProblem) -> DeviceResult<AttentionPlan> {
    let lists_bytes = Lists::of(problem).words.len() * 4;
    // Whether bindings can show the operands depends on their layout, which the launch knows.
    let limits = wgsl::Limits { binding_bytes: u64::MAX, ..context.limits };
    let workspace = wgsl::backward_workspace_bytes(problem, &limits).map_err(|error| unsupported(&error))?;
    let workspace_bytes = usize::try_from(workspace).unwrap_or(usize::MAX);
    let forward_bytes = wgsl::forward_workspace_bytes(problem, &limits).map_err(|error| unsupported(&error))?;
    let forward_bytes = usize::try_from(forward_bytes).unwrap_or(usize::MAX);
    let tile_q = wgsl::forward_tile(problem, &context.limits);
    Ok(AttentionPlan {
        problem: problem.clone(),
        device: context.id,
        kernel: format!("wgsl-{}", problem.spec().precision()),
        tile_q: usize::try_from(tile_q).unwrap_or(usize::MAX),
        tile_k: 1,
        forward_workspace_bytes: lists_bytes.saturating_add(forward_bytes),
        backward_workspace_bytes: lists_bytes.saturating_add(workspace_bytes),
        deterministic: true,
    })
}

/// Enqueues a forward pass.
///
/// # Errors
/// [`DeviceError::Unsupported`] for a layout that no binding can show, and what wgpu reports.
pub(crate) fn forward(context: &Arc<Context>, args: ForwardArgs<'_>) -> DeviceResult<()> {
    let problem = &args.plan().problem;
    let operands = args.into_operands();
    let ForwardOperands { q, k, v, biases, key_mask, q_segments, k_segments, gate, out, lse, lse_low } = &operands;
    let [bias0, bias1, bias2, bias3] = std::array::from_fn(|i| biases.get(i));
    let [key_mask, q_segments, k_segments, gate] = [key_mask, q_segments, k_segments, gate].map(Option::as_ref);
    let [lse, lse_low] = [lse, lse_low].map(written);
    let [q, k, v, out] = [q, k, v, out.as_view()].map(Some);
    let views = [q, k, v, bias0, bias1, bias2, bias3, key_mask, q_segments, k_segments, gate, out, lse, lse_low];
    enqueue(context, What::Forward(problem), &views, |space| {
        let (operands, outputs) = AttentionOperands::of_forward(&operands, Lists::of(problem).upload(space)?);
        let workspace = |bytes| space.workspace(bytes).map_err(Refused);
        wgsl::forward(problem, &operands, &outputs, &context.limits, workspace).map_err(|refused| refused.0)
    })
}

/// Enqueues the launches of a backward pass.
///
/// # Errors
/// As [`forward`].
pub(crate) fn backward(context: &Arc<Context>, args: BackwardArgs<'_>) -> DeviceResult<()> {
    let problem = &args.plan().problem;
    let operands = args.into_operands();
    #[rustfmt::skip]
    let tilefold_core::BackwardOperands {
        q, k, v, biases, key_mask, q_segments, k_segments, gate, out, lse, lse_low, d_out, dq, dk, dv, dbiases, d_gate,
    } = &operands;
    let [bias0, bias1, bias2, bias3] = std::array::from_fn(|i| biases.get(i));
    let [dbias0, dbias1, dbias2, dbias3] = std::array::from_fn(|i| dbiases.get(i).and_then(written));
    let [key_mask, q_segments, k_segments, gate] = [key_mask, q_segments, k_segments, gate].map(Option::as_ref);
    let [q, k, v, out, lse, lse_low, d_out] = [q, k, v, out, lse, lse_low, d_out].map(Some);
    let [dq, dk, dv, d_gate] = [dq, dk, dv, d_gate].map(written);
    #[rustfmt::skip]
    let views = [
        q, k, v, bias0, bias1, bias2, bias3, key_mask, q_segments, k_segments, gate, out, lse, lse_low, d_out,
        dq, dk, dv, dbias0, dbias1, dbias2, dbias3, d_gate,
    ];
    enqueue(context, What::Backward(problem), &views, |space| {
        let operands = BackwardOperands::of(&operands, Lists::of(problem).upload(space)?);
        let workspace = |bytes| space.workspace(bytes).map_err(Refused);
        wgsl::backward(problem, &operands, &context.limits, workspace).map_err(|refused| refused.0)
    })
}

/// A result as a view of what is there.
fn written<'v>(view: &'v Option<TensorViewMut<'_>>) -> Option<&'v TensorView<'v>> {
    view.as_ref().map(TensorViewMut::as_view)
}

// The keys of calls have room for so many.
const _: () = assert!(MAX_BIASES == 4);

/// Lists of a problem that the kernels read from the device.
#[derive(Debug, Default)]
struct Lists {
    /// `kv_lengths`, u32, then `alibi_slopes`, f32.
    words: Vec<u32>,
    kv_lengths: Option<[i64; 2]>,
    slopes_at: Option<usize>,
}

impl Lists {
    fn of(problem: &AttentionProblem) -> Self {
        let spec = problem.spec();
        let mut lists = Self::default();
        if let Some(lengths) = &spec.kv_lengths {
            lists.words.extend(lengths.iter().map(|&length| u32::try_from(length).unwrap_or(u32::MAX)));
            lists.kv_lengths = Some(tilefold_kernels::kv_lengths_strides(problem));
        }
        if let Some(slopes) = &spec.mask.alibi_slopes {
            lists.slopes_at = Some(lists.words.len());
            lists.words.extend(slopes.iter().map(|slope| slope.to_bits()));
        }
        lists
    }

    fn upload(self, space: &mut Space<'_>) -> DeviceResult<DeviceLists> {
        if self.words.is_empty() {
            return Ok(DeviceLists::default());
        }
        let bytes: &[u8] = bytemuck::cast_slice(&self.words);
        let address = space.kept(bytes.len() as u64)?;
        write(space.context, bytes, address)?;
        let alibi_slopes = self.slopes_at.map(|at| address + 4 * at as u64);
        let kv_lengths = self.kv_lengths.map(|[batch, row]| Operand { data: address, strides: [batch, row, 0, 0, 0] });
        Ok(DeviceLists { kv_lengths, alibi_slopes })
    }
}

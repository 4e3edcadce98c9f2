//! Attention: plan, forward, backward.

use std::sync::Arc;

use tilefold_core::{AttentionPlan, AttentionProblem, BackwardArgs, DeviceResult, ForwardArgs};
use tilefold_kernels::params::Operand;
use tilefold_kernels::{AttentionOperands, BackwardOperands, DeviceLists, wgsl};

use crate::context::Context;
use crate::error::{Refused, unsupported};
use crate::memory::{Block, write};
use crate::module::submit;

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
    let tile_q = wgsl::forward_tile(problem, &context.limits);
    Ok(AttentionPlan {
        problem: problem.clone(),
        device: context.id,
        kernel: format!("wgsl-{}", problem.spec().precision()),
        tile_q: usize::try_from(tile_q).unwrap_or(usize::MAX),
        tile_k: 1,
        forward_workspace_bytes: lists_bytes,
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
    let lists = Lists::of(problem).upload(context)?;
    let (operands, outputs) = AttentionOperands::of_forward(&args.into_operands(), lists.on_device);
    let mut blocks = Vec::new();
    let workspace = |bytes| workspace(context, bytes, &mut blocks);
    let dispatches = wgsl::forward(problem, &operands, &outputs, &context.limits, workspace);
    submit(context, dispatches.map_err(|refused| refused.0)?)
}

/// Enqueues the launches of a backward pass.
///
/// # Errors
/// As [`forward`].
pub(crate) fn backward(context: &Arc<Context>, args: BackwardArgs<'_>) -> DeviceResult<()> {
    let problem = &args.plan().problem;
    let lists = Lists::of(problem).upload(context)?;
    let operands = BackwardOperands::of(&args.into_operands(), lists.on_device);
    let mut blocks = Vec::new();
    let workspace = |bytes| workspace(context, bytes, &mut blocks);
    let dispatches = wgsl::backward(problem, &operands, &context.limits, workspace);
    submit(context, dispatches.map_err(|refused| refused.0)?)
}

/// The address of memory that lives as long as `blocks`.
fn workspace(context: &Arc<Context>, bytes: u64, blocks: &mut Vec<Block>) -> Result<u64, Refused> {
    let block = Block::new(context, bytes).map_err(Refused)?;
    let address = block.address();
    blocks.push(block);
    Ok(address)
}

/// Lists of a problem that the kernels read from the device.
#[derive(Debug, Default)]
struct Lists {
    /// `kv_lengths`, u32, then `alibi_slopes`, f32.
    words: Vec<u32>,
    kv_lengths: Option<[i64; 2]>,
    slopes_at: Option<usize>,
}

/// Lists on the device, until dropped.
#[derive(Debug, Default)]
struct Uploaded {
    on_device: DeviceLists,
    _block: Option<Block>,
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

    fn upload(self, context: &Arc<Context>) -> DeviceResult<Uploaded> {
        if self.words.is_empty() {
            return Ok(Uploaded::default());
        }
        let bytes: &[u8] = bytemuck::cast_slice(&self.words);
        let block = Block::new(context, bytes.len() as u64)?;
        let address = block.address();
        write(context, bytes, address)?;
        let alibi_slopes = self.slopes_at.map(|at| address + 4 * at as u64);
        let kv_lengths = self.kv_lengths.map(|[batch, row]| Operand { data: address, strides: [batch, row, 0, 0, 0] });
        Ok(Uploaded { on_device: DeviceLists { kv_lengths, alibi_slopes }, _block: Some(block) })
    }
}

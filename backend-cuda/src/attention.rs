//! Attention: plan, forward, backward.

use tilefold_core::{AttentionPlan, AttentionProblem, BackwardArgs, DeviceError, DeviceId, DeviceResult, ForwardArgs};
use tilefold_kernels::params::Operand;
use tilefold_kernels::{
    AttentionOperands, BackwardLaunch, BackwardOperands, DeviceLists, ForwardKernel, ForwardOutputs, Vendor,
    backward_shared_bytes, backward_workspace_bytes, kv_lengths_strides,
};

use crate::device::Limits;
use crate::memory::{Block, send};
use crate::module::{launch_all, unsupported};
use crate::stream::CudaStream;

/// Tiles and workspace of a problem.
///
/// # Errors
/// [`DeviceError::Unsupported`] naming the limit.
pub(crate) fn plan(problem: &AttentionProblem, device: DeviceId, limits: Limits) -> DeviceResult<AttentionPlan> {
    let spec = problem.spec();
    let kernel = ForwardKernel::new(Vendor::Nvidia, problem, &AttentionOperands::default(), &ForwardOutputs::default());
    let (tile_q, tile_k) = (kernel.tile.tile_q(), kernel.tile.tile_k);
    let backward_shared = usize::try_from(backward_shared_bytes(Vendor::Nvidia, problem)).map_err(unsupported)?;
    let shared = kernel.shared_bytes().max(backward_shared);
    if shared > usize::try_from(limits.shared_bytes).unwrap_or(usize::MAX) {
        let limit = format!(
            "head_dim {} and head_dim_v {} in {} need {shared} bytes of shared memory, and {device} has {}; use smaller \
heads or another dtype",
            spec.head_dim, spec.head_dim_v, spec.dtype, limits.shared_bytes
        );
        return Err(DeviceError::Unsupported { limit });
    }
    let lists_bytes = Lists::of(problem).bytes();
    Ok(AttentionPlan {
        problem: problem.clone(),
        device,
        kernel: format!("cuda-sm_{}-{}", limits.arch, spec.precision()),
        tile_q,
        tile_k,
        forward_workspace_bytes: lists_bytes,
        backward_workspace_bytes: lists_bytes.saturating_add(workspace_bytes(problem)),
        deterministic: true,
    })
}

/// Enqueues a forward launch.
///
/// # Errors
/// What compiler and driver report.
pub(crate) fn forward(stream: &CudaStream, limits: Limits, args: ForwardArgs<'_>) -> DeviceResult<()> {
    let problem = &args.plan().problem;
    let lists = Lists::of(problem).upload(stream)?;
    let (operands, outputs) = AttentionOperands::of_forward(&args.into_operands(), lists.on_device);
    launch_all(stream, limits, tilefold_kernels::forward(Vendor::Nvidia, problem, &operands, &outputs))
}

/// Enqueues the launches of a backward pass.
///
/// # Errors
/// What compiler and driver report.
pub(crate) fn backward(stream: &CudaStream, limits: Limits, args: BackwardArgs<'_>) -> DeviceResult<()> {
    let problem = &args.plan().problem;
    let lists = Lists::of(problem).upload(stream)?;
    let operands = BackwardOperands::of(&args.into_operands(), lists.on_device);
    let bytes = workspace_bytes(problem);
    let workspace = (bytes > 0).then(|| Block::new(stream, bytes)).transpose()?;
    let address = workspace.as_ref().map_or(0, Block::address);
    for launch in tilefold_kernels::backward(Vendor::Nvidia, problem, &operands, address).map_err(unsupported)? {
        match launch {
            BackwardLaunch::Attention(launch) => launch_all(stream, limits, Ok(*launch))?,
            BackwardLaunch::Sums(launch) => launch_all(stream, limits, Ok(*launch))?,
        }
    }
    Ok(())
}

/// Workspace of a backward pass beside the lists; none where it has no launches.
fn workspace_bytes(problem: &AttentionProblem) -> usize {
    let asked = problem.spec().gradients;
    let any = asked.q || asked.k || asked.v || asked.gate || asked.biases.contains(&true);
    if any { usize::try_from(backward_workspace_bytes(Vendor::Nvidia, problem)).unwrap_or(usize::MAX) } else { 0 }
}

/// Lists of a problem that the kernels read from the device: the only workspace of a forward launch.
#[derive(Debug, Default)]
struct Lists {
    /// `kv_lengths`, i64, then `alibi_slopes`, f32.
    data: Vec<u8>,
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
            lists.data.extend(bytemuck::cast_slice(lengths));
            lists.kv_lengths = Some(kv_lengths_strides(problem));
        }
        if let Some(slopes) = &spec.mask.alibi_slopes {
            lists.slopes_at = Some(lists.data.len());
            lists.data.extend(bytemuck::cast_slice(slopes));
        }
        lists
    }

    fn bytes(&self) -> usize {
        self.data.len()
    }

    fn upload(self, stream: &CudaStream) -> DeviceResult<Uploaded> {
        if self.data.is_empty() {
            return Ok(Uploaded::default());
        }
        let block = Block::new(stream, self.bytes())?;
        let address = block.address();
        let offset = |at| u64::try_from(at).map(|at| address + at);
        let alibi_slopes = self.slopes_at.map(offset).transpose().map_err(unsupported)?;
        let kv_lengths = self.kv_lengths.map(|[batch, row]| Operand { data: address, strides: [batch, row, 0, 0, 0] });
        send(stream, self.data, address)?;
        Ok(Uploaded { on_device: DeviceLists { kv_lengths, alibi_slopes }, _block: Some(block) })
    }
}

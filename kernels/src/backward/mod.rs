//! The backward pass as a list of launches: preparation, passes by keys, passes by queries, sums of partials.
//!
//! `attention/README.md` describes the kernels. What is decided from the problem alone (passes, tiles, chunks, workspace)
//! is [`schedule`]; what addresses and strides decide (pieces of 16 bytes) is decided here.

mod examples;
mod launches;
mod schedule;
mod tiles;

pub(crate) use examples::kernels;
use launches::Launches;
use schedule::Schedule;
use tilefold_core::{AttentionProblem, DType, TensorView, TensorViewMut};

use crate::kernel::{Kernel, KernelError, Launch};
use crate::operands::{AttentionOperands, DeviceLists};
use crate::params::{BackwardParams, Operand, SumParams};
use crate::vendor::Vendor;

/// Operands of a backward pass on a device, gradients exactly as the problem asks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BackwardOperands {
    /// What forward read.
    pub inputs: AttentionOperands,
    /// What forward wrote.
    pub out: Operand,
    /// What forward wrote.
    pub lse: Operand,
    /// What forward wrote.
    pub lse_low: Operand,
    /// Gradient of the output.
    pub d_out: Operand,
    /// Gradient of q.
    pub dq: Option<Operand>,
    /// Gradient of k.
    pub dk: Option<Operand>,
    /// Gradient of v.
    pub dv: Option<Operand>,
    /// Gradient of each bias, and its dtype: the bias's own or f32.
    pub dbiases: Vec<Option<(Operand, DType)>>,
    /// Gradient of the gate.
    pub d_gate: Option<Operand>,
}

impl BackwardOperands {
    /// Tensors of a backward pass, whose origins are addresses on the device.
    #[must_use]
    pub fn of(o: &tilefold_core::BackwardOperands<'_>, lists: DeviceLists) -> Self {
        let of = |view: &Option<TensorView<'_>>| view.as_ref().map(Operand::of);
        let written = |view: &Option<TensorViewMut<'_>>| view.as_ref().map(|view| Operand::of(view.as_view()));
        let dbias = |view: &TensorViewMut<'_>| (Operand::of(view.as_view()), view.as_view().dtype());
        Self {
            inputs: AttentionOperands {
                q: Operand::of(&o.q),
                k: Operand::of(&o.k),
                v: Operand::of(&o.v),
                biases: o.biases.iter().map(Operand::of).collect(),
                key_mask: of(&o.key_mask),
                segments: of(&o.q_segments).zip(of(&o.k_segments)).map(<[Operand; 2]>::from),
                kv_lengths: lists.kv_lengths,
                alibi_slopes: lists.alibi_slopes,
                gate: of(&o.gate),
            },
            out: Operand::of(&o.out),
            lse: Operand::of(&o.lse),
            lse_low: Operand::of(&o.lse_low),
            d_out: Operand::of(&o.d_out),
            dq: written(&o.dq),
            dk: written(&o.dk),
            dv: written(&o.dv),
            dbiases: o.dbiases.iter().map(|view| view.as_ref().map(dbias)).collect(),
            d_gate: written(&o.d_gate),
        }
    }
}

/// One launch of a backward pass; they run in order.
#[derive(Clone, Debug, PartialEq)]
pub enum BackwardLaunch {
    /// A kernel of the pass itself.
    Attention(Box<Launch<BackwardParams>>),
    /// Sums of what chunks left.
    Sums(Box<Launch<SumParams>>),
}

impl BackwardLaunch {
    /// The kernel it launches.
    #[must_use]
    pub fn kernel(&self) -> &Kernel {
        match self {
            Self::Attention(launch) => &launch.kernel,
            Self::Sums(launch) => &launch.kernel,
        }
    }
}

/// Bytes of device memory a backward launch needs beside its operands; saturates.
///
/// Three f32 for each query and head; with a gate, the gradient of the ungated output in the problem's dtype; for biases
/// without a query or key axis, one f32 for each key or query and head; and where a walk is cut into chunks, up to 8 times
/// the f32 size of dK, dV and a bias gradient and up to 4 times that of dQ. Nothing grows with seqlen_q · seqlen_k per row.
#[must_use]
pub fn backward_workspace_bytes(vendor: Vendor, problem: &AttentionProblem) -> u64 {
    Schedule::new(vendor, problem).workspace.bytes
}

/// Shared memory that some block of a backward pass takes; no more than every supported device of the
/// vendor has.
#[must_use]
pub fn backward_shared_bytes(vendor: Vendor, problem: &AttentionProblem) -> u32 {
    let schedule = Schedule::new(vendor, problem);
    let keys = schedule.keys.iter().map(|pass| pass.tiles.shared_bytes);
    keys.chain(schedule.queries.iter().map(|pass| pass.tiles.shared_bytes)).max().unwrap_or(0)
}

/// The launches of a backward pass. `workspace` is the address of [`backward_workspace_bytes`] bytes, aligned to 256.
///
/// *Numerics*: sums, softmax and dS in f32, in an order that depends on the problem alone; no atomics: equal inputs give
/// equal bits.
///
/// # Errors
/// [`KernelError`].
pub fn backward(
    vendor: Vendor,
    problem: &AttentionProblem,
    operands: &BackwardOperands,
    workspace: u64,
) -> Result<Vec<BackwardLaunch>, KernelError> {
    Launches::new(vendor, problem, operands, workspace)?.list()
}

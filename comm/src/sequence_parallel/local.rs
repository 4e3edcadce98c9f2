//! Attention of one rank by itself, with its results allocated on its device.

use tilefold_core::{
    AttentionProblem, BackwardArgs, BackwardOperands, DType, ForwardArgs, ForwardOperands, Tensor, TensorView,
};

use super::ring::{ShardBackward, ShardForward};
use crate::error::Result;
use crate::rank::Rank;

/// What attention reads.
#[derive(Clone)]
pub(super) struct Operands<'s> {
    pub(super) q: TensorView<'s>,
    pub(super) k: TensorView<'s>,
    pub(super) v: TensorView<'s>,
    pub(super) biases: Vec<TensorView<'s>>,
    pub(super) key_mask: Option<TensorView<'s>>,
    pub(super) q_segments: Option<TensorView<'s>>,
    pub(super) k_segments: Option<TensorView<'s>>,
    pub(super) gate: Option<TensorView<'s>>,
}

/// A forward pass.
///
/// # Errors
/// A [`tilefold_core::ProblemError`] for an operand that does not fit; what the device reports.
pub(super) fn forward(rank: &Rank<'_>, problem: &AttentionProblem, operands: Operands<'_>) -> Result<ShardForward> {
    let plan = rank.device.plan_attention(problem)?;
    let mut out = rank.zeros(problem.spec().dtype, &problem.out_shape())?;
    let mut lse = rank.zeros(DType::F32, &problem.lse_shape())?;
    let mut lse_low = rank.zeros(DType::F32, &problem.lse_shape())?;
    let Operands { q, k, v, biases, key_mask, q_segments, k_segments, gate } = operands;
    #[rustfmt::skip]
    let operands = ForwardOperands {
        q, k, v, biases, key_mask, q_segments, k_segments, gate,
        out: out.view_mut(), lse: Some(lse.view_mut()), lse_low: Some(lse_low.view_mut()),
    };
    rank.device.attention_forward(rank.stream, ForwardArgs::new(&plan, operands)?)?;
    Ok(ShardForward { out, lse, lse_low })
}

/// The gradients that the problem asks for.
///
/// # Errors
/// As [`forward`].
pub(super) fn backward(
    rank: &Rank<'_>,
    problem: &AttentionProblem,
    operands: Operands<'_>,
    forward: &ShardForward,
    d_out: TensorView<'_>,
) -> Result<ShardBackward> {
    let (plan, spec) = (rank.device.plan_attention(problem)?, problem.spec());
    let zeros = |wanted: bool, dtype, shape: &[usize]| wanted.then(|| rank.zeros(dtype, shape)).transpose();
    let mut dq = zeros(spec.gradients.q, spec.dtype, &problem.q_shape())?;
    let mut dk = zeros(spec.gradients.k, spec.dtype, &problem.k_shape())?;
    let mut dv = zeros(spec.gradients.v, spec.dtype, &problem.v_shape())?;
    let mut d_gate = zeros(spec.gradients.gate, spec.dtype, &problem.out_shape())?;
    let dbiases = spec.biases.iter().zip(spec.gradients.biases);
    let mut dbiases =
        dbiases.map(|(bias, wanted)| zeros(wanted, bias.dtype, &bias.shape)).collect::<Result<Vec<_>>>()?;
    let Operands { q, k, v, biases, key_mask, q_segments, k_segments, gate } = operands;
    #[rustfmt::skip]
    let operands = BackwardOperands {
        q, k, v, biases, key_mask, q_segments, k_segments, gate,
        out: forward.out.view(), lse: forward.lse.view(), lse_low: forward.lse_low.view(), d_out,
        dq: dq.as_mut().map(Tensor::view_mut),
        dk: dk.as_mut().map(Tensor::view_mut),
        dv: dv.as_mut().map(Tensor::view_mut),
        dbiases: dbiases.iter_mut().map(|gradient| gradient.as_mut().map(Tensor::view_mut)).collect(),
        d_gate: d_gate.as_mut().map(Tensor::view_mut),
    };
    rank.device.attention_backward(rank.stream, BackwardArgs::new(&plan, operands)?)?;
    Ok(ShardBackward { dq, dk, dv, d_gate, dbiases })
}

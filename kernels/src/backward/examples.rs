//! Backward kernels of representative problems, for the checks of every kernel.

use tilefold_core::{AttentionProblem, AttentionSpec, BiasSpec, DType, Layout};

use super::{BackwardOperands, backward};
use crate::kernel::{Kernel, KernelError};
use crate::operands::AttentionOperands;
use crate::params::Operand;

/// Head dimensions that kernels are tuned for, and the largest.
const HEAD_DIMS: [usize; 8] = [8, 16, 24, 32, 48, 64, 128, 256];

/// Every backward kernel of an Evoformer problem (a mask bias and a pair bias, a gate, all gradients) in every dtype, with
/// key mask and without, short and long enough for each choice of passes.
pub(crate) fn kernels() -> impl Iterator<Item = Result<Kernel, KernelError>> {
    let problems = [DType::F32, DType::F16, DType::BF16].into_iter().flat_map(|dtype| {
        HEAD_DIMS.into_iter().flat_map(move |head_dim| {
            [(256, false), (2048, true)].into_iter().map(move |(seqlen, key_mask)| (dtype, head_dim, seqlen, key_mask))
        })
    });
    let mut seen = std::collections::HashSet::new();
    let all =
        problems.flat_map(|(dtype, head_dim, seqlen, key_mask)| match launches(dtype, head_dim, seqlen, key_mask) {
            Ok(kernels) => kernels.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        });
    all.filter(move |kernel| kernel.as_ref().map_or(true, |kernel| seen.insert(kernel.hash.clone())))
}

fn launches(dtype: DType, head_dim: usize, seqlen: usize, key_mask: bool) -> Result<Vec<Kernel>, KernelError> {
    let (rows, heads) = (512, 4);
    let mut spec = AttentionSpec::new(dtype, 1, rows, seqlen, heads, head_dim);
    spec.biases = vec![
        BiasSpec { shape: [1, rows, 1, 1, seqlen], dtype },
        BiasSpec { shape: [1, 1, heads, seqlen, seqlen], dtype },
    ];
    (spec.gate, spec.key_mask) = (true, key_mask);
    // The mask bias has no gradient.
    let mut spec = spec.with_all_gradients();
    spec.gradients.biases[0] = false;
    let Ok(problem) = AttentionProblem::new(spec) else { return Ok(Vec::new()) };
    let spec = problem.spec();
    let dense = |shape: &[usize]| {
        let layout = Layout::contiguous(shape).ok();
        layout.map_or_else(Operand::default, |layout| Operand::new(256, shape, layout.strides()))
    };
    let inputs = AttentionOperands {
        q: dense(&problem.q_shape()),
        k: dense(&problem.k_shape()),
        v: dense(&problem.v_shape()),
        biases: spec.biases.iter().map(|bias| dense(&bias.shape)).collect(),
        key_mask: key_mask.then(|| dense(&[1, rows, seqlen])),
        gate: Some(dense(&problem.out_shape())),
        ..AttentionOperands::default()
    };
    let operands = BackwardOperands {
        inputs,
        out: dense(&problem.out_shape()),
        lse: dense(&problem.lse_shape()),
        lse_low: dense(&problem.lse_shape()),
        d_out: dense(&problem.out_shape()),
        dq: Some(dense(&problem.q_shape())),
        dk: Some(dense(&problem.k_shape())),
        dv: Some(dense(&problem.v_shape())),
        dbiases: vec![None, Some((dense(&spec.biases[1].shape), dtype))],
        d_gate: Some(dense(&problem.out_shape())),
    };
    Ok(backward(&problem, &operands, 256)?.iter().map(|launch| launch.kernel().clone()).collect())
}

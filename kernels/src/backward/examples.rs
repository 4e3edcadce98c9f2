//! Backward kernels of representative problems, for the checks of every kernel.

use tilefold_core::{AttentionProblem, AttentionSpec, BiasSpec, DType, EmptyRows, Layout, Precision, StructuralMask};

use super::{BackwardOperands, backward};
use crate::kernel::{Kernel, KernelError};
use crate::operands::AttentionOperands;
use crate::params::Operand;
use crate::vendor::Vendor;

/// Head dimensions that kernels are tuned for, and the largest.
const HEAD_DIMS: [usize; 8] = [8, 16, 24, 32, 48, 64, 128, 256];

const ROWS: usize = 512;
const HEADS: usize = 4;

/// Every backward kernel of these problems, and whether its speed is followed.
///
/// In every dtype, and in f32 with products of tf32, Evoformer problems (a mask bias or a key mask, a pair bias, a gate, all
/// gradients), short and long enough for each choice of passes; one problem with every switch and kind of bias, dense and
/// strided; sizes that are no multiple of a piece. f16, whose kernels differ from those of bf16 in single instructions, has
/// one head dimension of the first kind.
pub(crate) fn kernels(vendor: Vendor) -> Result<Vec<(Kernel, bool)>, KernelError> {
    let mut kernels = Vec::new();
    for precision in Precision::ALL {
        let head_dims = if precision.dtype == DType::F16 { &[32][..] } else { &HEAD_DIMS };
        for &head_dim in head_dims {
            let masked = |seqlen| AttentionSpec { key_mask: true, ..evoformer(precision, head_dim, seqlen) };
            for spec in [evoformer(precision, head_dim, 256), pair_alone(masked(256)), masked(2048)] {
                kernels.extend(launches(vendor, spec, 1)?.into_iter().map(|kernel| (kernel, true)));
            }
        }
        for (spec, step) in others(precision) {
            kernels.extend(launches(vendor, spec, step)?.into_iter().map(|kernel| (kernel, false)));
        }
    }
    Ok(kernels)
}

/// Problems whose speed is not followed, with the distance of neighbouring channels and keys in memory.
fn others(precision: Precision) -> Vec<(AttentionSpec, i64)> {
    let mut others = vec![(everything(precision), 1), (everything(precision), 3)];
    for (head_dim, head_dim_v, seqlen) in [(5, 5, 77), (20, 40, 384), (33, 16, 1000), (136, 136, 40), (8, 8, 9)] {
        let spec = AttentionSpec { head_dim_v, batch: 2, ..evoformer(precision, head_dim, seqlen) };
        let biases = spec.biases.iter().map(|bias| BiasSpec { shape: [1, 1, bias.shape[2], seqlen, seqlen], ..*bias });
        others.push((AttentionSpec { biases: biases.collect(), ..spec }, 1));
    }
    others
}

fn evoformer(Precision { dtype, products }: Precision, head_dim: usize, seqlen: usize) -> AttentionSpec {
    let mut spec = AttentionSpec::new(dtype, 1, ROWS, seqlen, HEADS, head_dim);
    spec.products = products;
    spec.biases = vec![
        BiasSpec { shape: [1, ROWS, 1, 1, seqlen], dtype },
        BiasSpec { shape: [1, 1, HEADS, seqlen, seqlen], dtype },
    ];
    spec.gate = true;
    let mut spec = spec.with_all_gradients();
    // The mask bias has no gradient.
    spec.gradients.biases[0] = false;
    spec
}

/// The same problem without its mask bias.
fn pair_alone(mut spec: AttentionSpec) -> AttentionSpec {
    spec.biases.remove(0);
    spec.with_all_gradients()
}

fn everything(Precision { dtype, products }: Precision) -> AttentionSpec {
    let seqlen = 384;
    let mut spec = AttentionSpec::new(dtype, 1, ROWS, seqlen, HEADS, 32);
    spec.products = products;
    spec.biases = vec![
        BiasSpec { shape: [1, ROWS, 1, 1, seqlen], dtype },
        BiasSpec { shape: [1, 1, HEADS, seqlen, seqlen], dtype },
        BiasSpec { shape: [1, ROWS, HEADS, seqlen, 1], dtype: DType::F32 },
        BiasSpec { shape: [1, ROWS, HEADS, seqlen, seqlen], dtype },
    ];
    (spec.key_mask, spec.kv_lengths, spec.segments, spec.gate) = (true, Some(vec![300]), true, true);
    spec.mask = StructuralMask { causal: true, alibi_slopes: Some(vec![0.5; HEADS]), ..StructuralMask::default() };
    spec.empty_rows = EmptyRows::Uniform;
    spec.with_all_gradients()
}

/// Kernels of a problem (none where it is none, which the tests refuse), in operands whose innermost axis has a stride of
/// `step`.
fn launches(vendor: Vendor, spec: AttentionSpec, step: i64) -> Result<Vec<Kernel>, KernelError> {
    let Ok(problem) = AttentionProblem::new(spec) else { return Ok(Vec::new()) };
    let spec = problem.spec();
    let dense = |shape: &[usize]| {
        let strides =
            Layout::contiguous(shape).map(|layout| layout.strides().iter().map(|stride| stride * step).collect());
        Operand::new(256, shape, &strides.unwrap_or_else(|_| vec![0; shape.len()]))
    };
    let inputs = AttentionOperands {
        q: dense(&problem.q_shape()),
        k: dense(&problem.k_shape()),
        v: dense(&problem.v_shape()),
        biases: spec.biases.iter().map(|bias| dense(&bias.shape)).collect(),
        key_mask: spec.key_mask.then(|| dense(&[spec.batch, ROWS, spec.seqlen_k])),
        segments: spec
            .segments
            .then(|| [spec.seqlen_q, spec.seqlen_k].map(|seqlen| dense(&[spec.batch, ROWS, seqlen]))),
        kv_lengths: spec.kv_lengths.is_some().then(Operand::default),
        alibi_slopes: spec.mask.alibi_slopes.is_some().then_some(256),
        gate: spec.gate.then(|| dense(&problem.out_shape())),
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
        dbiases: (spec.biases.iter().zip(spec.gradients.biases))
            .map(|(bias, wanted)| wanted.then(|| (dense(&bias.shape), bias.dtype)))
            .collect(),
        d_gate: spec.gate.then(|| dense(&problem.out_shape())),
    };
    Ok(backward(vendor, &problem, &operands, 256)?.iter().map(|launch| launch.kernel().clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_is_a_problem() {
        for precision in Precision::ALL {
            let followed = HEAD_DIMS.map(|head_dim| (evoformer(precision, head_dim, 2048), 1));
            for (spec, step) in others(precision).into_iter().chain(followed) {
                assert!(!launches(Vendor::Nvidia, spec.clone(), step).unwrap().is_empty(), "{spec:?}");
            }
        }
    }
}

//! Attention problems that together use every value of every constant.

use tilefold_core::{AttentionProblem, AttentionSpec, BiasSpec, DType, EmptyRows, Precision, StructuralMask, Window};

use crate::forward::{ForwardKernel, ForwardOutputs};
use crate::kernel::{Kernel, KernelError};
use crate::operands::AttentionOperands;
use crate::params::Operand;
use crate::vendor::Vendor;

/// Head dimensions of published models, and the largest.
const HEAD_DIMS: [usize; 9] = [8, 16, 24, 32, 48, 64, 96, 128, 256];

/// Queries and keys: more than any tile.
const SEQLEN: usize = 384;
const ROWS: usize = 16;
const HEADS: usize = 4;

/// An address that is aligned to pieces; nothing is read from it.
const ADDRESS: u64 = 1 << 20;

/// A problem, and what is not dense about its operands.
struct Case {
    spec: AttentionSpec,
    /// Elements between neighbouring channels: 2 forbids moves in pieces.
    channel_stride: i64,
    /// Whether the biases' keys are neighbours.
    strided_biases: bool,
    lse: bool,
    followed: bool,
}

/// Forward kernels, and whether their speed is followed.
pub(super) fn forward(vendor: Vendor) -> Result<Vec<(Kernel, bool)>, KernelError> {
    let mut kernels = Vec::new();
    for case in cases() {
        let Ok(problem) = AttentionProblem::new(case.spec.clone()) else { continue };
        let (operands, outputs) = case.operands(&problem);
        kernels.push((ForwardKernel::new(vendor, &problem, &operands, &outputs).kernel()?, case.followed));
    }
    Ok(kernels)
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for Precision { dtype, products } in Precision::ALL {
        let plain =
            |head_dim| AttentionSpec { products, ..AttentionSpec::new(dtype, 1, ROWS, SEQLEN, HEADS, head_dim) };
        for head_dim in HEAD_DIMS {
            let base = || plain(head_dim);
            let pair = || AttentionSpec { biases: vec![pair_bias(dtype)], ..base() };
            let masked = AttentionSpec { key_mask: true, ..pair() };
            // The half types differ in single instructions: one of them goes over every problem.
            let followed = match dtype {
                DType::BF16 => vec![masked, pair(), AttentionSpec { mask: causal(), ..base() }],
                _ => vec![masked],
            };
            cases.extend(followed.into_iter().map(|spec| Case { followed: true, ..Case::new(spec) }));
        }
        // Each switch by itself and all of them.
        let of_switches = if dtype == DType::BF16 { &[8, 32][..] } else { &[32] };
        for &head_dim in of_switches {
            cases.extend(switches(&plain(head_dim)));
        }
        // Odd sizes: channels that are no multiple of a piece, of q and of v; short sequences, a few queries of long ones.
        for (head_dim, head_dim_v, seqlen_q) in
            [(5, 5, SEQLEN), (20, 40, SEQLEN), (32, 32, 9), (64, 64, 40), (8, 8, 40)]
        {
            cases.push(Case::new(AttentionSpec { head_dim_v, seqlen_q, ..plain(head_dim) }));
        }
    }
    cases
}

fn switches(base: &AttentionSpec) -> Vec<Case> {
    let with = |change: &dyn Fn(&mut AttentionSpec)| {
        let mut spec = base.clone();
        change(&mut spec);
        Case::new(spec)
    };
    let positions =
        StructuralMask { window: Some(Window { left: Some(64), right: Some(8) }), ..StructuralMask::default() };
    let alibi = StructuralMask { alibi_slopes: Some(vec![0.5; HEADS]), ..causal() };
    let keys = |dtype| BiasSpec { shape: [1, ROWS, 1, 1, SEQLEN], dtype };
    let full = |dtype| BiasSpec { shape: [1, ROWS, HEADS, SEQLEN, SEQLEN], dtype };
    let everything = |spec: &mut AttentionSpec| {
        spec.biases = vec![pair_bias(spec.dtype), keys(DType::F32), full(spec.dtype), keys(spec.dtype)];
        (spec.key_mask, spec.kv_lengths, spec.segments) = (true, Some(vec![300]), true);
        (spec.mask, spec.gate, spec.empty_rows) = (alibi.clone(), true, EmptyRows::Uniform);
    };
    let mut strided = with(&everything);
    (strided.channel_stride, strided.strided_biases) = (2, true);
    let mut without_lse = with(&|_| {});
    without_lse.lse = false;
    vec![
        with(&|spec| spec.key_mask = true),
        with(&|spec| spec.kv_lengths = Some(vec![300])),
        with(&|spec| spec.segments = true),
        with(&|spec| spec.mask = positions.clone()),
        with(&|spec| spec.mask = alibi.clone()),
        with(&|spec| spec.gate = true),
        with(&|spec| (spec.key_mask, spec.empty_rows) = (true, EmptyRows::Uniform)),
        with(&|spec| spec.biases = vec![keys(spec.dtype)]),
        with(&|spec| spec.biases = vec![pair_bias(DType::F32)]),
        with(&|spec| spec.biases = vec![keys(spec.dtype), pair_bias(spec.dtype)]),
        with(&everything),
        strided,
        without_lse,
    ]
}

fn pair_bias(dtype: DType) -> BiasSpec {
    BiasSpec { shape: [1, 1, HEADS, SEQLEN, SEQLEN], dtype }
}

fn causal() -> StructuralMask {
    StructuralMask { causal: true, ..StructuralMask::default() }
}

impl Case {
    /// A problem with dense operands.
    fn new(spec: AttentionSpec) -> Self {
        let biases = spec.biases.iter().map(|bias| {
            let queries = if bias.shape[3] == 1 { 1 } else { spec.seqlen_q };
            BiasSpec { shape: [bias.shape[0], bias.shape[1], bias.shape[2], queries, bias.shape[4]], ..*bias }
        });
        let biases = biases.collect();
        let spec = AttentionSpec { biases, ..spec };
        Self { spec, channel_stride: 1, strided_biases: false, lse: true, followed: false }
    }

    fn operands(&self, problem: &AttentionProblem) -> (AttentionOperands, ForwardOutputs) {
        let spec = problem.spec();
        let heads =
            |seqlen, heads, channels| dense(&[spec.batch, spec.rows, seqlen, heads, channels], self.channel_stride);
        let bias = |bias: &BiasSpec| dense(&bias.shape, if self.strided_biases { 3 } else { 1 });
        let row = |seqlen| dense(&[spec.batch, spec.rows, seqlen], 1);
        let lse = self.lse.then(|| dense(&[spec.batch, spec.rows, spec.heads, spec.seqlen_q], 1));
        let operands = AttentionOperands {
            q: heads(spec.seqlen_q, spec.heads, spec.head_dim),
            k: heads(spec.seqlen_k, spec.kv_heads, spec.head_dim),
            v: heads(spec.seqlen_k, spec.kv_heads, spec.head_dim_v),
            biases: spec.biases.iter().map(bias).collect(),
            key_mask: spec.key_mask.then(|| row(spec.seqlen_k)),
            segments: spec.segments.then(|| [row(spec.seqlen_q), row(spec.seqlen_k)]),
            kv_lengths: spec.kv_lengths.is_some().then(|| dense(&[1, 1], 1)),
            alibi_slopes: spec.mask.alibi_slopes.is_some().then_some(ADDRESS),
            gate: spec.gate.then(|| heads(spec.seqlen_q, spec.heads, spec.head_dim_v)),
        };
        let out = heads(spec.seqlen_q, spec.heads, spec.head_dim_v);
        (operands, ForwardOutputs { out, lse, lse_low: lse })
    }
}

/// An operand in row-major order whose innermost elements are `step` apart.
fn dense(shape: &[usize], step: i64) -> Operand {
    let mut strides = vec![step; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * i64::try_from(shape[axis]).unwrap_or(1);
    }
    Operand::new(ADDRESS, shape, &strides)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_a_problem() {
        for case in cases() {
            assert!(AttentionProblem::new(case.spec.clone()).is_ok(), "{:?}", case.spec);
        }
    }
}

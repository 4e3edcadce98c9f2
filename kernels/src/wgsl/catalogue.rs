//! Shaders that together use every value of every constant and every kind of operand: what a second compiler is shown.

use std::collections::HashSet;

use tilefold_core::{
    AttentionProblem, AttentionSpec, BiasSpec, DType, EmptyRows, MergeOperands, ProblemError, RopeArgs, RopePairs,
    RopeSpec, StructuralMask, Tensor,
};

use crate::ForwardOutputs;
use crate::wgsl::backward::{NOWHERE, row_major};
use crate::wgsl::dispatch::{Dispatch, DispatchError, Limits};
use crate::wgsl::{accumulate, backward, fill, forward, merge, relayout, rope};

/// Why there is no catalogue; the crate's tests say that it never happens.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// A problem of the catalogue is none.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// A problem of the catalogue cannot be launched.
    #[error(transparent)]
    Dispatch(#[from] DispatchError),
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A dispatch of each shader, on processors and GPUs, without subgroups and with some of 4, 8, 16 and 32 threads.
///
/// # Errors
/// [`CatalogueError`].
pub fn catalogue() -> Result<Vec<Dispatch>, CatalogueError> {
    let mut dispatches = Vec::new();
    let devices = [
        (true, 1, 10, 0),
        (true, 8, 32, 0),
        (true, 16, 32, 0),
        (false, 1, 32, 1 << 14),
        (false, 4, 10, 0),
        (false, 32, 32, 1 << 15),
    ];
    for (software, subgroup, storage_buffers, workgroup_bytes) in devices {
        let limits = Limits {
            binding_bytes: 1 << 27,
            storage_buffers,
            offset_alignment: 256,
            workgroups: 65_535,
            subgroup,
            workgroup_bytes,
            loop_rounds: u64::MAX,
            software,
        };
        for dtype in DTYPES {
            for spec in specs(dtype) {
                attention(spec, &limits, &mut dispatches)?;
            }
            moves(dtype, &limits, &mut dispatches)?;
        }
    }
    let mut seen = HashSet::new();
    Ok(dispatches.into_iter().filter(|dispatch| seen.insert(dispatch.shader.clone())).collect())
}

/// Plain attention of several widths, and every feature at once.
fn specs(dtype: DType) -> Vec<AttentionSpec> {
    let plain =
        [5, 8, 32, 64, 130, 256].map(|head_dim| AttentionSpec::new(dtype, 1, 2, 300, 2, head_dim).with_all_gradients());
    let mut full = AttentionSpec::new(dtype, 2, 3, 200, 4, 20);
    (full.kv_heads, full.head_dim_v) = (2, 12);
    let shapes = [[2, 3, 1, 1, 200], [2, 1, 4, 200, 200], [1, 3, 4, 200, 1], [1, 1, 1, 1, 1]];
    full.biases = shapes.map(|shape| BiasSpec { shape, dtype }).to_vec();
    full.biases[1].dtype = DType::F32;
    full.key_mask = true;
    full.kv_lengths = Some(vec![150]);
    full.segments = true;
    full.gate = true;
    full.empty_rows = EmptyRows::Uniform;
    full.mask = StructuralMask { causal: true, alibi_slopes: Some(vec![0.5; 4]), ..StructuralMask::default() };
    let mut wide = full.clone();
    (wide.head_dim, wide.head_dim_v) = (255, 69);
    plain.into_iter().chain([full, wide].map(AttentionSpec::with_all_gradients)).collect()
}

fn attention(spec: AttentionSpec, limits: &Limits, dispatches: &mut Vec<Dispatch>) -> Result<(), CatalogueError> {
    let problem = AttentionProblem::new(spec)?;
    let mut operands = row_major(&problem);
    for aligned in [true, false] {
        if !aligned {
            // Rows that begin anywhere are read and written element by element.
            operands.inputs.q.data += 4;
            operands.out.data += 4;
            operands.d_out.data += 4;
            [&mut operands.dq, &mut operands.dk, &mut operands.dv].into_iter().flatten().for_each(|dq| dq.data += 4);
        }
        let outputs =
            ForwardOutputs { out: operands.out, lse: Some(operands.lse), lse_low: aligned.then_some(operands.lse_low) };
        let nowhere = |_| Ok::<_, DispatchError>(NOWHERE);
        dispatches.extend(forward(&problem, &operands.inputs, &outputs, limits, nowhere)?);
        dispatches.extend(backward(&problem, &operands, limits, nowhere)?);
    }
    Ok(())
}

/// Copies and sums between all dtypes, fills, merges, rotations.
fn moves(dtype: DType, limits: &Limits, dispatches: &mut Vec<Dispatch>) -> Result<(), CatalogueError> {
    let out = [1, 2, 3, 4, 5];
    let lse = || Tensor::zeros(DType::F32, &[1, 2, 4, 3]);
    for to in DTYPES.into_iter().chain([DType::Bool]) {
        let from = if to == DType::Bool { DType::Bool } else { dtype };
        let (source, mut destination) = (Tensor::zeros(from, &out)?, Tensor::zeros(to, &out)?);
        dispatches.extend(relayout(&source.view(), &destination.view(), limits)?);
        let turned = Tensor::zeros(to, &[5, 4, 3, 2, 1])?;
        dispatches.extend(relayout(&source.view().permute(&[4, 3, 2, 1, 0])?, &turned.view(), limits)?);
        dispatches.extend(fill(&destination.view(), 1.0, limits)?);
        if to == DType::Bool {
            continue;
        }
        dispatches.extend(accumulate(&source.view(), &destination.view(), limits)?);
        dispatches.extend(accumulate(&source.view().permute(&[4, 3, 2, 1, 0])?, &turned.view(), limits)?);
        let [part_lse, part_low, mut acc_lse, mut acc_lse_low] = [lse()?, lse()?, lse()?, lse()?];
        let operands = MergeOperands {
            out: source.view(),
            lse: part_lse.view(),
            lse_low: part_low.view(),
            acc_out: destination.view_mut(),
            acc_lse: acc_lse.view_mut(),
            acc_lse_low: acc_lse_low.view_mut(),
        };
        dispatches.extend(merge(&operands, limits)?);
    }
    let (source, mut destination) = (Tensor::zeros(dtype, &out)?, Tensor::zeros(dtype, &out)?);
    for pairs in [RopePairs::Interleaved, RopePairs::Halves] {
        let spec = RopeSpec::new(4, pairs);
        let args = RopeArgs::new(&spec, source.view(), destination.view_mut())?;
        let angles = args.spec().angles();
        let (from, to) = args.into_parts();
        dispatches.extend(rope(&spec, &angles, &from, to.as_view(), limits)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wgsl::shader::{File, Shader};

    #[test]
    fn the_catalogue_has_every_file_within_every_limit() {
        let shaders: Vec<Shader> = catalogue().unwrap().into_iter().map(|dispatch| dispatch.shader).collect();
        for file in [
            File::Forward,
            File::Prepare,
            File::Queries,
            File::Keys,
            File::Sums,
            File::Merge,
            File::Relayout,
            File::Accumulate,
            File::Rope,
        ] {
            assert!(shaders.iter().any(|shader| shader.file == file), "{}", file.name());
        }
        let slots = |shader: &Shader| shader.operands.iter().map(|operand| operand.slot).max().unwrap_or(0) + 1;
        assert!(shaders.iter().any(|shader| slots(shader) > 10) && shaders.iter().all(|shader| slots(shader) <= 32));
        assert!(shaders.iter().any(Shader::has_subgroups) && !shaders.iter().all(Shader::has_subgroups));
    }
}

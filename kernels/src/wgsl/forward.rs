//! The forward pass.

use tilefold_core::{AttentionProblem, EmptyRows};

use crate::backward::BackwardOperands;
use crate::forward::ForwardOutputs;
use crate::wgsl::attention::{self, Operands, SCALARS, Sizes, THREADS};
use crate::wgsl::backward::{NOWHERE, row_major};
use crate::wgsl::dispatch::{Builder, Dispatch, DispatchError, Heads, Limits, View, gather, parts};
use crate::wgsl::shader::{Constant, File};

/// Keys of one step where heads are narrow.
const STEP: u32 = 2;

/// Queries of one workgroup.
#[must_use]
pub fn forward_tile(problem: &AttentionProblem, limits: &Limits) -> u32 {
    THREADS * queries(problem, limits)
}

fn queries(problem: &AttentionProblem, limits: &Limits) -> u32 {
    let numbers = |channels: usize| 4 * channels.div_ceil(4) as i64;
    let spec = problem.spec();
    let room = attention::per_thread(spec, numbers(spec.head_dim) + numbers(spec.head_dim_v), limits);
    attention::needed(room, i64::try_from(spec.seqlen_q).unwrap_or(i64::MAX))
}

/// Bytes that a forward pass takes beside its operands: of wide heads, f32 sums; masks and biases put together where a shader
/// has too few storage buffers for each.
///
/// # Errors
/// [`DispatchError`].
pub fn forward_workspace_bytes(problem: &AttentionProblem, limits: &Limits) -> Result<u64, DispatchError> {
    let BackwardOperands { inputs, out, lse, lse_low, .. } = row_major(problem);
    let outputs = ForwardOutputs { out, lse: Some(lse), lse_low: Some(lse_low) };
    let mut bytes = 0_u64;
    forward(problem, &inputs, &outputs, limits, |more| {
        bytes = bytes.saturating_add(more);
        Ok::<_, DispatchError>(NOWHERE)
    })?;
    Ok(bytes)
}

/// What out is added up in.
fn sums<E: From<DispatchError>>(
    sizes: &Sizes,
    problem: &AttentionProblem,
    limits: &Limits,
    workspace: &mut impl FnMut(u64) -> Result<u64, E>,
) -> Result<View, E> {
    let [_, quads] = attention::quads(problem.spec());
    let view = sizes.sums(0, Heads::Query, forward_tile(problem, limits), quads);
    Ok(View { address: workspace(view.dense_bytes()?)?, ..view })
}

/// Dispatches of a forward pass, in order. `workspace` gives the address of so many bytes, which live until all of them
/// are enqueued.
///
/// # Errors
/// [`DispatchError`], and what `workspace` reports.
pub fn forward<E: From<DispatchError>>(
    problem: &AttentionProblem,
    operands: &Operands,
    outputs: &ForwardOutputs,
    limits: &Limits,
    mut workspace: impl FnMut(u64) -> Result<u64, E>,
) -> Result<Vec<Dispatch>, E> {
    let (spec, sizes) = (problem.spec(), Sizes::of(problem)?);
    let queries = queries(problem, limits);
    let mut constants = attention::constants(spec, limits);
    constants.extend([
        ("QUERIES", Constant::Number(queries)),
        ("STEP", Constant::Number(attention::step(spec, limits, STEP))),
        ("LSE", Constant::Switch(outputs.lse.is_some())),
        ("LSE_LOW", Constant::Switch(outputs.lse_low.is_some())),
    ]);
    let mut views = attention::inputs(&sizes, spec, operands);
    for (name, view) in &mut views {
        view.iter_mut().for_each(|view| view.shared = matches!(*name, "k" | "v"));
    }
    // Gate, out, lse and its low part, sums.
    let mut dispatches = gather(&mut views, 5, limits, attention::is_small, &mut workspace)?;
    let by_query = |name, operand| sizes.by_query(name, spec.dtype, operand, sizes.head_dim_v);
    views.push(("gate", operands.gate.as_ref().map(|gate| by_query("gate", gate))));
    views.push(("out", Some(by_query("out", &outputs.out).written())));
    for (name, operand) in [("lse", &outputs.lse), ("lse_low", &outputs.lse_low)] {
        views.push((name, operand.as_ref().map(|operand| sizes.statistic(name, operand).written())));
    }
    let sums = match attention::is_wide(spec) {
        true => Some(sums(&sizes, problem, limits, &mut workspace)?),
        false => None,
    };
    views.push(("sums", sums));
    let tiles = u32::try_from(sizes.seqlen_q).unwrap_or(u32::MAX).div_ceil(THREADS * queries);
    let present: Vec<View> = views.iter().filter_map(|(_, view)| *view).collect();
    let parts = parts(sizes.outer(), sizes.group, &present, limits)?;
    let walked = attention::walked(problem, sizes.seqlen_k, THREADS * queries);
    let mut rounds = attention::rounds(spec, limits, STEP, [1, 1], walked);
    if spec.empty_rows == EmptyRows::Uniform {
        // The mean of v, for each quad of channels.
        let [_, quads] = attention::quads(spec);
        rounds += u64::from(quads) * (sizes.seqlen_k.unsigned_abs() + 1);
    }
    for part in &parts {
        let groups = (part_heads(part, sizes.group) * i64::from(tiles)).unsigned_abs();
        let builder = Builder {
            file: File::Forward,
            constants: constants.clone(),
            scalars: SCALARS,
            values: attention::scalars(problem, &sizes, part, tiles),
            limits,
            rounds,
            operands: views.iter().map(|(name, view)| (*name, view.map(|view| view.part(part, sizes.group)))).collect(),
        };
        dispatches.push(builder.dispatch(groups)?);
    }
    Ok(dispatches)
}

/// Query heads of all rows of a part.
pub(crate) fn part_heads(part: &crate::wgsl::dispatch::Part, group: i64) -> i64 {
    part.batch[1] * part.rows[1] * part.heads[1] * group
}

//! Row attention of the extra MSA at the paper's own size, in bf16 and f32, within a few gigabytes.

use std::sync::OnceLock;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use tilefold::{
    AttentionProblem, AttentionSpec, Backend, Backward, BiasSpec, DType, Device, Options, Tensor, all_gradients,
};
use tilefold_benches::{Launch, Operands, Pass, filled_by_rows, rss_bytes};

use super::alignment::Alignment;
use super::check::{self, Checked};
use super::features::{ExtraMsa, ExtraMsaOptions, ExtraMsaTensor, FeatureError};
use super::memory::{self, TooLittleMemory};
use super::report::{Case, Report};
use crate::output::as_f64;
use crate::system::PeakMemory;

/// Runs both dtypes, one after the other, each with memory of its own.
pub(super) fn run(device: &Device, alignment: &Alignment, progress: &ProgressBar, report: &mut Report) -> Result<()> {
    progress.set_message("embedding the extra MSA");
    let extra = ExtraMsa::new(alignment, ExtraMsaOptions::default())?;
    for dtype in [DType::BF16, DType::F32] {
        progress.set_message(format!("paper's size, {dtype}"));
        if let Err(reason) = fits(device, &extra, dtype)? {
            report.skipped.push(format!("skipped: {reason}"));
            continue;
        }
        report.paper.push(one(device, &extra, dtype).with_context(|| format!("paper's size in {dtype}"))?);
    }
    Ok(())
}

/// Whether this machine can hold one dtype.
fn fits(device: &Device, extra: &ExtraMsa, dtype: DType) -> Result<Result<(), TooLittleMemory>> {
    let [batch, rows, seqlen, heads, head_dim] = extra.shape();
    let mut spec = AttentionSpec::new(dtype, batch, rows, seqlen, heads, head_dim);
    spec.key_mask = true;
    spec.biases.push(BiasSpec { shape: [1, 1, heads, seqlen, seqlen], dtype });
    let plan = device.plan_attention(&AttentionProblem::new(spec.with_all_gradients())?)?;
    // q k v out d_out dq dk dv, and lse in two parts.
    let tensors = 8.0 * as_f64(extra.row_len() * rows * dtype.size_bytes());
    let lse = 8.0 * as_f64(rows * heads * seqlen);
    let workspace = as_f64(plan.forward_workspace_bytes.max(plan.backward_workspace_bytes));
    let part = format!("paper's size in {dtype}");
    Ok(memory::check(&part, tensors + lse + workspace, "free some memory, or use a larger machine"))
}

fn one(device: &Device, extra: &ExtraMsa, dtype: DType) -> Result<Case> {
    let before_bytes = rss_bytes();
    let operands = operands(extra, dtype)?;
    let gradients = all_gradients(&operands.inputs()?);
    let mut launch = Launch::new(device, operands, &Options::default(), gradients)?;
    let peak = PeakMemory::start();
    let forward = launch.timed(Pass::Forward)?.as_secs_f64();
    let backward = launch.timed(Pass::Backward)?.as_secs_f64();
    let peak_bytes = peak.bytes();
    let launch = launch.into_host()?;
    let findings = check::check(launch.problem(), &checked(&launch)?)?;
    let case = Case::new("extra MSA row (paper)", launch.plan(), dtype, [forward, backward], findings);
    Ok(Case { before_bytes, peak_bytes, ..case })
}

/// The inputs, each row written once and in the dtype.
fn operands(extra: &ExtraMsa, dtype: DType) -> Result<Operands> {
    let [_, rows, seqlen, heads, _] = extra.shape();
    let tensor = |which| -> Result<Tensor> {
        let failed = OnceLock::<FeatureError>::new();
        let tensor = filled_by_rows(dtype, &extra.shape(), extra.row_len(), |row, values| {
            if let Err(error) = extra.fill_row(which, row, values) {
                let _ = failed.set(error);
            }
        })?;
        failed.into_inner().map_or(Ok(tensor), |error| Err(error.into()))
    };
    let mut operands =
        Operands::new(tensor(ExtraMsaTensor::Q)?, tensor(ExtraMsaTensor::K)?, tensor(ExtraMsaTensor::V)?);
    operands.d_out = Some(tensor(ExtraMsaTensor::DOut)?);
    let bias = |row: usize, values: &mut [f32]| values.copy_from_slice(&extra.bias()[row * seqlen..][..seqlen]);
    operands.biases.push(filled_by_rows(dtype, &[1, 1, heads, seqlen, seqlen], seqlen, bias)?);
    let mask = extra.mask().iter().copied().map(u8::from).collect();
    operands.key_mask = Some(Tensor::from_vec::<u8>(mask, &[1, rows, seqlen])?);
    Ok(operands)
}

/// What the check looks at.
fn checked(launch: &Launch) -> Result<Checked<'_>> {
    let Backward { dq, dk, dv, dbiases, .. } = launch.backward_results().context("no gradients were computed")?;
    let dbias = dbiases.first().and_then(Option::as_ref);
    Ok(Checked {
        inputs: launch.operands().inputs()?,
        d_out: launch.operands().d_out.as_ref().context("no d_out")?.view(),
        out: launch.forward_results().out.view(),
        dq: dq.as_ref().context("no dq")?.view(),
        dk: dk.as_ref().context("no dk")?.view(),
        dv: dv.as_ref().context("no dv")?.view(),
        d_gate: None,
        dbias: dbias.map(Tensor::view),
    })
}

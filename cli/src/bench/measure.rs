//! Runs each pass of each workload and keeps the median.

use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tilefold::{Backend, Clock, Device, Precision};
use tilefold_benches::{Launch, Pass, Workload};

use crate::system::PeakMemory;

/// One workload in one dtype.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) workload: Workload,
    pub(super) precision: Precision,
    pub(super) passes: Vec<Pass>,
}

impl Plan {
    /// What is timed, for messages.
    pub(super) fn name(&self) -> String {
        let Workload { name, rows, seqlen, heads, head_dim, .. } = &self.workload;
        let precision = self.precision;
        format!("workload {name} (rows {rows}, seqlen {seqlen}, heads {heads}, head_dim {head_dim}) in {precision}")
    }
}

/// What one pass took.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Entry {
    pub(super) workload: String,
    pub(super) device: String,
    pub(super) kernel: String,
    /// rows, seqlen, heads, head_dim
    pub(super) shape: [usize; 4],
    pub(super) dtype: String,
    pub(super) pass: String,
    pub(super) median_ms: f64,
    pub(super) min_ms: f64,
    /// Whose clock, `host` or `device`.
    pub(super) clock: &'static str,
    pub(super) gflops: f64,
    /// Bytes the device takes beside operands and results.
    pub(super) workspace_bytes: usize,
    /// Most bytes the process held during the timed runs; `None` where the system does not tell.
    pub(super) peak_bytes: Option<u64>,
    pub(super) repeats: u32,
}

/// Times everything; the bar is on stderr, and only on a terminal.
pub(super) fn measure(device: &Device, plans: &[Plan], repeats: u32, warmup: u32) -> Result<Vec<Entry>> {
    let runs: u64 = plans.iter().map(|plan| u64::try_from(plan.passes.len()).unwrap_or(0) * u64::from(repeats)).sum();
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} (about {eta} left)")?;
    let bar = ProgressBar::new(runs).with_style(style);
    let mut entries = Vec::new();
    for plan in plans {
        for &pass in &plan.passes {
            bar.set_message(format!("{} {} {pass}", plan.workload.name, plan.precision));
            let entry = one(device, plan, pass, repeats, warmup, &bar);
            entries.push(entry.with_context(|| plan.name())?);
        }
    }
    bar.finish_and_clear();
    Ok(entries)
}

fn one(device: &Device, plan: &Plan, pass: Pass, repeats: u32, warmup: u32, bar: &ProgressBar) -> Result<Entry> {
    let mut launch = Launch::of_workload(device, &plan.workload, plan.precision, pass)?;
    if pass == Pass::Backward {
        launch.forward()?;
    }
    for _ in 0..warmup {
        launch.timed(pass)?;
    }
    let peak = PeakMemory::start();
    let (mut times, mut clock) = (Vec::new(), Clock::Host);
    for _ in 0..repeats {
        let timing = launch.clocked(pass)?;
        times.push(timing.elapsed);
        clock = timing.clock;
        bar.inc(1);
    }
    times.sort();
    let peak_bytes = peak.bytes();
    let median = median_seconds(&times);
    let Workload { ref name, rows, seqlen, heads, head_dim, .. } = plan.workload;
    Ok(Entry {
        workload: name.clone(),
        device: device.info().id.to_string(),
        kernel: launch.plan().kernel.clone(),
        shape: [rows, seqlen, heads, head_dim],
        dtype: plan.precision.to_string(),
        pass: pass.to_string(),
        median_ms: median * 1e3,
        min_ms: times.first().map_or(0.0, Duration::as_secs_f64) * 1e3,
        clock: clock.name(),
        gflops: pass.flops(launch.problem()) / median / 1e9,
        workspace_bytes: workspace_bytes(&launch, pass),
        peak_bytes,
        repeats,
    })
}

/// Bytes the device takes beside operands and results.
fn workspace_bytes(launch: &Launch, pass: Pass) -> usize {
    let plan = launch.plan();
    match pass {
        Pass::Forward => plan.forward_workspace_bytes,
        Pass::Backward => plan.backward_workspace_bytes,
        Pass::Both => plan.forward_workspace_bytes.max(plan.backward_workspace_bytes),
    }
}

/// Middle of sorted times; the mean of the two in the middle of an even number.
fn median_seconds(sorted: &[Duration]) -> f64 {
    let at = |index: usize| sorted.get(index).map_or(0.0, Duration::as_secs_f64);
    let half = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { f64::midpoint(at(half.saturating_sub(1)), at(half)) } else { at(half) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        let times = |millis: &[u64]| millis.iter().map(|&ms| Duration::from_millis(ms)).collect::<Vec<_>>();
        assert!((median_seconds(&times(&[1, 5, 9])) - 0.005).abs() < 1e-12);
        assert!((median_seconds(&times(&[1, 5, 9, 100])) - 0.007).abs() < 1e-12);
    }
}

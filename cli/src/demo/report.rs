//! What the demonstration found: for people a table, for programs JSON.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use tilefold::{AttentionPlan, DType, DeviceInfo};
use tilefold_benches::Pass;

use super::alignment::Alignment;
use super::check::Finding;
use crate::output::{as_f64, bytes, digits, known_bytes, say, shape, table};
use crate::system::Machine;

/// Everything a run found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) version: &'static str,
    pub(super) alignment: Source,
    pub(super) device: String,
    pub(super) model: String,
    pub(super) arch: String,
    /// `None` where the device does not tell.
    pub(super) threads: Option<usize>,
    memory_available_bytes: u64,
    /// The four variants on the alignment.
    pub(super) cases: Vec<Case>,
    /// The paper's size, by dtype.
    pub(super) paper: Vec<Case>,
    /// Why a part was left out.
    pub(super) skipped: Vec<String>,
    pub(super) picture: String,
    pub(super) passed: bool,
}

/// Where the inputs come from.
#[derive(Debug, Serialize)]
pub(super) struct Source {
    pub(super) file: String,
    pub(super) n_seq: usize,
    pub(super) n_res: usize,
    first: String,
}

/// One attention.
#[derive(Debug, Serialize)]
pub(super) struct Case {
    pub(super) variant: String,
    /// rows, seqlen, heads, head_dim
    pub(super) shape: [usize; 4],
    pub(super) dtype: String,
    pub(super) kernel: String,
    pub(super) forward_ms: f64,
    pub(super) backward_ms: f64,
    pub(super) forward_gflops: f64,
    pub(super) backward_gflops: f64,
    /// One matrix of logits in the dtype: what is never allocated.
    pub(super) logits_bytes: f64,
    /// What the kernels take beside operands and results.
    pub(super) workspace_bytes: usize,
    /// Bytes of the process before the operands were made.
    pub(super) before_bytes: Option<u64>,
    /// Most bytes of the process during the timed runs, operands and results included.
    pub(super) peak_bytes: Option<u64>,
    pub(super) max_error: f64,
    /// Largest error as a share of what rounding explains.
    pub(super) of_tolerance: f64,
    pub(super) passed: bool,
    pub(super) checks: Vec<Finding>,
}

impl Case {
    /// A timed and checked attention; times are seconds forward and backward.
    pub(super) fn new(
        variant: &str,
        plan: &AttentionPlan,
        dtype: DType,
        [forward, backward]: [f64; 2],
        checks: Vec<Finding>,
    ) -> Self {
        let (problem, spec) = (&plan.problem, plan.problem.spec());
        let worst = |of: fn(&Finding) -> f64| checks.iter().map(of).fold(0.0, f64::max);
        let of_tolerance = worst(|finding| finding.of_tolerance);
        Self {
            variant: variant.to_owned(),
            shape: [spec.rows, spec.seqlen_q, spec.heads, spec.head_dim],
            dtype: dtype.to_string(),
            kernel: plan.kernel.clone(),
            forward_ms: forward * 1e3,
            backward_ms: backward * 1e3,
            forward_gflops: Pass::Forward.flops(problem) / forward / 1e9,
            backward_gflops: Pass::Backward.flops(problem) / backward / 1e9,
            logits_bytes: problem.logits() * as_f64(dtype.size_bytes()),
            workspace_bytes: plan.forward_workspace_bytes.max(plan.backward_workspace_bytes),
            before_bytes: None,
            peak_bytes: None,
            max_error: worst(|finding| finding.max_error),
            of_tolerance,
            passed: of_tolerance <= 1.0 && !checks.is_empty(),
            checks,
        }
    }

    fn row(&self) -> [String; 9] {
        [
            self.variant.clone(),
            shape(&self.shape),
            self.dtype.clone(),
            digits(self.forward_ms),
            digits(self.backward_ms),
            format!("{} / {}", digits(self.forward_gflops), digits(self.backward_gflops)),
            bytes(self.logits_bytes),
            known_bytes(self.peak_bytes),
            format!("{:.1e} {}", self.max_error, if self.passed { "ok" } else { "FAIL" }),
        ]
    }
}

impl Report {
    pub(super) fn new(file: String, alignment: &Alignment, info: &DeviceInfo, machine: &Machine) -> Self {
        let first = alignment.names().first().cloned().unwrap_or_default();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            alignment: Source { file, n_seq: alignment.n_seq(), n_res: alignment.n_columns(), first },
            device: info.id.to_string(),
            model: info.name.clone(),
            arch: info.arch.clone(),
            threads: (info.parallelism > 0).then_some(info.parallelism),
            memory_available_bytes: machine.memory_available_bytes,
            cases: Vec::new(),
            paper: Vec::new(),
            skipped: Vec::new(),
            picture: String::new(),
            passed: false,
        }
    }

    /// The kernels' kind and how many threads run them.
    pub(super) fn kernels(&self) -> String {
        match self.threads {
            Some(threads) => format!("{}, {threads} threads", self.arch),
            None => self.arch.clone(),
        }
    }

    /// What is about to be done.
    pub(super) fn head(&self) -> String {
        let Source { file, n_seq, n_res, .. } = &self.alignment;
        format!(
            "{file}: {n_seq} sequences, {n_res} match columns\n{} ({}, {}, {} of memory available)\n",
            self.device,
            self.model,
            self.kernels(),
            bytes(as_f64(self.memory_available_bytes))
        )
    }

    /// Names the picture and sums up the checks.
    pub(super) fn finish(&mut self, picture: &Path) {
        self.picture = picture.display().to_string();
        self.passed = !self.cases.is_empty() && self.all().all(|case| case.passed);
    }

    /// Every case, the paper's last.
    pub(super) fn all(&self) -> impl Iterator<Item = &Case> {
        self.cases.iter().chain(&self.paper)
    }

    /// Tables, then what to look at.
    pub(super) fn print(&self) -> Result<()> {
        let head = [
            "attention",
            "rows x L x H x D",
            "dtype",
            "forward ms",
            "backward ms",
            "GFLOP/s",
            "logits avoided",
            "peak memory",
            "max error",
        ];
        let mut lines = table(&head, 3);
        self.all().for_each(|case| {
            lines.add_row(case.row());
        });
        say(&lines.to_string())?;
        say("\
logits avoided: one rows x heads x L x L matrix in the dtype; an unfused backward pass holds four of them.\n\
peak memory: the whole process, with inputs, outputs and gradients.\n\
max error: a crop of out and of every gradient, against f64; ok is within what rounding explains.")?;
        for case in &self.paper {
            say(&format!(
                "paper's size, {}: {} before, {} at most, {} of logits never stored; forward and backward {} s",
                case.dtype,
                known_bytes(case.before_bytes),
                known_bytes(case.peak_bytes),
                bytes(case.logits_bytes),
                digits((case.forward_ms + case.backward_ms) / 1e3)
            ))?;
        }
        self.skipped.iter().try_for_each(|reason| say(reason))?;
        for case in self.all().filter(|case| !case.passed) {
            for check in case.checks.iter().filter(|check| check.of_tolerance > 1.0) {
                say(&format!(
                    "FAIL {} {}: {} is off by {:.2e}, {:.1} times what rounding explains",
                    case.variant, case.dtype, check.tensor, check.max_error, check.of_tolerance
                ))?;
            }
        }
        Ok(())
    }
}

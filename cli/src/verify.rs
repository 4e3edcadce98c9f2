//! `tilefold verify`: the conformance suite on a device, as a table, JSON or JUnit.

mod junit;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tilefold::{Backend, DType};
use tilefold_conformance::report::{Report, TrialResult};
use tilefold_conformance::suite::{Filter, Outcome as TrialOutcome, Subject, trials};

use crate::global::Global;
use crate::list;
use crate::output::{Outcome, digits, say, say_json, table};

/// Options of `verify`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only trials whose name (dtype/group/case) contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Only these dtypes of q
    #[arg(long, value_delimiter = ',', value_parser = list::dtype)]
    dtype: Vec<DType>,
    /// Lists the trials and ends
    #[arg(long)]
    list: bool,
    /// Prints JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Also writes a JUnit file
    #[arg(long, value_name = "FILE.xml")]
    junit: Option<PathBuf>,
}

#[derive(Serialize)]
struct JsonReport<'a> {
    version: &'static str,
    device: String,
    model: &'a str,
    arch: &'a str,
    passed: usize,
    failed: usize,
    skipped: usize,
    groups: Vec<JsonGroup>,
    failures: Vec<JsonTrial<'a>>,
    skips: Vec<JsonTrial<'a>>,
}

#[derive(Serialize)]
struct JsonGroup {
    group: &'static str,
    passed: usize,
    failed: usize,
    skipped: usize,
    worst_of_tolerance: f64,
    seconds: f64,
}

#[derive(Serialize)]
struct JsonTrial<'a> {
    name: &'a str,
    message: &'a str,
}

/// Runs the suite.
pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let device = global.open()?;
    let mut filter = Filter { contains: args.filter.clone(), ..Filter::default() };
    if !args.dtype.is_empty() {
        filter.dtypes.clone_from(&args.dtype);
    }
    let trials = trials(&Subject::of(&device)?, &filter);
    ensure!(
        !trials.is_empty(),
        "--filter: no trial's name contains `{}`; `tilefold verify --list` shows them all",
        filter.contains.unwrap_or_default()
    );
    if args.list {
        trials.iter().try_for_each(|trial| say(&trial.name))?;
        return Ok(Outcome::Passed);
    }
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} ({eta} left)")?;
    let bar = ProgressBar::new(u64::try_from(trials.len())?).with_style(style);
    let report = Report::of(trials, |result| advance(&bar, result));
    bar.finish_and_clear();
    if let Some(path) = &args.junit {
        junit::write(path, &device.info().id.to_string(), &report)?;
    }
    let info = device.info();
    if args.json {
        say_json(&JsonReport::new(info.id.to_string(), &info.name, &info.arch, &report))?;
    } else {
        say(&format!("{} ({}, {})", info.id, info.name, info.arch))?;
        print(&report)?;
    }
    Ok(if report.is_success() { Outcome::Passed } else { Outcome::Failed })
}

fn advance(bar: &ProgressBar, result: &TrialResult) {
    bar.set_message(result.name.clone());
    bar.inc(1);
    if let Err(message) = &result.outcome {
        bar.suspend(|| crate::output::warn(&format!("FAIL {}: {message}", result.name)));
    }
}

/// One line a feature, then what failed and what could not run.
fn print(report: &Report) -> Result<()> {
    let mut lines = table(&["feature", "passed", "failed", "skipped", "worst, of tolerance", "seconds"], 1);
    for group in report.groups() {
        let counts = [group.passed, group.failed, group.skipped].map(|count| count.to_string());
        let measures = [format!("{:.1} %", group.worst * 100.0), digits(group.seconds)];
        lines.add_row([group.group.to_owned()].into_iter().chain(counts).chain(measures));
    }
    say(&lines.to_string())?;
    report.failures().try_for_each(|(name, message)| say(&format!("FAIL {name}: {message}")))?;
    report.skips().try_for_each(|(name, reason)| say(&format!("skipped {name}: {reason}")))?;
    let [passed, failed, skipped] = count(report);
    say(&format!("{passed} passed, {failed} failed, {skipped} skipped"))
}

/// Trials that passed, failed, were skipped.
fn count(report: &Report) -> [usize; 3] {
    let (failed, skipped) = (report.failures().count(), report.skips().count());
    [report.results.len() - failed - skipped, failed, skipped]
}

impl<'a> JsonReport<'a> {
    fn new(device: String, model: &'a str, arch: &'a str, report: &'a Report) -> Self {
        let trial = |(name, message): (&'a str, &'a str)| JsonTrial { name, message };
        let groups = report.groups().into_iter().map(|group| JsonGroup {
            group: group.group,
            passed: group.passed,
            failed: group.failed,
            skipped: group.skipped,
            worst_of_tolerance: group.worst,
            seconds: group.seconds,
        });
        let [passed, failed, skipped] = count(report);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            device,
            model,
            arch,
            passed,
            failed,
            skipped,
            groups: groups.collect(),
            failures: report.failures().map(trial).collect(),
            skips: report.skips().map(trial).collect(),
        }
    }
}

/// Share of the tolerance a passed trial used, for people.
fn share(outcome: &TrialOutcome) -> String {
    match outcome {
        TrialOutcome::Passed { worst } => format!("worst error {:.1} % of tolerance", worst * 100.0),
        TrialOutcome::Skipped { reason } => reason.clone(),
    }
}

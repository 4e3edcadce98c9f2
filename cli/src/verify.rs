//! `tilefold verify`: the conformance suite on a device, as a table, JSON or JUnit.

mod junit;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tilefold::{Backend, DeviceInfo, Precision};
use tilefold_conformance::report::{Report, TrialResult};
use tilefold_conformance::suite::{Filter, Outcome as TrialOutcome, Subject, trials};

use crate::global::Global;
use crate::list;
use crate::out_file::OutFile;
use crate::output::{Outcome, digits, say, say_json, table};

/// Options of `verify`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only trials whose name (dtype/group/case) contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Only these dtypes of q; tf32 is f32 with products of tf32, of which f32 brings a choice of cases
    #[arg(long, value_delimiter = ',', value_parser = list::dtype)]
    dtype: Vec<Precision>,
    /// Leaves out tensors of more than 2^31 elements: the largest such trial takes 11 GB of memory and half a minute
    #[arg(long)]
    no_large: bool,
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
    /// Whether the trials of more than 2^31 elements were made.
    large: bool,
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
    let junit = args.junit.as_deref().map(|path| OutFile::new(path, "--junit")).transpose()?;
    let device = global.open()?;
    let mut filter = Filter { contains: args.filter.clone(), ..Filter::for_device(device.info()) };
    filter.large &= !args.no_large;
    if !args.dtype.is_empty() {
        filter.precisions.clone_from(&args.dtype);
        filter.in_turn = None;
    }
    let trials = trials(&Subject::of(&device)?, &filter);
    ensure!(
        !trials.is_empty(),
        "--filter: no trial's name contains `{}`; `tilefold verify --list` shows them all",
        filter.contains.as_deref().unwrap_or_default()
    );
    if args.list {
        trials.iter().try_for_each(|trial| say(&trial.name))?;
        return Ok(Outcome::Passed);
    }
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} ({eta} left)")?;
    let bar = ProgressBar::new(u64::try_from(trials.len())?).with_style(style);
    let report = Report::of(trials, |result| advance(&bar, result));
    bar.finish_and_clear();
    let info = device.info();
    if args.json {
        say_json(&JsonReport::new(info, filter.large, &report))?;
    } else {
        say(&format!("{} ({}, {})", info.id, info.name, info.arch))?;
        print(&report)?;
        if !Filter::for_device(info).large {
            say(
                "left out on this kind of device: large problems; without --dtype all but every sixth case of each dtype",
            )?;
        } else if args.no_large {
            say("left out: tensors of more than 2^31 elements (--no-large)")?;
        }
    }
    if let Some(file) = junit {
        file.write(&junit::text(&info.id.to_string(), &report)?)?;
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
    fn new(info: &'a DeviceInfo, large: bool, report: &'a Report) -> Self {
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
            device: info.id.to_string(),
            model: &info.name,
            arch: &info.arch,
            passed,
            failed,
            skipped,
            large,
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

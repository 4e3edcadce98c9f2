//! The suite's results in the form continuous integration reads.

use std::time::Duration;

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report as JunitReport, TestCase, TestCaseStatus, TestSuite};
use tilefold_conformance::report::{Report, TrialResult};
use tilefold_conformance::suite::Outcome;

/// The file's text: one suite, one test a trial.
pub(super) fn text(device: &str, report: &Report) -> Result<String> {
    let mut suite = TestSuite::new(device);
    suite.add_test_cases(report.results.iter().map(case));
    let mut junit = JunitReport::new("tilefold verify");
    junit.add_test_suite(suite);
    junit.to_string().context("cannot write the results as JUnit")
}

fn case(result: &TrialResult) -> TestCase {
    let status = match &result.outcome {
        Ok(Outcome::Passed { .. }) => TestCaseStatus::success(),
        Ok(Outcome::Skipped { reason }) => with_message(TestCaseStatus::skipped(), reason),
        Err(message) => with_message(TestCaseStatus::non_success(NonSuccessKind::Failure), message),
    };
    let mut case = TestCase::new(result.name.as_str(), status);
    case.set_classname(result.group).set_time(Duration::from_secs_f64(result.seconds.max(0.0)));
    if let Ok(outcome @ Outcome::Passed { .. }) = &result.outcome {
        case.set_system_out(super::share(outcome));
    }
    case
}

fn with_message(mut status: TestCaseStatus, message: &str) -> TestCaseStatus {
    status.set_message(message);
    status
}

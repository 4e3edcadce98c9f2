//! Running trials one after another, and what came of it: by trial and by feature.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use crate::suite::{Outcome, Trial};

/// One trial's end.
#[derive(Clone, Debug)]
pub struct TrialResult {
    /// The feature.
    pub group: &'static str,
    /// The trial.
    pub name: String,
    /// How it ended; the error is its message.
    pub outcome: Result<Outcome, String>,
    /// How long it took, oracle included.
    pub seconds: f64,
}

/// The trials of one feature.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupReport {
    /// The feature.
    pub group: &'static str,
    /// Trials within tolerance.
    pub passed: usize,
    /// Trials that failed.
    pub failed: usize,
    /// Trials that could not run.
    pub skipped: usize,
    /// Largest error of a trial that passed, as a fraction of what is allowed.
    pub worst: f64,
    /// Time of all its trials.
    pub seconds: f64,
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Every trial, in order.
    pub results: Vec<TrialResult>,
}

impl Report {
    /// Runs trials in order; `progress` sees each result as it comes.
    ///
    /// A panic inside a trial is that trial's failure. `worst` is 0 where a trial measures nothing.
    pub fn of(trials: Vec<Trial>, mut progress: impl FnMut(&TrialResult)) -> Self {
        let mut report = Self::default();
        for trial in trials {
            let Trial { group, name, run } = trial;
            let start = Instant::now();
            let outcome = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(panic_message(&*panic)));
            let result = TrialResult { group, name, outcome, seconds: start.elapsed().as_secs_f64() };
            progress(&result);
            report.results.push(result);
        }
        report
    }

    /// The results by feature, in the order the features first appear.
    #[must_use]
    pub fn groups(&self) -> Vec<GroupReport> {
        let mut groups: Vec<GroupReport> = Vec::new();
        for result in &self.results {
            let at = groups.iter().position(|group| group.group == result.group).unwrap_or_else(|| {
                let group = result.group;
                groups.push(GroupReport { group, passed: 0, failed: 0, skipped: 0, worst: 0.0, seconds: 0.0 });
                groups.len() - 1
            });
            let group = &mut groups[at];
            group.seconds += result.seconds;
            match &result.outcome {
                Ok(Outcome::Passed { worst }) => {
                    group.passed += 1;
                    group.worst = group.worst.max(*worst);
                }
                Ok(Outcome::Skipped { .. }) => group.skipped += 1,
                Err(_) => group.failed += 1,
            }
        }
        groups
    }

    /// Trials that failed, with their messages.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.results.iter().filter_map(|result| Some((result.name.as_str(), result.outcome.as_ref().err()?.as_str())))
    }

    /// Trials that could not run, with the reasons.
    pub fn skips(&self) -> impl Iterator<Item = (&str, &str)> {
        self.results.iter().filter_map(|result| match &result.outcome {
            Ok(Outcome::Skipped { reason }) => Some((result.name.as_str(), reason.as_str())),
            _ => None,
        })
    }

    /// Whether nothing failed.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.failures().next().is_none()
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("without a message"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_summed_up_by_group() {
        let trial = |group, name: &str, outcome: Result<Outcome, String>| Trial {
            group,
            name: name.to_owned(),
            run: Box::new(move || outcome),
        };
        let panicking = Trial { group: "a", name: "a2".into(), run: Box::new(|| panic!("index {}", 7)) };
        let trials = vec![
            trial("a", "a1", Ok(Outcome::Passed { worst: 0.25 })),
            trial("b", "b1", Ok(Outcome::Skipped { reason: "no memory".into() })),
            panicking,
            trial("a", "a3", Ok(Outcome::Passed { worst: 0.5 })),
        ];
        let mut seen = 0;
        let report = Report::of(trials, |_| seen += 1);
        let groups = report.groups();
        assert_eq!((seen, groups.len()), (4, 2));
        assert_eq!((groups[0].passed, groups[0].failed, groups[0].worst), (2, 1, 0.5));
        assert_eq!((groups[1].skipped, report.is_success()), (1, false));
        assert_eq!(report.failures().collect::<Vec<_>>(), [("a2", "panicked: index 7")]);
        assert_eq!(report.skips().collect::<Vec<_>>(), [("b1", "no memory")]);
    }
}

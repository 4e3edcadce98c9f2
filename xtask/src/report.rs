//! Steps: what is done, how long it took, how many tests passed, and what to repeat when one failed.

use std::time::Instant;

use anyhow::{Error, Result};

/// Tests and checks of a step by how they ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    /// Could not run here, and said why: too little memory, no such device.
    pub(crate) skipped: u64,
    /// Which, and why.
    pub(crate) skips: Vec<String>,
}

impl Count {
    /// A check that is no run of tests.
    pub(crate) fn one() -> Self {
        Self { passed: 1, ..Self::default() }
    }
}

impl std::ops::AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.skips.extend(other.skips);
    }
}

/// What has been done so far.
#[derive(Debug)]
pub(crate) struct Report {
    start: Instant,
    steps: u32,
    total: Count,
}

impl Report {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now(), steps: 0, total: Count::default() }
    }

    /// Does one step: says so, times it, and stops everything when it fails.
    pub(crate) fn step(&mut self, what: &str, work: impl FnOnce() -> Result<Count>) -> Result<()> {
        self.steps += 1;
        println!("\n== {}. {what}", self.steps);
        let start = Instant::now();
        match work() {
            Ok(count) => {
                println!("== ok, {count}, {:.1} s", start.elapsed().as_secs_f64());
                self.total += count;
                Ok(())
            }
            Err(error) => {
                self.total += failures(&error);
                Err(error.context(format!("step {} failed: {what}", self.steps)))
            }
        }
    }

    /// The last lines of a run.
    pub(crate) fn summary(&self) -> String {
        let Count { skipped, skips, .. } = &self.total;
        let mut reasons: Vec<_> = skips.iter().map(|skip| format!("skipped {skip}\n")).collect();
        reasons.sort();
        reasons.dedup();
        format!(
            "{}{} steps in {:.0} s, {skipped} tests skipped\n{}",
            reasons.concat(),
            self.steps,
            self.start.elapsed().as_secs_f64(),
            self.total
        )
    }
}

/// What an error counts as: at least one failure.
fn failures(error: &Error) -> Count {
    let count = error.downcast_ref::<crate::command::Failed>().map(|failed| failed.count.clone()).unwrap_or_default();
    Count { failed: count.failed.max(1), ..count }
}

impl std::fmt::Display for Count {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

//! The suite on every device of this machine: one trial for each case.
//!
//! `TILEFOLD_DEVICE=cpu` tests one device; an absent one shows as ignored, with the reason, unless `TILEFOLD_REQUIRE`
//! names it. `TILEFOLD_CPU_ARCH` chooses the instruction set of the CPU; `cargo xtask test` runs them all.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};
use tilefold_conformance::subject::{self, Candidate};
use tilefold_conformance::suite::{self, Filter, Outcome};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for candidate in subject::candidates() {
        match candidate {
            Candidate { name, subject: Ok(subject), .. } => {
                let made = suite::trials(&subject, &Filter::for_device(subject.device.info()));
                trials.extend(made.into_iter().map(|trial| wrap(&name, trial)));
            }
            Candidate { name, subject: Err(reason), required } => trials.push(absent(&name, reason, required)),
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn wrap(kind: &str, trial: suite::Trial) -> Trial {
    let suite::Trial { name, run, .. } = trial;
    let shown = format!("{kind} {name}");
    let runner = move || match run()? {
        Outcome::Passed { .. } => Ok(Completion::Completed),
        Outcome::Skipped { reason } => Ok(skipped(&shown, reason)),
    };
    Trial::ignorable_test(name, runner).with_kind(kind)
}

/// Says so on a line of its own, since `--quiet` shows an `i` and no reason.
#[allow(clippy::print_stdout, reason = "a test's own report")]
fn skipped(trial: &str, reason: String) -> Completion {
    println!("\nskipped {trial}: {reason}");
    Completion::ignored_with(reason)
}

fn absent(name: &str, reason: String, required: bool) -> Trial {
    let shown = name.to_owned();
    let runner = move || if required { Err(reason.into()) } else { Ok(skipped(&shown, reason)) };
    Trial::ignorable_test("device", runner).with_kind(name)
}

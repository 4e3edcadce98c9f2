//! The suite on every device of this machine: one trial for each case.
//!
//! `TILEFOLD_DEVICE=cpu` tests one device; an absent one shows as ignored, with the reason, unless `TILEFOLD_REQUIRE`
//! names it. `TILEFOLD_CPU_ARCH` chooses the instruction set; without it, the others run a part of the suite as well.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};
use tilefold_conformance::subject::{self, Candidate};
use tilefold_conformance::suite::{self, Filter, Outcome, Subject};

/// What instruction sets other than the one in use are held to: every kind of tile, mask and reduction once.
const PART: [&str; 7] = ["everything", "head_dim", "structural/causal", "bias/", "extreme", "gqa", "workload"];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for candidate in subject::candidates() {
        match candidate {
            Candidate { name, subject: Ok(subject), .. } => trials.extend(device_trials(&name, &subject)),
            Candidate { name, subject: Err(reason), required } => trials.push(absent(&name, reason, required)),
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn device_trials(name: &str, subject: &Subject) -> Vec<Trial> {
    let arch = subject.device.info().arch.clone();
    let mut trials: Vec<Trial> =
        suite::trials(subject, &Filter::default()).into_iter().map(|trial| wrap(name, trial)).collect();
    if name == "cpu" && std::env::var_os("TILEFOLD_CPU_ARCH").is_none() {
        for other in subject::other_instruction_sets(&arch) {
            let kind = format!("{name}-{}", other.device.info().arch);
            let part = suite::trials(&other, &Filter::default()).into_iter();
            let part = part.filter(|trial| PART.iter().any(|part| trial.name.contains(part)));
            trials.extend(part.map(|trial| wrap(&kind, trial)));
        }
    }
    trials
}

fn wrap(kind: &str, trial: suite::Trial) -> Trial {
    let suite::Trial { name, run, .. } = trial;
    let runner = move || match run()? {
        Outcome::Passed { .. } => Ok(Completion::Completed),
        Outcome::Skipped { reason } => Ok(Completion::ignored_with(reason)),
    };
    Trial::ignorable_test(name, runner).with_kind(kind)
}

fn absent(name: &str, reason: String, required: bool) -> Trial {
    let runner = move || if required { Err(reason.into()) } else { Ok(Completion::ignored_with(reason)) };
    Trial::ignorable_test("device", runner).with_kind(name)
}

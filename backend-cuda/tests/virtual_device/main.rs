//! The backend on virtual devices: the whole way from a call through cudarc's bindings and the driver's interface to an
//! executed kernel, and what happens when something is missing or fails.
//!
//! The library path is read when a process starts, so this program starts itself again: with the stand-in for the
//! driver first on the path, and, for what a process can see only once, in a process of its own for each scenario.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::missing_panics_doc,
    clippy::print_stdout,
    reason = "a panic here is a failed test, which lints see only in the usual harness"
)]

mod device;
mod process;
mod scenarios;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};
use process::Stage;

fn main() -> ExitCode {
    match Stage::of_this_process() {
        Stage::First => process::start_again(),
        Stage::Scenario(name) => scenarios::run(&name),
        Stage::Tests => {
            let arguments = Arguments::from_args();
            let trials = device::TESTS.iter().map(|&(name, test)| kernel_trial(name, test));
            let scenarios = scenarios::ALL.iter().map(|scenario| scenario.trial());
            libtest_mimic::run(&arguments, trials.chain(scenarios).collect()).exit_code()
        }
    }
}

/// A test that compiles kernels: without NVRTC it is left out, with a reason, unless CUDA is required.
fn kernel_trial(name: &'static str, test: fn()) -> Trial {
    Trial::ignorable_test(name, move || match process::missing_compiler()? {
        Some(reason) => Ok(Completion::ignored_with(reason)),
        None => {
            test();
            Ok(Completion::Completed)
        }
    })
}

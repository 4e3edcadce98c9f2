//! Tools the checks need, installed where they are missing.

use anyhow::{Result, ensure};

use crate::command::{run, succeeds};
use crate::report::Count;

/// Adds rustfmt and clippy to the toolchain when it lacks them.
pub(crate) fn toolchain() -> Result<Count> {
    for (component, probe) in [("rustfmt", "fmt"), ("clippy", "clippy")] {
        if succeeds(&["cargo", probe, "--version"]) {
            println!("{component} is there");
            continue;
        }
        ensure!(succeeds(&["rustup", "--version"]), "{component} is missing, and there is no rustup to add it with");
        println!("{component} is missing: adding it");
        run(&[], &["rustup", "component", "add", component])?;
    }
    Ok(Count::ONE)
}

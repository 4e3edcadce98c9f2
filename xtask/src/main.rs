//! The chores of this workspace: `cargo xtask test`.
#![allow(clippy::print_stdout, reason = "a program says what it does")]

mod command;
mod files;
mod licences;
mod report;
mod setup;
mod suite;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

/// Chores of the tilefold workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Runs everything that is checked: what CI runs
    Test {
        /// Only formatting, lints and tests on the best instruction set; refused with CI=true
        #[arg(long)]
        quick: bool,
    },
}

fn main() -> Result<ExitCode> {
    let Task::Test { quick } = Task::parse();
    // Every command runs in the root, wherever this one was started.
    let root = workspace_root()?;
    std::env::set_current_dir(&root).with_context(|| format!("cannot enter {}", root.display()))?;
    Ok(if suite::run_suite(quick) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn workspace_root() -> Result<PathBuf> {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    own.parent().map(PathBuf::from).context("the xtask package has no folder above it")
}

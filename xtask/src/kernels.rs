//! `cargo xtask kernels`: every kernel compiled with real compilers, and what can be said of it without a GPU.

mod check;
mod compile;
mod model;
mod resources;

use anyhow::Result;
use clap::Subcommand;

/// What to do with the kernels.
#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    /// Compiles all kernels with the newest NVRTC for every architecture and with the oldest to PTX; refuses spills
    Check {
        /// Only kernels whose names hold this text
        #[arg(long)]
        only: Option<String>,
    },
    /// Counts what the hot loops cost, holds it against the record and prints static floors of the workloads
    Model {
        /// Writes the record instead of comparing with it
        #[arg(long)]
        record: bool,
        /// Only kernels whose names hold this text
        #[arg(long)]
        only: Option<String>,
        /// Leaves out the replay with latencies, which takes most of the time
        #[arg(long)]
        no_replay: bool,
    },
}

/// Does it.
pub(crate) fn run(task: &Task) -> Result<()> {
    match task {
        Task::Check { only } => check::check(only.as_deref()).map(drop),
        Task::Model { record, only, no_replay } => model::model(*record, only.as_deref(), !no_replay).map(drop),
    }
}

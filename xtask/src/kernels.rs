//! `cargo xtask kernels`: every kernel compiled with real compilers, and what can be said of it without a GPU.

mod check;
mod compile;
mod model;
mod record;
mod resources;
mod workload;

use anyhow::{Result, ensure};
use clap::Args;
use clap::Subcommand;
use tilefold_kernels::{Entry, Scores, Vendor, catalogue};

use crate::report::Count;

/// What to do with the kernels.
#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    /// Compiles with the newest NVRTC and clang to machine code, with the oldest NVRTC to PTX; refuses spills and too few warps
    Check(Chosen),
    /// Counts what the hot loops cost, holds it against the record, prints static floors of the workloads
    Model {
        #[command(flatten)]
        chosen: Chosen,
        /// Writes the record instead of comparing with it
        #[arg(long)]
        record: bool,
        /// Leaves out the replay with latencies, which takes most of the time
        #[arg(long)]
        no_replay: bool,
    },
}

/// Which kernels.
#[derive(Debug, Default, Args)]
pub(crate) struct Chosen {
    /// Only kernels whose names hold this text
    #[arg(long)]
    pub(crate) only: Option<String>,
    /// Only for this architecture, sm_80 or gfx942 for instance
    #[arg(long)]
    pub(crate) arch: Option<String>,
    /// Only attention whose speed is followed, of head dimensions 8 and 32, and what multiplies no matrices, for sm_80 and
    /// gfx942: what CI does
    #[arg(long)]
    pub(crate) quick: bool,
}

/// Does it.
pub(crate) fn run(task: &Task) -> Result<()> {
    match task {
        Task::Check(chosen) => check::check(chosen).map(drop),
        Task::Model { chosen, record, no_replay } => model::model(chosen, *record, !no_replay).map(drop),
    }
}

/// What CI does: the quick check, and the quick model held against the record.
pub(crate) fn quick() -> Result<Count> {
    let chosen = Chosen { quick: true, ..Chosen::default() };
    let mut count = check::check(&chosen)?;
    count += model::model(&chosen, false, false)?;
    Ok(count)
}

/// Head dimensions of the quick checks.
const QUICK_HEAD_DIMS: [usize; 2] = [8, 32];

/// Architectures of the quick checks.
const QUICK_ARCHS: [&str; 2] = ["sm_80", "gfx942"];

/// Kernels of one vendor, and the architectures they are compiled for.
pub(crate) struct Batch {
    entries: Vec<Entry>,
    archs: Vec<resources::Arch>,
}

impl Chosen {
    /// These of all kernels, by vendor.
    fn batches(&self) -> Result<Vec<Batch>> {
        let mut batches = Vec::new();
        for vendor in [Vendor::Nvidia, Vendor::Amd] {
            let batch = Batch { entries: self.entries(vendor)?, archs: self.archs(vendor) };
            if !batch.entries.is_empty() && !batch.archs.is_empty() {
                batches.push(batch);
            }
        }
        ensure!(!batches.is_empty(), "no kernel's name holds {:?}, or there is no such architecture", self.only);
        Ok(batches)
    }

    fn entries(&self, vendor: Vendor) -> Result<Vec<Entry>> {
        let mut entries = catalogue(vendor)?;
        entries.retain(|entry| {
            let named = self.only.as_ref().is_none_or(|text| entry.kernel.name.contains(text));
            let dims = |scores: &Scores| entry.followed && QUICK_HEAD_DIMS.contains(&scores.head_dim);
            // Those that multiply no matrices are few.
            named && (!self.quick || entry.scores.as_ref().is_none_or(dims))
        });
        Ok(entries)
    }

    fn archs(&self, vendor: Vendor) -> Vec<resources::Arch> {
        let chosen = |arch: &&resources::Arch| {
            let named = self.arch.as_ref().is_none_or(|name| name == arch.name);
            named && arch.vendor == vendor && (!self.quick || QUICK_ARCHS.contains(&arch.name))
        };
        resources::ARCHS.iter().filter(chosen).copied().collect()
    }
}

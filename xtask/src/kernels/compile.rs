//! Compiling kernels side by side.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use rayon::prelude::*;
use tilefold_emulator_nvrtc::{Nvrtc, Target, cuda_folder};
use tilefold_kernels::Entry;

use super::resources::{ARCHS, Arch, Resources};

/// Options besides the architecture: those of the backend, and ptxas's report.
const OPTIONS: [&str; 2] = ["--std=c++17", "--ptxas-options=-v"];

/// A kernel compiled for one architecture.
pub(super) struct Compiled<'a> {
    pub(super) entry: &'a Entry,
    pub(super) arch: Arch,
    pub(super) resources: Resources,
    /// The cubin's file.
    pub(super) path: PathBuf,
}

/// Cubins of all entries for all architectures, in the order of the entries.
pub(super) fn cubins<'a>(nvrtc: &Nvrtc, entries: &[&'a Entry]) -> Result<Vec<Compiled<'a>>> {
    let folder = cuda_folder().join("kernels");
    for arch in ARCHS {
        let folder = folder.join(arch.name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let jobs: Vec<_> = entries.iter().flat_map(|entry| ARCHS.map(|arch| (*entry, arch))).collect();
    jobs.into_par_iter()
        .map(|(entry, arch)| {
            let kernel = &entry.kernel;
            let named = || format!("{} for {}", kernel.name, arch.name);
            let compiled = nvrtc.compile(&kernel.source, Target::Cubin(arch.name), &OPTIONS).with_context(named)?;
            let path = folder.join(arch.name).join(format!("{}.cubin", &kernel.hash[..16]));
            fs::write(&path, &compiled.code).with_context(|| format!("cannot write {}", path.display()))?;
            Ok(Compiled { entry, arch, resources: Resources::read(&compiled.log).with_context(named)?, path })
        })
        .collect()
}

/// Refuses what a compiler cannot turn into PTX.
pub(super) fn to_ptx(nvrtc: &Nvrtc, entries: &[&Entry]) -> Result<()> {
    entries.par_iter().try_for_each(|entry| {
        let compiled = nvrtc.compile(&entry.kernel.source, Target::Ptx("compute_80"), &OPTIONS[..1]);
        compiled.map(drop).with_context(|| entry.kernel.name.clone())
    })
}

//! Compiling kernels side by side; what was compiled before is read back.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rayon::prelude::*;
use tilefold_emulator_nvrtc::{Nvrtc, Release, Target, cuda_folder};
use tilefold_kernels::{Entry, Kernel};

use super::resources::{Arch, Resources};

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

/// Cubins of all entries for some architectures, in the order of the entries.
pub(super) fn cubins<'a>(entries: &'a [Entry], archs: &[Arch]) -> Result<Vec<Compiled<'a>>> {
    let nvrtc = Nvrtc::fetched(Release::Newest)?;
    let folder = folder(Release::Newest)?;
    let jobs: Vec<_> = entries.iter().flat_map(|entry| archs.iter().map(move |arch| (entry, *arch))).collect();
    jobs.into_par_iter()
        .map(|(entry, arch)| {
            let target = Target::Cubin(arch.name);
            let path = folder.join(format!("{}.{}.cubin", entry.kernel.hash, arch.name));
            let log = compiled(&nvrtc, &entry.kernel, target, &path)
                .with_context(|| format!("{} for {}", entry.kernel.name, arch.name))?;
            Ok(Compiled { entry, arch, resources: Resources::read(&log)?, path })
        })
        .collect()
}

/// Refuses what the oldest compiler cannot turn into PTX.
pub(super) fn to_oldest_ptx(entries: &[Entry]) -> Result<()> {
    let nvrtc = Nvrtc::fetched(Release::Oldest)?;
    let folder = folder(Release::Oldest)?;
    entries.par_iter().try_for_each(|entry| {
        let path = folder.join(format!("{}.ptx", entry.kernel.hash));
        compiled(&nvrtc, &entry.kernel, Target::Ptx("compute_80"), &path).map(drop).context(entry.kernel.name.clone())
    })
}

/// Where a release's code is kept.
fn folder(release: Release) -> Result<PathBuf> {
    let folder = cuda_folder().join("compiled").join(release.folder());
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// The log of a compilation whose code is in `path`: done now, or before with the same source and compiler.
fn compiled(nvrtc: &Nvrtc, kernel: &Kernel, target: Target<'_>, path: &Path) -> Result<String> {
    let log_path = path.with_extension("log");
    if let (Ok(log), true) = (fs::read_to_string(&log_path), path.is_file()) {
        return Ok(log);
    }
    let options = if matches!(target, Target::Cubin(_)) { &OPTIONS[..] } else { &OPTIONS[..1] };
    let compiled = nvrtc.compile(&kernel.source, target, options)?;
    fs::write(path, &compiled.code).with_context(|| format!("cannot write {}", path.display()))?;
    // The log comes last: where it is, the code is whole.
    fs::write(&log_path, &compiled.log).with_context(|| format!("cannot write {}", log_path.display()))?;
    Ok(compiled.log)
}

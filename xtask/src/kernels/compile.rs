//! Compiling kernels side by side; what was compiled before is read back.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rayon::prelude::*;
use tilefold_emulator_nvrtc::{Nvrtc, Release, Target, cuda_folder};
use tilefold_kernels::{Entry, Kernel, Vendor};

use super::resources::{Arch, Resources};
use crate::clang::Clang;

/// Options besides the architecture: those of the backend, and ptxas's report.
const OPTIONS: [&str; 2] = ["--std=c++17", "--ptxas-options=-v"];

/// A kernel compiled for one architecture.
pub(super) struct Compiled<'a> {
    pub(super) entry: &'a Entry,
    pub(super) arch: Arch,
    pub(super) resources: Resources,
    /// The file of the cubin or code object.
    pub(super) path: PathBuf,
}

/// Compiles one kernel for one architecture: its resources, and the file of its code.
type Compiler<'a> = dyn Fn(&Kernel, Arch) -> Result<(Resources, PathBuf)> + Sync + 'a;

/// Machine code of all entries, which are of one vendor, for its architectures, in the order of the entries.
pub(super) fn machine_code<'a>(entries: &'a [Entry], archs: &[Arch]) -> Result<Vec<Compiled<'a>>> {
    let jobs: Vec<_> = entries.iter().flat_map(|entry| archs.iter().map(move |arch| (entry, *arch))).collect();
    let compile = |compiler: &Compiler<'_>| {
        jobs.par_iter()
            .map(|&(entry, arch)| {
                let (resources, path) = compiler(&entry.kernel, arch)
                    .with_context(|| format!("{} for {}", entry.kernel.name, arch.name))?;
                Ok(Compiled { entry, arch, resources, path })
            })
            .collect()
    };
    if archs.iter().all(|arch| arch.vendor == Vendor::Amd) {
        let clang = Clang::get()?;
        let folder = folder(&clang.name())?;
        compile(&|kernel, arch| code_object(clang, &folder, kernel, arch))
    } else {
        let nvrtc = Nvrtc::fetched(Release::Newest)?;
        let folder = folder(Release::Newest.folder())?;
        compile(&|kernel, arch| {
            let path = folder.join(format!("{}.{}.cubin", kernel.hash, arch.name));
            let log = compiled(&nvrtc, kernel, Target::Cubin(arch.name), &path)?;
            Ok((Resources::read(&log)?, path))
        })
    }
}

/// A code object, compiled now or before.
fn code_object(clang: Clang, folder: &Path, kernel: &Kernel, arch: Arch) -> Result<(Resources, PathBuf)> {
    let path = folder.join(format!("{}.{}.co", kernel.hash, arch.name));
    if !path.is_file() {
        let (source, new) = (path.with_extension("hip"), path.with_extension("new"));
        fs::write(&source, &kernel.source).with_context(|| format!("cannot write {}", source.display()))?;
        clang.compile(&source, arch.name, &new)?;
        // Whole before it has its name.
        fs::rename(&new, &path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok((Resources::of_notes(&clang.notes(&path)?)?, path))
}

/// Refuses what the oldest compiler cannot turn into PTX.
pub(super) fn to_oldest_ptx(entries: &[Entry]) -> Result<()> {
    let nvrtc = Nvrtc::fetched(Release::Oldest)?;
    let folder = folder(Release::Oldest.folder())?;
    entries.par_iter().try_for_each(|entry| {
        let path = folder.join(format!("{}.ptx", entry.kernel.hash));
        compiled(&nvrtc, &entry.kernel, Target::Ptx("compute_80"), &path).map(drop).context(entry.kernel.name.clone())
    })
}

/// Where a compiler's code is kept.
fn folder(compiler: &str) -> Result<PathBuf> {
    let folder = cuda_folder().join("compiled").join(compiler);
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

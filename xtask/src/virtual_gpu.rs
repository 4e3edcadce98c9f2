//! Running a command with the virtual GPU in place of NVIDIA's driver.

use std::env;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use tilefold_emulator_nvrtc::Release;

use crate::command::{artifacts, run};
use crate::cuda;
use crate::report::Count;

/// The library's file as cargo builds it.
const LIBRARY: &str = "libtilefold_emulator_cuda.so";

/// Names under which programs look for the driver.
const NAMES: [&str; 2] = ["libcuda.so", "libcuda.so.1"];

/// What the dynamic linker reads.
const LIBRARY_PATH: &str = "LD_LIBRARY_PATH";

/// Runs a command with `cuda` for its device, which may not be absent, on the virtual GPU, with kernels compiled by a release of NVRTC.
///
/// Compiled kernels are kept in the build folder.
pub(crate) fn with_virtual_gpu(release: Release, command: &[&str]) -> Result<Count> {
    cuda::fetch()?;
    let stand_in = stand_in()?;
    let home = stand_in.parent().context("a library without a folder")?.join("virtual-gpu");
    fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
    for name in NAMES {
        // A new file: processes that use the old one keep it.
        let file = home.join(name);
        let _ = fs::remove_file(&file);
        fs::copy(&stand_in, &file).with_context(|| format!("cannot write {}", file.display()))?;
    }
    let before = env::var_os(LIBRARY_PATH).unwrap_or_default();
    let before = env::split_paths(&before).filter(|folder| !folder.as_os_str().is_empty());
    let path = env::join_paths([home.clone()].into_iter().chain(before))?;
    let (cache, nvrtc) = (home.join("kernels"), release.library());
    let own = [
        (LIBRARY_PATH, path.to_str()),
        ("TILEFOLD_NVRTC", nvrtc.to_str()),
        ("TILEFOLD_CACHE_DIR", cache.to_str()),
        ("TILEFOLD_DEVICE", Some("cuda")),
        ("TILEFOLD_REQUIRE", Some("cuda")),
    ];
    let own = own.into_iter().map(|(name, value)| Ok((name, value.context("a path that is no text")?)));
    run(&own.collect::<Result<Vec<_>>>()?, command)
}

/// The library that stands for the driver, built as for the tests, which depend on it: nothing is built twice. It is no
/// dependency of this program, since its interpreter takes minutes to build.
fn stand_in() -> Result<PathBuf> {
    let built = artifacts(&["test", "--workspace", "--all-features", "--lib", "--no-run"])?;
    let files = built.into_iter().flat_map(|artifact| artifact.filenames).map(PathBuf::from);
    let is_it = |file: &PathBuf| file.file_name().is_some_and(|name| name == LIBRARY);
    files.into_iter().find(is_it).context("cargo built no tilefold-emulator-cuda")
}

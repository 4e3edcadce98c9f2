//! Processes of this test program: where the stand-in for the driver and the compiler are, and how one is started.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use libtest_mimic::Failed;
use tilefold_emulator_cuda::{LIBRARY, install, settings};
use tilefold_emulator_nvrtc::Release;

/// What this process is there for: not set, `tests`, or the name of a scenario.
const STAGE: &str = "TILEFOLD_TEST_STAGE";
/// What the dynamic linker reads.
const LIBRARY_PATH: &str = "LD_LIBRARY_PATH";
/// Names that must not be missing.
const REQUIRE: &str = "TILEFOLD_REQUIRE";

pub(crate) enum Stage {
    First,
    Tests,
    Scenario(String),
}

impl Stage {
    pub(crate) fn of_this_process() -> Self {
        match env::var(STAGE) {
            Err(_) => Self::First,
            Ok(stage) if stage == "tests" => Self::Tests,
            Ok(name) => Self::Scenario(name),
        }
    }
}

/// The folder in which the driver's names stand for the virtual device.
pub(crate) fn driver_folder() -> PathBuf {
    build_folder().join("virtual-gpu")
}

/// Where cargo puts this program and the libraries of its dependencies.
fn build_folder() -> PathBuf {
    env::current_exe().unwrap().parent().unwrap().to_owned()
}

/// Starts the tests with two virtual devices.
pub(crate) fn start_again() -> ExitCode {
    install(&build_folder().join(LIBRARY), &driver_folder()).unwrap();
    let cache = tempfile::tempdir().unwrap();
    let status = command("tests", &[driver_folder()])
        .args(env::args_os().skip(1))
        .env(settings::DEVICES, "2")
        .env("TILEFOLD_CACHE_DIR", cache.path())
        .status()
        .unwrap();
    ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1))
}

/// This program, with folders first on the library path, and the compiler that was fetched.
pub(crate) fn command(stage: &str, folders: &[PathBuf]) -> Command {
    let old = env::var_os(LIBRARY_PATH).unwrap_or_default();
    let installed = driver_folder();
    let rest = env::split_paths(&old).filter(|path| *path != installed && !path.as_os_str().is_empty());
    let path: OsString = env::join_paths(folders.iter().cloned().chain(rest)).unwrap();
    let mut command = Command::new(env::current_exe().unwrap());
    command.env(STAGE, stage).env(LIBRARY_PATH, path).env("TILEFOLD_NVRTC", Release::Newest.library());
    command
}

/// Why kernels cannot be compiled here.
///
/// # Errors
/// The reason, when CUDA is required.
pub(crate) fn missing_compiler() -> Result<Option<String>, Failed> {
    let library = Release::Newest.library();
    if library.is_file() {
        return Ok(None);
    }
    let reason = format!("no NVRTC at {}; `cargo xtask setup` fetches it", library.display());
    let required = env::var(REQUIRE).unwrap_or_default();
    if required.split(',').any(|name| name.trim() == "cuda") { Err(reason.into()) } else { Ok(Some(reason)) }
}

/// A folder whose files of these names are no libraries: what is behind it on the path is not found.
pub(crate) fn folder_without(names: &[&str], folder: &Path) {
    for name in names {
        std::fs::write(folder.join(name), "no library").unwrap();
    }
}

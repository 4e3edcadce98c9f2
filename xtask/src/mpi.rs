//! The two MPI libraries that ranks in processes are tested with.

use anyhow::{Context, Result};

use crate::command::{artifacts, output, run};
use crate::hosts::Hosts;
use crate::report::Count;
use crate::setup;

/// The feature that links an MPI library: the one whose `mpicc` is in the path.
pub(crate) const FEATURE: &str = "tilefold-comm/mpi";

/// A library by Debian's ending of its programs' names, and a word of what its launcher says of itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Library {
    pub(crate) name: &'static str,
    ending: &'static str,
    word: &'static str,
}

const OPEN_MPI: Library = Library { name: "Open MPI", ending: "openmpi", word: "open-mpi" };

const LIBRARIES: [Library; 2] = [OPEN_MPI, Library { name: "MPICH", ending: "mpich", word: "HYDRA" }];

/// Installs both libraries, and what makes Rust declarations of their headers, where they are missing.
pub(crate) fn install() -> Result<Count> {
    setup::programs(&[
        ("mpicc.openmpi", "libopenmpi-dev"),
        ("mpirun.openmpi", "openmpi-bin"),
        ("mpicc.mpich", "libmpich-dev"),
        ("mpirun.mpich", "mpich"),
    ])?;
    if !has_libclang() {
        setup::packages(&["libclang-dev"])?;
    }
    println!("Open MPI, MPICH and libclang are there");
    Ok(Count::one())
}

fn has_libclang() -> bool {
    let known = output(&["/sbin/ldconfig", "-p"]).unwrap_or_default();
    // Not libclang-cpp.
    let is_it = |line: &str| line.contains("libclang-1") || line.contains("libclang-2") || line.contains("libclang.so");
    String::from_utf8_lossy(&known).lines().any(is_it)
}

/// The libraries besides that of `mpicc` and `mpirun`, with which the tests of all crates are built and run.
pub(crate) fn others() -> Vec<Library> {
    let says = output(&["mpirun", "--version"]).unwrap_or_default();
    let says = String::from_utf8_lossy(&says).into_owned();
    LIBRARIES.into_iter().filter(|library| !says.contains(library.word)).collect()
}

/// All that is tested with processes, each library in a build of its own.
pub(crate) fn run_all() -> Result<()> {
    install()?;
    for library in LIBRARIES {
        library.test()?;
    }
    test_on_hosts().map(|_| ())
}

/// Whether the tests of all crates are run with Open MPI.
fn open_mpi_is_first() -> bool {
    others().iter().all(|library| library.name != OPEN_MPI.name)
}

/// Processes of Open MPI on two hosts; what comes from waiting, not from the network, is left out.
pub(crate) fn test_on_hosts() -> Result<Count> {
    let mut build = vec!["test", "--test", "mpi", "--no-run"];
    let target = format!("target/mpi-{}", OPEN_MPI.ending);
    if open_mpi_is_first() {
        build.extend(["--workspace", "--all-features"]);
    } else {
        build.extend(["--package", "tilefold-comm", "--features", "mpi", "--target-dir", &target]);
    }
    let built = artifacts(&build)?.into_iter().filter(|artifact| artifact.target.name == "mpi");
    let tests = built.filter_map(|artifact| artifact.executable).next().context("cargo built no test target mpi")?;
    let waiting = ["stops", "hangs", "killed", "longer"].map(|word| ["--skip", word]).concat();
    Hosts::new()?.run(&format!("mpirun.{}", OPEN_MPI.ending), &[&[&*tests], &waiting[..]].concat())
}

impl Library {
    /// Processes with this library, in a build of its own: one build links one library.
    pub(crate) fn test(self) -> Result<Count> {
        let [compiler, launcher] = ["mpicc", "mpirun"].map(|program| format!("{program}.{}", self.ending));
        let target = format!("target/mpi-{}", self.ending);
        let environment = [("MPICC", &*compiler), ("TILEFOLD_MPIRUN", &*launcher), ("CARGO_TARGET_DIR", &*target)];
        let test = ["cargo", "test", "--package", "tilefold-comm", "--features", "mpi", "--test", "mpi"];
        run(&environment, &test)
    }
}

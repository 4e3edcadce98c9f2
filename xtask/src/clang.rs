//! clang with AMD's target: compiles the kernels for gfx90a and gfx942 without ROCm.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

use crate::command::{output, succeeds};
use crate::setup;

/// The release that is installed when there is none.
const RELEASE: u32 = 19;

/// Releases that know gfx942 and write the notes that are read here, in the order in which they are taken.
const KNOWN: [u32; 6] = [RELEASE, 20, 21, 22, 18, 17];

/// Options besides the architecture: those of run-time compilation, without ROCm's headers and libraries.
const OPTIONS: [&str; 11] = [
    "-xhip",
    "--cuda-device-only",
    "--no-gpu-bundle-output",
    "-nogpuinc",
    "-nogpulib",
    "-std=c++17",
    "-O3",
    "-Wall",
    "-Wextra",
    // Constants are for whichever kernel wants them.
    "-Wno-unused-const-variable",
    "-c",
];

/// One release of clang, lld and LLVM's tools, by the name that Debian and Ubuntu give them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clang {
    release: u32,
}

impl Clang {
    /// A release that is there, or else release 19 from apt; looked for once.
    pub(crate) fn get() -> Result<Self> {
        static FOUND: OnceLock<Clang> = OnceLock::new();
        if let Some(found) = FOUND.get() {
            return Ok(*found);
        }
        Self::find().map(|found| *FOUND.get_or_init(|| found))
    }

    fn find() -> Result<Self> {
        if let Some(found) = KNOWN.into_iter().map(|release| Self { release }).find(Self::complete) {
            return Ok(found);
        }
        let wanted = Self { release: RELEASE };
        let packages = ["clang", "lld", "llvm"].map(|package| format!("{package}-{RELEASE}"));
        let programs: Vec<_> = wanted.programs().into_iter().zip(packages).collect();
        let programs: Vec<_> = programs.iter().map(|(program, package)| (program.as_str(), package.as_str())).collect();
        setup::programs(&programs)?;
        Ok(wanted)
    }

    /// The compiler, for messages.
    pub(crate) fn name(self) -> String {
        format!("clang-{}", self.release)
    }

    /// Compiles one source to a code object; a warning is an error.
    pub(crate) fn compile(self, source: &Path, arch: &str, object: &Path) -> Result<()> {
        let program = self.name();
        let output = Command::new(&program)
            .args(OPTIONS)
            .arg(format!("--offload-arch={arch}"))
            .arg("-o")
            .args([object, source])
            .output()
            .with_context(|| format!("cannot start {program}"))?;
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && log.is_empty(), "{program} for {arch}:\n{log}");
        Ok(())
    }

    /// The notes of a code object: registers, spills and memory of its kernels.
    pub(crate) fn notes(self, object: &Path) -> Result<String> {
        self.tool("llvm-readelf", "--notes", object)
    }

    /// Its code as text.
    pub(crate) fn disassembly(self, object: &Path) -> Result<String> {
        self.tool("llvm-objdump", "--disassemble", object)
    }

    fn tool(self, tool: &str, option: &str, object: &Path) -> Result<String> {
        let program = format!("{tool}-{}", self.release);
        let file = object.to_str().context("a path that is no text")?;
        Ok(String::from_utf8_lossy(&output(&[&program, option, file])?).into_owned())
    }

    /// Compiler, linker and one of LLVM's tools: one program of each package.
    fn programs(self) -> [String; 3] {
        ["clang", "ld.lld", "llvm-readelf"].map(|program| format!("{program}-{}", self.release))
    }

    fn complete(&self) -> bool {
        self.programs().iter().all(|program| succeeds(&[program, "--version"]))
    }
}

//! clang with AMD's target: compiles the kernels for gfx90a and gfx942 without ROCm.

use anyhow::Result;

use crate::command::succeeds;
use crate::setup;

/// The release that is installed when there is none.
const RELEASE: u32 = 19;

/// Releases that know gfx942 and write the notes that are read here, in the order in which they are taken.
const KNOWN: [u32; 6] = [RELEASE, 20, 21, 22, 18, 17];

/// One release of clang, lld and LLVM's tools, by the name that Debian and Ubuntu give them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clang {
    release: u32,
}

impl Clang {
    /// A release that is there, or else release 19 from apt.
    pub(crate) fn get() -> Result<Self> {
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

    /// Compiler, linker and one of LLVM's tools: one program of each package.
    fn programs(self) -> [String; 3] {
        ["clang", "ld.lld", "llvm-readelf"].map(|program| format!("{program}-{}", self.release))
    }

    fn complete(&self) -> bool {
        self.programs().iter().all(|program| succeeds(&[program, "--version"]))
    }
}

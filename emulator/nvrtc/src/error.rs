//! What can go wrong between a source text and compiled code.

use std::path::PathBuf;

/// Why NVRTC, or one of the disassemblers, gave no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NvrtcError {
    /// Not in the folder where `cargo xtask setup` puts it.
    #[error("{} is missing: run `cargo xtask setup`, which fetches it from PyPI (x86-64 Linux)", path.display())]
    NotFetched {
        /// The file that was looked for.
        path: PathBuf,
    },
    /// The dynamic linker refused the library, or it lacks a function.
    #[error("cannot load {}", path.display())]
    Load {
        /// The library.
        path: PathBuf,
        /// The linker's reason.
        source: libloading::Error,
    },
    /// The compiler refused the source; its log says why.
    #[error("NVRTC {}.{} refused the source for {target}:\n{log}", version.0, version.1)]
    Refused {
        /// The compiler's version.
        version: (u32, u32),
        /// What was asked for, such as `sm_80`.
        target: String,
        /// The compiler's log.
        log: String,
    },
    /// A call failed for another reason.
    #[error("{call} failed with status {status}: {message}")]
    Call {
        /// The function.
        call: &'static str,
        /// Its result.
        status: i32,
        /// NVRTC's name for the result.
        message: String,
    },
    /// A source or option with a NUL byte inside.
    #[error("the {what} holds a NUL byte")]
    Nul {
        /// Source or option.
        what: &'static str,
    },
    /// Code that was to be text and is not.
    #[error("the compiled code is no text; only PTX is")]
    NotText,
}

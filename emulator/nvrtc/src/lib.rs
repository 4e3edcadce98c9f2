//! NVRTC, NVIDIA's run-time compiler, loaded from a path: for the checks and tests of the kernels, never published.
//!
//! `cargo xtask setup` fetches two releases, the newest and the oldest that is supported, and the disassemblers, into
//! [`cuda_folder`]. A GPU or a driver is not needed: NVRTC compiles without.
//!
//! ```no_run
//! use tilefold_emulator_nvrtc::{Nvrtc, Release, Target};
//!
//! let nvrtc = Nvrtc::fetched(Release::Newest)?;
//! let source = r#"extern "C" __global__ void one(float* x) { *x = 1.0f; }"#;
//! let compiled = nvrtc.compile(source, Target::Ptx("compute_80"), &["--std=c++17"])?;
//! assert!(compiled.text()?.contains(".entry one"));
//! # Ok::<(), tilefold_emulator_nvrtc::NvrtcError>(())
//! ```

mod error;
mod folder;
mod nvrtc;

pub use error::NvrtcError;
pub use folder::{Release, cuda_folder, tool};
pub use nvrtc::{Compiled, Nvrtc, Target};

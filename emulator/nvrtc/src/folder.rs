//! Where the fetched CUDA tools are.

use std::path::{Path, PathBuf};

use crate::NvrtcError;

/// A release of NVRTC that `cargo xtask setup` fetches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Release {
    /// 13.5: what the kernels are tuned with.
    Newest,
    /// 12.0: the oldest that the kernels compile with.
    Oldest,
}

impl Release {
    /// Both, newest first.
    pub const ALL: [Self; 2] = [Self::Newest, Self::Oldest];

    /// Version as NVRTC states it.
    #[must_use]
    pub const fn version(self) -> (u32, u32) {
        match self {
            Self::Newest => (13, 5),
            Self::Oldest => (12, 0),
        }
    }

    /// Its folder below [`cuda_folder`].
    #[must_use]
    pub const fn folder(self) -> &'static str {
        match self {
            Self::Newest => "nvrtc-13.5",
            Self::Oldest => "nvrtc-12.0",
        }
    }

    /// Its library, whether fetched or not.
    #[must_use]
    pub fn library(self) -> PathBuf {
        cuda_folder().join(self.folder()).join(match self {
            Self::Newest => "libnvrtc.so.13",
            Self::Oldest => "libnvrtc.so.12",
        })
    }
}

/// The folder of all fetched CUDA tools: `TILEFOLD_CUDA_DIR`, for a cache that outlives `cargo clean`, or `cuda` in the
/// workspace's build folder.
#[must_use]
pub fn cuda_folder() -> PathBuf {
    if let Some(chosen) = std::env::var_os("TILEFOLD_CUDA_DIR") {
        return absolute(PathBuf::from(chosen));
    }
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(chosen) => absolute(PathBuf::from(chosen)),
        // emulator/nvrtc is two folders below the workspace's root.
        None => Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("/")).join("target"),
    };
    target.join("cuda")
}

/// A path from the workspace's root, where cargo's own variables start; tests run in their package's folder.
fn absolute(path: PathBuf) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("/"));
    root.join(path)
}

/// A fetched program: `nvdisasm` or `cuobjdump`.
///
/// # Errors
/// [`NvrtcError::NotFetched`].
pub fn tool(name: &str) -> Result<PathBuf, NvrtcError> {
    let path = cuda_folder().join("tools").join(name);
    if path.is_file() { Ok(path) } else { Err(NvrtcError::NotFetched { path }) }
}

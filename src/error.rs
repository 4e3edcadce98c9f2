//! What can go wrong in the facade: the contract's errors, and files.

use std::path::PathBuf;

use crate::{DeviceError, OpenError, ProblemError};

/// Everything this crate's functions report.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The caller's mistake, found before a device was touched.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// A device failed, or cannot do what was asked.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A device cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A file cannot be read or written.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// One tensor of a file cannot be read or written.
    #[error("{}: tensor `{tensor}`: {message}", path.display())]
    FileTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// What is wrong.
        message: String,
    },
}

//! What can go wrong in the model.

use super::tokens::GenomeError;

/// Everything this module's functions report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Sizes or choices that do not go together.
    #[error("{field}: expected {expected}, got {got}")]
    Config {
        /// What is wrong.
        field: &'static str,
        /// What would do.
        expected: String,
        /// What came.
        got: String,
    },
    /// A genome that cannot be read.
    #[error(transparent)]
    Genome(#[from] GenomeError),
    /// Ranks, attention or the device.
    #[error(transparent)]
    Comm(#[from] tilefold::comm::Error),
    /// A tensor that does not fit.
    #[error(transparent)]
    Problem(#[from] tilefold::ProblemError),
    /// A matrix that does not have the elements of its shape.
    #[error(transparent)]
    Shape(#[from] ndarray::ShapeError),
}

/// The result of this module's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

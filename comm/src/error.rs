//! What can go wrong between ranks.

use std::time::Duration;

use tilefold_core::{DeviceError, ProblemError};

/// Everything this crate's functions report.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Ranks did not come together.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// The caller's mistake, found on this rank.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// A device failed, or cannot do what was asked.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A collective that could not be done. All ranks of the communicator get one, each within its deadline.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    /// Two ranks called different operations, or one with another dtype or other sizes than its peer.
    #[error("ranks called different operations: rank {} called {}, rank {} called {}", ranks[0], operations[0], ranks[1], operations[1])]
    Mismatch {
        /// The first two ranks that differ.
        ranks: [usize; 2],
        /// What each of them called.
        operations: [String; 2],
    },
    /// A rank dropped its communicator while others still needed it.
    #[error("rank {rank} {} before {operation}", if *panicked { "panicked" } else { "left" })]
    Lost {
        /// The rank that is gone.
        rank: usize,
        /// Whether it was unwinding from a panic.
        panicked: bool,
        /// What the others were waiting in.
        operation: String,
    },
    /// Some ranks did not come in time.
    #[error(
        "{operation}: no answer from ranks {missing:?} within {deadline:?}; see what they do, or set a longer deadline"
    )]
    Deadline {
        /// What was called.
        operation: String,
        /// How long was waited.
        deadline: Duration,
        /// The ranks that had not come.
        missing: Vec<usize>,
    },
    /// A rank found its own arguments wrong, and told the others.
    #[error("{operation}: rank {rank} refused: {message}")]
    Refused {
        /// What was called.
        operation: String,
        /// The rank that refused.
        rank: usize,
        /// Its error.
        message: String,
    },
    /// An earlier failure left the ranks out of step: make a new communicator.
    #[error("this communicator is unusable since an earlier failure: {first}")]
    Unusable {
        /// The first failure.
        first: String,
    },
    /// A rank number that the communicator does not have.
    #[error("{parameter}: expected a rank below {world_size}, got {got}")]
    NoSuchRank {
        /// The argument.
        parameter: &'static str,
        /// Ranks there are.
        world_size: usize,
        /// What came.
        got: usize,
    },
    /// A list has not one entry for each rank, or its numbers do not add up.
    #[error("{list}: expected {expected}, got {got}")]
    Counts {
        /// The argument.
        list: &'static str,
        /// What would do.
        expected: String,
        /// What came.
        got: String,
    },
    /// A rank would hold no position of the sequence: use fewer ranks.
    #[error("rank {rank}: no position is left for it of a sequence of {seqlen}; use fewer ranks")]
    EmptyShard {
        /// The rank.
        rank: usize,
        /// Positions there are.
        seqlen: usize,
    },
    /// A position of the sequence belongs to no rank, to more than one, or lies outside.
    #[error("position {position} of a sequence of {seqlen}: expected one rank to hold it, got {owners:?}")]
    Cover {
        /// Positions there are.
        seqlen: usize,
        /// The position.
        position: usize,
        /// The ranks that hold it.
        owners: Vec<usize>,
    },
    /// Something is made for another number of ranks.
    #[error("{what}: made for {expected} ranks, but there are {got}")]
    WorldSize {
        /// What is.
        what: &'static str,
        /// Its ranks.
        expected: usize,
        /// Ranks of the communicator.
        got: usize,
    },
    /// A number outside its range.
    #[error("{parameter}: expected {expected}, got {got}")]
    Setting {
        /// The option.
        parameter: &'static str,
        /// What would do.
        expected: &'static str,
        /// What came.
        got: f64,
    },
    /// A deadline of zero would fail whatever the others do.
    #[error("deadline: expected a time above zero, got zero")]
    ZeroDeadline,
    /// A sum of integers does not fit their type.
    #[error("{operation}: element {index} of the sum is {sum}, which i32 does not hold")]
    IntegerOverflow {
        /// What was called.
        operation: String,
        /// The element.
        index: usize,
        /// Its value.
        sum: i64,
    },
    /// A call of the engine below failed.
    #[error("{call} failed with status {status}: {message}")]
    Driver {
        /// The call.
        call: &'static str,
        /// Its status code.
        status: i64,
        /// The engine's words.
        message: String,
    },
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

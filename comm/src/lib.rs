//! Sequence parallelism: attention over sequences that are split over ranks.

mod communicator;
mod error;
mod host;
#[cfg(feature = "mpi")]
mod mpi;
mod partition;
mod rank;
mod reduce;
pub mod sequence_parallel;
mod shape;
mod threads;
mod transport;

pub use communicator::{Communicator, DEFAULT_DEADLINE, Shift, Traffic, near_equal};
pub use error::{CommError, Error, Result};
pub use partition::Partition;
pub use rank::Rank;
pub use reduce::Reduction;
pub use sequence_parallel::{
    AxialAttention, RingAttention, Shard, ShardBackward, ShardForward, SharedBias, UlyssesAttention, UlyssesForward,
};
pub use transport::Parcel;

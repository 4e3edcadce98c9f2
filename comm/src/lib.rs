//! Sequence parallelism: attention over sequences that are split over ranks.
//!
//! The data's way: a [`Communicator`] is one rank's end of a group, and carries tensors ([`Parcel`]) through an engine, threads or
//! MPI; a [`Partition`] says who holds which positions; a [`Rank`] is a communicator with a device; what ranks compute
//! together is in [`sequence_parallel`]. `docs/sequence-parallel.md` has pictures, memory and traffic.

pub mod activation;
mod adam;
mod communicator;
mod error;
mod host;
pub mod memory_model;
#[cfg(feature = "mpi")]
mod mpi;
mod partition;
mod rank;
mod reduce;
pub mod sequence_parallel;
mod shape;
mod threads;
mod transport;

pub use adam::{AdamOptions, AdamState, ShardedAdam};
pub use communicator::{Communicator, DEFAULT_DEADLINE, Shift, Traffic, near_equal, on_threads};
pub use error::{CommError, Error, Result};
pub use partition::Partition;
pub use rank::Rank;
pub use reduce::Reduction;
pub use sequence_parallel::{
    AxialAttention, RingAttention, Shard, ShardBackward, ShardForward, SharedBias, UlyssesAttention, UlyssesForward,
};
pub use transport::Parcel;

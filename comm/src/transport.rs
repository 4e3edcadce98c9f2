//! What an engine must do to carry tensors between ranks: one exchange among all, and letters between two.

use std::sync::Arc;
use std::time::Duration;

use enum_dispatch::enum_dispatch;
use tilefold_core::Tensor;

use crate::error::CommError;
#[cfg(feature = "mpi")]
use crate::mpi::MpiGroup;
use crate::threads::ThreadGroup;

/// Row-major host tensors on their way from one rank to another: shared, not copied, between threads.
pub type Parcel = Vec<Arc<Tensor>>;

/// Ranks of one group as one of them sees them. All collectives are made of these calls, the same for every engine, so
/// results have the same bits on all of them.
#[enum_dispatch]
pub(crate) trait Transport {
    /// Number of this rank.
    fn rank(&self) -> usize;

    /// Ranks of the group.
    fn world_size(&self) -> usize;

    /// Begins exchange `number`, which every rank of the group takes part in: one parcel for each rank, its own included.
    ///
    /// Exchanges are numbered from 0; a rank begins and ends them in that order. `operation` must be the same on all ranks.
    ///
    /// # Errors
    /// The group's failure, when there has been one.
    fn post(&self, number: u64, operation: &str, parcels: Vec<Parcel>) -> Result<(), CommError>;

    /// Ends exchange `number`: what each rank has sent to this one.
    ///
    /// # Errors
    /// [`CommError::Mismatch`], [`CommError::Lost`], [`CommError::Deadline`], each the group's failure from then on.
    fn collect(&self, number: u64, operation: &str, deadline: Duration) -> Result<Vec<Parcel>, CommError>;

    /// Sends a letter; returns at once. Letters from one rank to another arrive in order.
    ///
    /// # Errors
    /// The group's failure, when there has been one.
    fn send(&self, to: usize, operation: &str, parcel: Parcel) -> Result<(), CommError>;

    /// Waits for the next letter of a rank.
    ///
    /// # Errors
    /// As [`Transport::collect`].
    fn receive(&self, from: usize, operation: &str, deadline: Duration) -> Result<Parcel, CommError>;

    /// A group of those ranks that name the same members, given in the order of their new numbers; a collective of all
    /// ranks, after which exchanges of the new group begin at 0.
    ///
    /// # Errors
    /// What the engine reports.
    fn subgroup(&self, number: u64, members: &[usize]) -> Result<Engine, CommError>;

    /// Makes the group unusable on every rank; gives back what to return.
    fn fail(&self, error: CommError) -> CommError;

    /// The group's first failure.
    fn failure(&self) -> Option<CommError>;
}

/// The engines.
#[enum_dispatch(Transport)]
#[derive(Debug)]
pub(crate) enum Engine {
    /// Ranks are threads of this process.
    ThreadGroup,
    /// Ranks are processes of an MPI job.
    #[cfg(feature = "mpi")]
    MpiGroup,
}

//! Sequence parallelism: attention over sequences that are split over ranks.

mod communicator;
mod error;
mod host;
mod reduce;
mod threads;
mod transport;

pub use communicator::{Communicator, DEFAULT_DEADLINE, Shift, Traffic, near_equal};
pub use error::{CommError, Error, Result};
pub use reduce::Reduction;
pub use transport::Parcel;

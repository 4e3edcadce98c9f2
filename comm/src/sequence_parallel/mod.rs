//! What ranks compute together, each function with its exact adjoint.

mod axial;
mod local;
pub mod maps;
pub mod position;
mod ring;
mod ring_backward;
mod rope;
mod travelling;
mod ulysses;

pub use axial::{AxialAttention, SharedBias};
pub use ring::{RingAttention, Shard, ShardBackward, ShardForward};
pub use rope::rope;
pub use ulysses::{UlyssesAttention, UlyssesForward};

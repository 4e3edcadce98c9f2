//! What ranks compute together, each function with its exact adjoint.

mod local;
pub mod maps;
mod ring;
mod ring_backward;

pub use ring::{RingAttention, Shard, ShardBackward, ShardForward};

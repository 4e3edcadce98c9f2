//! What a backend decided about a problem, as plain data.

use crate::{AttentionProblem, DeviceId};

/// How one device computes one problem: made once by a backend, used for any number of launches.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionPlan {
    /// The problem it computes.
    pub problem: AttentionProblem,
    /// The device it was made for.
    pub device: DeviceId,
    /// Name of the kernel, with its instruction set.
    pub kernel: String,
    /// Queries of one tile.
    pub tile_q: usize,
    /// Keys of one tile.
    pub tile_k: usize,
    /// Bytes a forward launch needs beside its operands.
    pub forward_workspace_bytes: usize,
    /// Bytes a backward launch needs beside its operands.
    pub backward_workspace_bytes: usize,
    /// Whether equal inputs give equal bits, whatever the number of workers.
    pub deterministic: bool,
}

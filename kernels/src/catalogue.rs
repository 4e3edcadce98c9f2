//! Every kernel that a launch of this crate can choose, for checks of all of them.
//!
//! Copies, fills and merges have few variants, and all are here. Attention has more than anyone can compile: a head
//! dimension of 1 to 256 for q and for v, four biases of four kinds, nine switches. What is here covers each constant's
//! values, and the combinations that models use, in the way in which the plan itself chooses them.

mod attention;

use crate::kernel::{Kernel, KernelError};
use crate::{backward, fill, merge, relayout};

/// One kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What is compiled and launched.
    pub kernel: Kernel,
    /// The work of its hot loop, where that is attention.
    pub scores: Option<Scores>,
}

/// What a kernel's hot loop does, as the source says and compiled code does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scores {
    /// The part of attention.
    pub pass: Pass,
    /// The problem, in a word or two: `pair+mask`.
    pub case: &'static str,
    /// Queries whose scores a block handles in one trip.
    pub tile_q: usize,
    /// Keys of a trip.
    pub tile_k: usize,
    /// Warps of a block.
    pub warps: usize,
    /// Matrix products of each score.
    pub products: usize,
    /// Channels that a product goes over, padding included: the mean over the products.
    pub depth: usize,
    /// Channels of q and k by the problem.
    pub head_dim: usize,
    /// Type of the operands.
    pub dtype: tilefold_core::DType,
    /// Whether tiles come by asynchronous copies.
    pub async_copies: bool,
}

/// A part of attention with a kernel of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Pass {
    /// out and lse: blocks own queries and walk keys.
    Forward,
    /// Gradients of k and v: blocks own keys and walk queries.
    BackwardKeys,
    /// Gradients of q and of biases: blocks own queries, or a tile of a bias whose rows they walk.
    BackwardQueries,
}

/// All kernels: those of copies, fills and merges in every dtype, those of attention.
///
/// # Errors
/// [`KernelError::MissingSource`].
pub fn catalogue() -> Result<Vec<Entry>, KernelError> {
    let moves = fill::kernels().chain(relayout::kernels()).chain(merge::kernels());
    let plain = moves.map(|kernel| kernel.map(|kernel| Entry { kernel, scores: None }));
    let mut entries = plain.collect::<Result<Vec<_>, _>>()?;
    entries.extend(attention::forward()?);
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_have_sources_of_their_own() {
        let mut hashes: Vec<_> = catalogue().unwrap().into_iter().map(|entry| entry.kernel.hash).collect();
        let entries = hashes.len();
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), entries);
    }
}

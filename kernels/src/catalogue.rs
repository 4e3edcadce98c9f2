//! Every kernel that a launch of this crate can choose, for checks of all of them.
//!
//! Copies, fills, sums, merges and rotations have few variants, and all are here. Attention has more than anyone can compile: a head
//! dimension of 1 to 256 for q and for v, four biases of four kinds, nine switches. What is here are the combinations that
//! models use, and problems that turn on each switch and are odd or strided, in the way in which the plan itself chooses
//! their constants.

mod attention;
mod scores;

pub use scores::{Pass, Scores, Walk};

use tilefold_core::DType;

use crate::kernel::{Kernel, KernelError};
use crate::vendor::Vendor;
use crate::{accumulate, backward, fill, merge, relayout, rope};

/// One kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What is compiled and launched.
    pub kernel: Kernel,
    /// The work of its hot loop, where that is attention.
    pub scores: Option<Scores>,
    /// Whether it is one of those whose speed is followed: bf16, with the operands that models give it.
    pub followed: bool,
}

/// All kernels for one vendor: those of copies, fills, sums, merges and rotations in every dtype, those of attention.
///
/// # Errors
/// [`KernelError::MissingSource`].
pub fn catalogue(vendor: Vendor) -> Result<Vec<Entry>, KernelError> {
    let sums = accumulate::kernels().chain(merge::kernels());
    let moves = fill::kernels().chain(relayout::kernels()).chain(sums).chain(rope::kernels());
    let mut entries: Vec<Entry> = Vec::new();
    let mut add = |kernel: Kernel, followed| {
        if !entries.iter().any(|entry| entry.kernel.hash == kernel.hash) {
            let scores = Scores::of(&kernel, vendor);
            let followed = followed && scores.as_ref().is_some_and(|scores| scores.dtype == DType::BF16);
            entries.push(Entry { kernel, scores, followed });
        }
    };
    for kernel in moves {
        add(kernel?, false);
    }
    for (kernel, followed) in attention::forward(vendor)? {
        add(kernel, followed);
    }
    for (kernel, followed) in backward::kernels(vendor)? {
        add(kernel, followed);
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amd_has_every_pass() {
        let entries = catalogue(Vendor::Amd).unwrap();
        let forward = entries.iter().find(|entry| entry.kernel.name.starts_with("forward bf16 8x8 bias0")).unwrap();
        let scores = forward.scores.as_ref().unwrap();
        // v is padded to 32 channels.
        assert_eq!((scores.tile_q, scores.tile_k, scores.depth, scores.products), (128, 64, 20, 2));
        assert_eq!(forward.kernel.block_threads, 256);
        let keys = entries.iter().find(|entry| entry.kernel.name.starts_with("backward_keys bf16 8x8")).unwrap();
        let scores = keys.scores.as_ref().unwrap();
        // Channels of dK and dV are padded to 32.
        assert_eq!((scores.tile_q, scores.tile_k, scores.depth, scores.products), (32, 256, 20, 4));
        assert!(entries.iter().any(|entry| entry.kernel.entry == "sums"));
        let bias = entries.iter().find(|entry| entry.kernel.name.starts_with("backward_bias bf16 8x8")).unwrap();
        let scores = bias.scores.as_ref().unwrap();
        assert_eq!((scores.tile_q, scores.tile_k, scores.depth, scores.products), (128, 64, 16, 3));
    }

    #[test]
    fn the_work_of_every_pass_is_known() {
        let entries = catalogue(Vendor::Nvidia).unwrap();
        for pass in [Pass::Forward, Pass::BackwardKeys, Pass::BackwardQueries] {
            let of_pass = |entry: &&Entry| entry.scores.as_ref().is_some_and(|scores| scores.pass == pass);
            assert!(entries.iter().filter(of_pass).any(|entry| entry.followed), "{pass:?}");
        }
        let forward = entries.iter().find(|entry| entry.kernel.name.starts_with("forward bf16 32x32")).unwrap();
        let scores = forward.scores.as_ref().unwrap();
        assert_eq!((scores.products, scores.depth, scores.head_dim, scores.async_copies), (2, 32, 32, true));
        assert!(forward.kernel.name.ends_with(&format!("tile {}x{}", scores.tile_q, scores.tile_k)));
    }
}

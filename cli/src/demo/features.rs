//! Turns an alignment into what an AlphaFold-type Evoformer block gives its attention: real structure, seeded weights.
//!
//! The inputs follow Jumper et al., "Highly accurate protein structure prediction with AlphaFold", Nature 596 (2021),
//! supplementary information, whose algorithm numbers are cited below:
//!
//! ```text
//! residues, deletions                                    MsaFeatures       (section 1.2.9)
//!   -> m = residue + deletion + target row               EvoformerInputs   (Alg. 3)
//!   -> z = target_i + target_j + relpos + outer product  EvoformerInputs   (Alg. 3, 4, 10)
//!   -> layer norm -> q, k, v, gate, pair bias            VariantInputs     (Alg. 7, 8, 13, 14)
//!
//! residues, deletions -> e -> layer norm -> q, k, v, gate  ExtraMsa        (Alg. 18, first block)
//! ```
//!
//! *What is real*: which residues, gaps, insertions and positions meet, hence the masks, the repeats among rows and
//! the structure of the bias. *What is not*: the weights, which are seeded normal numbers and not a trained model's,
//! so that nothing has to be fetched. Weights are scaled to keep every activation near unit variance: `1 /
//! sqrt(inputs)` for dense inputs, 1 for one-hot ones, of which one is active at a time. Two further departures: the
//! outer product mean is taken of the embedded alignment, not after a block of attention, and with 16 channels a side
//! instead of 32.
//!
//! *Numerics*: `f32`, every sum in a fixed order; equal seeds give equal values whatever the number of threads.

mod extra_msa;
mod linear;
mod representation;
mod residue;
mod stream;
#[cfg(test)]
mod tests;
mod variant;

pub(crate) use extra_msa::{ExtraMsa, ExtraMsaOptions, ExtraMsaTensor};
pub(crate) use representation::EvoformerInputs;
pub(crate) use residue::MsaFeatures;
pub(crate) use variant::VariantInputs;

/// Most values one tensor may have: 8 GiB of `f32`.
const LIMIT_VALUES: usize = 1 << 31;

/// Widths of an Evoformer block and the seed of its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FeatureOptions {
    /// Channels of the MSA representation (`c_m`).
    pub(crate) msa_channels: usize,
    /// Channels of the pair representation (`c_z`).
    pub(crate) pair_channels: usize,
    /// Heads of row and column attention.
    pub(crate) msa_heads: usize,
    /// Heads of triangle attention.
    pub(crate) pair_heads: usize,
    /// Channels a head.
    pub(crate) head_dim: usize,
    /// Seed of every weight and of `d_out`.
    pub(crate) seed: u64,
}

impl Default for FeatureOptions {
    /// The paper's Evoformer block.
    fn default() -> Self {
        Self { msa_channels: 256, pair_channels: 128, msa_heads: 8, pair_heads: 4, head_dim: 32, seed: 0 }
    }
}

/// Why features cannot be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub(crate) enum FeatureError {
    /// A size is zero.
    #[error("{what} is 0; give at least 1")]
    Zero {
        /// The size.
        what: &'static str,
    },
    /// A tensor would be larger than this program makes.
    #[error(
        "{tensor} of shape {shape:?} has more than {limit} values; use fewer sequences, residues or channels",
        limit = LIMIT_VALUES
    )]
    TooLarge {
        /// The tensor.
        tensor: &'static str,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The system gives no memory for a tensor.
    #[error("{tensor}: no memory for {bytes} bytes; use fewer sequences or residues, or allow more memory")]
    NoMemory {
        /// The tensor.
        tensor: &'static str,
        /// Its size.
        bytes: usize,
    },
    /// A caller's row buffer does not fit.
    #[error("row buffer has {got} values, expected {expected} (residues x heads x head_dim); resize it")]
    RowLength {
        /// Values a row has.
        expected: usize,
        /// Values the buffer has.
        got: usize,
    },
    /// A row beyond the last.
    #[error("row {row} asked for, but there are {n_seq} sequences; ask for a smaller one")]
    NoSuchRow {
        /// The row, from 0.
        row: usize,
        /// Number of rows.
        n_seq: usize,
    },
}

/// Number of values of a tensor, if this program makes tensors of that size.
fn values(tensor: &'static str, shape: &[usize]) -> Result<usize, FeatureError> {
    shape
        .iter()
        .try_fold(1_usize, |product, &extent| product.checked_mul(extent))
        .filter(|&product| product <= LIMIT_VALUES)
        .ok_or_else(|| FeatureError::TooLarge { tensor, shape: shape.to_vec() })
}

/// An empty vector with room for `count` elements.
fn reserved<T>(tensor: &'static str, count: usize) -> Result<Vec<T>, FeatureError> {
    let mut reserved = Vec::new();
    let bytes = count.saturating_mul(size_of::<T>());
    reserved.try_reserve_exact(count).map_err(|_| FeatureError::NoMemory { tensor, bytes })?;
    Ok(reserved)
}

/// A tensor of zeros.
fn zeros(tensor: &'static str, shape: &[usize]) -> Result<Vec<f32>, FeatureError> {
    let count = values(tensor, shape)?;
    let mut zeros = reserved(tensor, count)?;
    zeros.resize(count, 0.0);
    Ok(zeros)
}

/// Refuses sizes of zero, which would leave nothing to attend to.
fn nonzero(sizes: &[(&'static str, usize)]) -> Result<(), FeatureError> {
    match sizes.iter().find(|(_, size)| *size == 0) {
        Some(&(what, _)) => Err(FeatureError::Zero { what }),
        None => Ok(()),
    }
}

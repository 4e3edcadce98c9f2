//! Additive biases: their shapes, dtypes, and the names errors use.

use crate::DType;

/// Biases one problem may have.
pub const MAX_BIASES: usize = 4;

/// One additive bias of the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BiasSpec {
    /// Sizes for `[batch, rows, heads, seqlen_q, seqlen_k]`; an axis of size 1 is broadcast.
    pub shape: [usize; 5],
    /// That of q, or f32.
    pub dtype: DType,
}

/// Names of the axes a bias broadcasts over.
pub(crate) const BIAS_AXES: [&str; 5] = ["batch", "rows", "heads", "seqlen_q", "seqlen_k"];

/// Names of biases and of their gradients.
pub(crate) const BIAS_NAMES: [&str; MAX_BIASES] = ["bias0", "bias1", "bias2", "bias3"];
pub(crate) const DBIAS_NAMES: [&str; MAX_BIASES] = ["dbias0", "dbias1", "dbias2", "dbias3"];

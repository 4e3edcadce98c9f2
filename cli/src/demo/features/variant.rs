//! The four Evoformer attentions: projections of a block's inputs to q, k, v, gate and pair bias (Alg. 7, 8, 13, 14).

use super::linear::{Linear, fill_normal};
use super::representation::EvoformerInputs;
use super::{FeatureError, stream, values};

/// Which of a block's attentions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Variant {
    /// Along the residues of each sequence, with pair bias (Alg. 7).
    MsaRow,
    /// Along the sequences at each residue (Alg. 8).
    MsaColumn,
    /// Along `j` of the pair `[i, j]` (Alg. 13).
    TriangleStarting,
    /// Along `i` of the pair `[i, j]` (Alg. 14).
    TriangleEnding,
}

impl Variant {
    /// Every variant, in the order of an Evoformer block.
    pub(crate) const ALL: [Self; 4] = [Self::MsaRow, Self::MsaColumn, Self::TriangleStarting, Self::TriangleEnding];

    fn first_stream(self) -> u64 {
        match self {
            Self::MsaRow => stream::MSA_ROW,
            Self::MsaColumn => stream::MSA_COLUMN,
            Self::TriangleStarting => stream::TRIANGLE_STARTING,
            Self::TriangleEnding => stream::TRIANGLE_ENDING,
        }
    }
}

/// What one attention takes, in the order in which a model holds it: nothing is transposed for any variant.
///
/// *Shapes* (row-major): q, k, v, gate, d_out [`shape`](Self::shape); mask its first three extents; bias
/// [`bias_shape`](Self::bias_shape).
///
/// | variant | shape | attends along | bias `[1, 1, heads, n_res, n_res]` |
/// |---|---|---|---|
/// | MSA row | `[1, n_seq, n_res, heads, head_dim]` | axis 2 | `[query, key]` |
/// | MSA column | `[1, n_seq, n_res, heads, head_dim]` | axis 1 | none |
/// | triangle, starting node | `[1, n_res, n_res, heads, head_dim]` | axis 2 | `[query, key]` |
/// | triangle, ending node | `[1, n_res, n_res, heads, head_dim]` | axis 1 | `[key, query]`: the untransposed pair's |
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct VariantInputs {
    /// `[1, outer, inner, heads, head_dim]`.
    pub(crate) shape: [usize; 5],
    /// Queries.
    pub(crate) q: Vec<f32>,
    /// Keys.
    pub(crate) k: Vec<f32>,
    /// Values.
    pub(crate) v: Vec<f32>,
    /// Gate before its sigmoid.
    pub(crate) gate: Vec<f32>,
    /// Gradient of the output, standard normal.
    pub(crate) d_out: Vec<f32>,
    /// `[1, outer, inner]`: whether a place may be attended to.
    pub(crate) mask: Vec<bool>,
    /// Bias from the pair representation.
    pub(crate) bias: Option<Vec<f32>>,
}

impl VariantInputs {
    /// Shape of the bias, `[1, 1, heads, n_res, n_res]`, for the variants that have one.
    pub(crate) fn bias_shape(&self) -> [usize; 5] {
        let [_, _, n_res, heads, _] = self.shape;
        [1, 1, heads, n_res, n_res]
    }
}

impl EvoformerInputs {
    /// Projects the inputs of one attention; the weights of each variant are its own.
    ///
    /// # Errors
    ///
    /// [`FeatureError::TooLarge`] if a tensor would be.
    pub(crate) fn variant(&self, variant: Variant) -> Result<VariantInputs, FeatureError> {
        let (options, features) = (self.options(), self.features());
        let (n_seq, n_res) = (features.n_seq(), features.n_res());
        let is_msa = matches!(variant, Variant::MsaRow | Variant::MsaColumn);
        let (input, channels, outer, heads, mask) = if is_msa {
            (self.msa(), options.msa_channels, n_seq, options.msa_heads, features.mask())
        } else {
            (self.pair(), options.pair_channels, n_res, options.pair_heads, features.pair_mask())
        };
        let shape = [1, outer, n_res, heads, options.head_dim];
        let count = values("attention input", &shape)?;
        values("pair bias", &[heads, n_res, n_res])?;
        let first = variant.first_stream();
        let project = |role| Linear::dense(channels, heads * options.head_dim, options.seed, first + role).apply(input);
        let mut d_out = vec![0.0; count];
        fill_normal(&mut d_out, options.seed, first + stream::D_OUT);
        Ok(VariantInputs {
            shape,
            q: project(stream::Q),
            k: project(stream::K),
            v: project(stream::V),
            gate: project(stream::GATE),
            d_out,
            mask,
            bias: (variant != Variant::MsaColumn).then(|| self.pair_bias(heads, first + stream::BIAS)),
        })
    }
}

//! The four Evoformer attentions: projections of a block's inputs to q, k, v, gate and pair bias (Alg. 7, 8, 13, 14).

use tilefold::evoformer::Variant;

use super::linear::{Linear, fill_normal};
use super::representation::EvoformerInputs;
use super::{FeatureError, stream, zeros};

/// First of the streams that a variant's weights take.
pub(super) fn first_stream(variant: Variant) -> u64 {
    match variant {
        Variant::MsaRow => stream::MSA_ROW,
        Variant::MsaColumn => stream::MSA_COLUMN,
        Variant::TriangleStarting => stream::TRIANGLE_STARTING,
        Variant::TriangleEnding => stream::TRIANGLE_ENDING,
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
    /// [`FeatureError::TooLarge`] if a tensor would be, [`FeatureError::NoMemory`].
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
        let first = first_stream(variant);
        let project = |tensor, role| {
            Linear::dense(channels, heads * options.head_dim, options.seed, first + role).apply(tensor, input)
        };
        let mut d_out = zeros("d_out", &shape)?;
        fill_normal(&mut d_out, options.seed, first + stream::D_OUT);
        Ok(VariantInputs {
            shape,
            q: project("q", stream::Q)?,
            k: project("k", stream::K)?,
            v: project("v", stream::V)?,
            gate: project("gate", stream::GATE)?,
            d_out,
            mask,
            bias: match variant {
                Variant::MsaColumn => None,
                _ => Some(self.pair_bias(heads, first + stream::BIAS)?),
            },
        })
    }
}

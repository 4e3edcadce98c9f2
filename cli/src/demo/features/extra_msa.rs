//! Row attention of the extra MSA at the paper's own size, generated row by row so that only the caller's copy exists.
//!
//! The extra MSA's embedding (Alg. 18, first block) has no target row and no position: a place's activation depends on
//! its residue class and deletion count alone. A Pfam seed has about a hundred such pairs, so layer norm and projection
//! are done once for each pair, and a row of q is a table look-up for each residue. This is exact, not an
//! approximation; it holds for the first block only, since later blocks see what attention mixed in.

use std::collections::HashMap;

use super::super::alignment::Alignment;
use super::linear::{Linear, fill_normal, layer_norm};
use super::representation::{EvoformerInputs, ResidueEmbedding};
use super::{FeatureError, FeatureOptions, MsaFeatures, nonzero, reserved, stream, values};

/// Sizes of the extra MSA and the seed of its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ExtraMsaOptions {
    /// Sequences the alignment is tiled to.
    pub(crate) n_seq: usize,
    /// Residues the alignment is tiled to.
    pub(crate) n_res: usize,
    /// Channels of the extra MSA's representation (`c_e`).
    pub(crate) channels: usize,
    /// Heads of row attention.
    pub(crate) heads: usize,
    /// Channels a head.
    pub(crate) head_dim: usize,
    /// Seed of every weight and of `d_out`.
    pub(crate) seed: u64,
}

impl Default for ExtraMsaOptions {
    /// The paper's fine-tuning size: 5120 extra sequences, crops of 384 residues.
    fn default() -> Self {
        Self { n_seq: 5120, n_res: 384, channels: 64, heads: 8, head_dim: 8, seed: 0 }
    }
}

/// A tensor of the extra MSA's row attention, `[1, n_seq, n_res, heads, head_dim]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExtraMsaTensor {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Gradient of the output, standard normal.
    DOut,
}

/// Row attention of the extra MSA, ready to be written row by row.
///
/// [`fill_row`](Self::fill_row) takes `&self`: rows can be filled, and converted, on many threads at once.
#[derive(Debug)]
pub(crate) struct ExtraMsa {
    options: ExtraMsaOptions,
    mask: Vec<bool>,
    bias: Vec<f32>,
    /// Which row of the tables each place takes, `[n_seq, n_res]`.
    kinds: Vec<usize>,
    /// q, k and v of each kind, `[kinds, heads, head_dim]`.
    tables: [Vec<f32>; 3],
}

impl ExtraMsa {
    /// Tiles `alignment` and projects each kind of place that occurs in it.
    ///
    /// The pair bias comes from the pair representation of the distinct rows: repeats would not change a mean.
    ///
    /// # Errors
    ///
    /// [`FeatureError::Zero`] for a size of 0, [`FeatureError::TooLarge`] if a tensor would be too large,
    /// [`FeatureError::NoMemory`].
    pub(crate) fn new(alignment: &Alignment, options: ExtraMsaOptions) -> Result<Self, FeatureError> {
        let ExtraMsaOptions { n_seq, n_res, channels, heads, head_dim, seed } = options;
        nonzero(&[("number of channels", channels), ("number of heads", heads), ("head_dim", head_dim)])?;
        values("attention input", &[n_seq, n_res, heads, head_dim])?;
        values("attention weights", &[channels, heads, head_dim])?;
        values("pair bias", &[heads, n_res, n_res])?;
        let features = MsaFeatures::tiled(alignment, n_seq, n_res)?;
        let (kinds, mut embedded) = embed_kinds(&features, channels, seed)?;
        layer_norm(&mut embedded, channels);
        let table =
            |role| Linear::dense(channels, heads * head_dim, seed, stream::EXTRA_MSA + role).apply("table", &embedded);
        let tables = [table(stream::Q)?, table(stream::K)?, table(stream::V)?];
        let bias = pair_bias(alignment, &options)?;
        Ok(Self { options, mask: features.mask(), bias, kinds, tables })
    }

    /// `[1, n_seq, n_res, heads, head_dim]`.
    pub(crate) fn shape(&self) -> [usize; 5] {
        let ExtraMsaOptions { n_seq, n_res, heads, head_dim, .. } = self.options;
        [1, n_seq, n_res, heads, head_dim]
    }

    /// `[1, n_seq, n_res]`: true where there is a residue.
    pub(crate) fn mask(&self) -> &[bool] {
        &self.mask
    }

    /// Pair bias, `[1, 1, heads, n_res, n_res]`.
    pub(crate) fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// Values of one row of a tensor: `n_res * heads * head_dim`.
    pub(crate) fn row_len(&self) -> usize {
        self.options.n_res * self.options.heads * self.options.head_dim
    }

    /// Writes one sequence's row of a tensor, `[n_res, heads, head_dim]`, into `out`.
    ///
    /// # Errors
    ///
    /// [`FeatureError::NoSuchRow`] beyond the last row, [`FeatureError::RowLength`] if `out` is not
    /// [`row_len`](Self::row_len) long.
    pub(crate) fn fill_row(&self, tensor: ExtraMsaTensor, row: usize, out: &mut [f32]) -> Result<(), FeatureError> {
        let no_such_row = || FeatureError::NoSuchRow { row, n_seq: self.options.n_seq };
        let kinds = self.kinds.chunks_exact(self.options.n_res).nth(row).ok_or_else(no_such_row)?;
        if out.len() != self.row_len() {
            return Err(FeatureError::RowLength { expected: self.row_len(), got: out.len() });
        }
        let [q, k, v] = &self.tables;
        match tensor {
            ExtraMsaTensor::Q => self.look_up(q, kinds, out),
            ExtraMsaTensor::K => self.look_up(k, kinds, out),
            ExtraMsaTensor::V => self.look_up(v, kinds, out),
            ExtraMsaTensor::DOut => {
                let place = u64::try_from(row).map_err(|_| no_such_row())?;
                fill_normal(out, self.options.seed, stream::EXTRA_MSA_D_OUT + place);
            }
        }
        Ok(())
    }

    fn look_up(&self, table: &[f32], kinds: &[usize], out: &mut [f32]) {
        let width = self.options.heads * self.options.head_dim;
        for (out, kind) in out.chunks_exact_mut(width).zip(kinds) {
            out.copy_from_slice(&table[kind * width..][..width]);
        }
    }
}

/// Numbers the pairs of class and deletion count by first appearance, and embeds each: (`[n_seq, n_res]`, `[kinds,
/// channels]`).
fn embed_kinds(features: &MsaFeatures, channels: usize, seed: u64) -> Result<(Vec<usize>, Vec<f32>), FeatureError> {
    let embedding = ResidueEmbedding::new(channels, seed);
    let mut number_of = HashMap::new();
    let mut embedded = Vec::new();
    let places = features.classes().iter().zip(features.deletions());
    let mut kinds = reserved("kinds of places", features.classes().len())?;
    kinds.extend(places.map(|(&class, &deletions)| {
        let next = number_of.len();
        *number_of.entry((class, deletions)).or_insert_with(|| {
            let start = embedded.len();
            embedded.resize(start + channels, 0.0);
            embedding.add(class, deletions, &mut embedded[start..]);
            next
        })
    }));
    Ok((kinds, embedded))
}

/// The pair bias of the alignment's own rows, tiled to `n_res` residues.
fn pair_bias(alignment: &Alignment, options: &ExtraMsaOptions) -> Result<Vec<f32>, FeatureError> {
    let distinct = MsaFeatures::tiled(alignment, options.n_seq.min(alignment.n_seq()), options.n_res)?;
    let inputs = EvoformerInputs::new(distinct, FeatureOptions { seed: options.seed, ..FeatureOptions::default() })?;
    inputs.pair_bias(options.heads, stream::EXTRA_MSA + stream::BIAS)
}

//! The MSA and pair representations that an Evoformer block's attention reads (Alg. 3, 4, 10).

use rayon::prelude::*;

use super::linear::{Linear, accumulate, add_scaled, layer_norm};
use super::residue::{DELETION_FEATURES, GAP_CLASS, MsaFeatures, RESIDUE_CLASSES, deletion_features};
use super::{FeatureError, FeatureOptions, nonzero, reserved, stream, values, zeros};

/// Offsets between residues beyond this read as this (Alg. 4).
const MAX_OFFSET: usize = 32;

/// Channels a side of the outer product mean; the paper has 32, at four times the cost.
pub(super) const OUTER_CHANNELS: usize = 16;

/// Keeps the mean over no common sequence finite (Alg. 10 as published in code).
const OUTER_EPSILON: f32 = 1e-3;

/// The inputs of an Evoformer block, after the layer norm that precedes each attention.
#[derive(Debug)]
pub(crate) struct EvoformerInputs {
    features: MsaFeatures,
    options: FeatureOptions,
    msa: Vec<f32>,
    pair: Vec<f32>,
}

impl EvoformerInputs {
    /// Embeds an alignment.
    ///
    /// # Errors
    ///
    /// [`FeatureError::Zero`] for a width of 0, [`FeatureError::TooLarge`] if a representation would be too large,
    /// [`FeatureError::NoMemory`].
    pub(crate) fn new(features: MsaFeatures, options: FeatureOptions) -> Result<Self, FeatureError> {
        let FeatureOptions { msa_channels, pair_channels, seed, .. } = options;
        nonzero(&[
            ("number of MSA channels", msa_channels),
            ("number of pair channels", pair_channels),
            ("number of MSA heads", options.msa_heads),
            ("number of pair heads", options.pair_heads),
            ("head_dim", options.head_dim),
        ])?;
        values("attention weights", &[msa_channels, options.msa_heads, options.head_dim])?;
        values("attention weights", &[pair_channels, options.pair_heads, options.head_dim])?;
        let mut msa = embed_msa(&features, msa_channels, seed)?;
        layer_norm(&mut msa, msa_channels);
        let mut pair = embed_pair(&features, pair_channels, seed)?;
        add_outer_product_mean(&mut pair, &msa, &features, &options)?;
        layer_norm(&mut pair, pair_channels);
        Ok(Self { features, options, msa, pair })
    }

    /// The alignment these inputs embed.
    pub(crate) fn features(&self) -> &MsaFeatures {
        &self.features
    }

    /// The widths and the seed these inputs were made with.
    pub(crate) fn options(&self) -> &FeatureOptions {
        &self.options
    }

    /// The MSA representation, `[n_seq, n_res, msa_channels]`, normalised.
    pub(crate) fn msa(&self) -> &[f32] {
        &self.msa
    }

    /// The pair representation, `[n_res, n_res, pair_channels]`, normalised.
    pub(crate) fn pair(&self) -> &[f32] {
        &self.pair
    }

    /// A bias of every head for every pair, `[heads, n_res, n_res]`: `bias[h, i, j] = pair[i, j] . w[h]` (Alg. 7,
    /// line 3).
    ///
    /// # Errors
    ///
    /// [`FeatureError::TooLarge`] and [`FeatureError::NoMemory`].
    pub(super) fn pair_bias(&self, heads: usize, stream: u64) -> Result<Vec<f32>, FeatureError> {
        let weights = Linear::dense(self.options.pair_channels, heads, self.options.seed, stream);
        let projected = weights.apply("pair bias", &self.pair)?;
        let mut bias = reserved("pair bias", projected.len())?;
        (0..heads).for_each(|head| bias.extend(projected.iter().skip(head).step_by(heads)));
        Ok(bias)
    }
}

/// `m[s, r] = residue[s, r] + deletions[s, r] + target[r]`, `[n_seq, n_res, channels]` (Alg. 3, line 4).
///
/// The one-hot features times a matrix are table look-ups.
fn embed_msa(features: &MsaFeatures, channels: usize, seed: u64) -> Result<Vec<f32>, FeatureError> {
    let n_res = features.n_res();
    let mut msa = zeros("MSA representation", &[features.n_seq(), n_res, channels])?;
    let residue = ResidueEmbedding::new(channels, seed);
    let target = Linear::table(RESIDUE_CLASSES, channels, seed, stream::MSA_TARGET);
    msa.par_chunks_mut(channels).enumerate().for_each(|(place, out)| {
        residue.add(features.classes()[place], features.deletions()[place], out);
        add_scaled(out, 1.0, target.row(usize::from(features.target()[place % n_res])));
    });
    Ok(msa)
}

/// The linear map of one place's residue and deletion features; without a target row this is the extra MSA's
/// embedding.
#[derive(Debug)]
pub(super) struct ResidueEmbedding {
    residue: Linear,
    deletion: Linear,
}

impl ResidueEmbedding {
    pub(super) fn new(channels: usize, seed: u64) -> Self {
        Self {
            residue: Linear::table(RESIDUE_CLASSES, channels, seed, stream::MSA_RESIDUE),
            deletion: Linear::table(DELETION_FEATURES, channels, seed, stream::MSA_DELETION),
        }
    }

    /// Adds the embedding of one place to `out`, `[channels]`.
    pub(super) fn add(&self, class: u8, deletions: u32, out: &mut [f32]) {
        add_scaled(out, 1.0, self.residue.row(usize::from(class)));
        if deletions > 0 {
            for (feature, value) in deletion_features(deletions).into_iter().enumerate() {
                add_scaled(out, value, self.deletion.row(feature));
            }
        }
    }
}

/// `z[i, j] = left[target i] + right[target j] + relpos[i - j]`, `[n_res, n_res, channels]` (Alg. 3, lines 2 and 5;
/// Alg. 4).
fn embed_pair(features: &MsaFeatures, channels: usize, seed: u64) -> Result<Vec<f32>, FeatureError> {
    let n_res = features.n_res();
    let mut pair = zeros("pair representation", &[n_res, n_res, channels])?;
    let left = Linear::table(RESIDUE_CLASSES, channels, seed, stream::PAIR_TARGET_LEFT);
    let right = Linear::table(RESIDUE_CLASSES, channels, seed, stream::PAIR_TARGET_RIGHT);
    let relative = Linear::table(2 * MAX_OFFSET + 1, channels, seed, stream::RELATIVE_POSITION);
    let target = features.target();
    pair.par_chunks_mut(n_res * channels).enumerate().for_each(|(i, row)| {
        for (j, out) in row.chunks_exact_mut(channels).enumerate() {
            add_scaled(out, 1.0, left.row(usize::from(target[i])));
            add_scaled(out, 1.0, right.row(usize::from(target[j])));
            add_scaled(out, 1.0, relative.row(relative_position(i, j)));
        }
    });
    Ok(pair)
}

/// Class of the offset `i - j`, clipped to the largest: `0..=2 * MAX_OFFSET`.
pub(super) fn relative_position(i: usize, j: usize) -> usize {
    (i + MAX_OFFSET).saturating_sub(j).min(2 * MAX_OFFSET)
}

/// Adds the mean over sequences of `left[s, i] (x) right[s, j]`, projected, to `pair[i, j]` (Alg. 10).
///
/// Only sequences with a residue in both columns count. `msa` is the normalised MSA representation.
///
/// ```text
/// for each i:                                       in parallel
///     for each sequence s with a residue at i:      outer[c, j, d] += left[s, i, c] * right[s, j, d]
///     pair[i, j] += (sum over c, d of outer[c, j, d] * w[c, d]) / (sequences with i and j)
/// ```
pub(super) fn add_outer_product_mean(
    pair: &mut [f32],
    msa: &[f32],
    features: &MsaFeatures,
    options: &FeatureOptions,
) -> Result<(), FeatureError> {
    let (n_res, channels) = (features.n_res(), options.pair_channels);
    let sides = OuterSides {
        left: masked_projection(msa, features, options, stream::OUTER_LEFT)?,
        right: masked_projection(msa, features, options, stream::OUTER_RIGHT)?,
        mask: features.classes().iter().map(|&class| if class == GAP_CLASS { 0.0 } else { 1.0 }).collect(),
        n_res,
    };
    let out_map = Linear::dense(OUTER_CHANNELS * OUTER_CHANNELS, channels, options.seed, stream::OUTER_OUT);
    pair.par_chunks_mut(n_res * channels).enumerate().try_for_each(|(i, pair_row)| {
        let mut sum = zeros("outer product mean", &[n_res, channels])?;
        for (c, outer) in sides.outer_products(i)?.chunks_exact(n_res * OUTER_CHANNELS).enumerate() {
            let weights = out_map.rows(c * OUTER_CHANNELS, OUTER_CHANNELS);
            accumulate(outer, weights, (OUTER_CHANNELS, channels), &mut sum);
        }
        let counts = sides.common_sequences(i);
        for ((out, sum), count) in pair_row.chunks_exact_mut(channels).zip(sum.chunks_exact(channels)).zip(counts) {
            add_scaled(out, (OUTER_EPSILON + count).recip(), sum);
        }
        Ok(())
    })
}

/// `msa` times seeded weights, `[n_seq, n_res, OUTER_CHANNELS]`, zero at gaps.
fn masked_projection(
    msa: &[f32],
    features: &MsaFeatures,
    options: &FeatureOptions,
    stream: u64,
) -> Result<Vec<f32>, FeatureError> {
    let weights = Linear::dense(options.msa_channels, OUTER_CHANNELS, options.seed, stream);
    let mut projected = weights.apply("side of the outer product", msa)?;
    for (place, &class) in projected.chunks_exact_mut(OUTER_CHANNELS).zip(features.classes()) {
        if class == GAP_CLASS {
            place.fill(0.0);
        }
    }
    Ok(projected)
}

/// The two factors of the outer product mean, `[n_seq, n_res, OUTER_CHANNELS]`, and the mask `[n_seq, n_res]`.
struct OuterSides {
    left: Vec<f32>,
    right: Vec<f32>,
    mask: Vec<f32>,
    n_res: usize,
}

impl OuterSides {
    /// Sum over sequences of the outer products of column `i` with every column, `[c, n_res, d]`.
    fn outer_products(&self, i: usize) -> Result<Vec<f32>, FeatureError> {
        let row = self.n_res * OUTER_CHANNELS;
        let mut outer = zeros("outer product", &[OUTER_CHANNELS, row])?;
        for (left, right) in self.left.chunks_exact(row).zip(self.right.chunks_exact(row)) {
            let left = &left[i * OUTER_CHANNELS..][..OUTER_CHANNELS];
            for (outer, &factor) in outer.chunks_exact_mut(row).zip(left) {
                add_scaled(outer, factor, right);
            }
        }
        Ok(outer)
    }

    /// Number of sequences with a residue in column `i` and in each column, `[n_res]`.
    fn common_sequences(&self, i: usize) -> Vec<f32> {
        let mut counts = vec![0.0; self.n_res];
        for mask in self.mask.chunks_exact(self.n_res) {
            add_scaled(&mut counts, mask[i], mask);
        }
        counts
    }
}

//! Seeded linear maps, layer norm, and the few sums they are made of.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

use super::{FeatureError, zeros};

/// Rows that share one pass over the weights: their outputs stay in the first-level cache.
const BLOCK_ROWS: usize = 8;

/// Fills `out` with standard normal numbers of one stream of `seed`.
pub(super) fn fill_normal(out: &mut [f32], seed: u64, stream: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    out.fill_with(|| StandardNormal.sample(&mut rng));
}

/// A linear map without offset: weights `[n_in, n_out]`, row-major.
#[derive(Debug)]
pub(super) struct Linear {
    n_in: usize,
    n_out: usize,
    weights: Vec<f32>,
}

impl Linear {
    /// For dense inputs: weights of variance `1 / n_in`.
    pub(super) fn dense(n_in: usize, n_out: usize, seed: u64, stream: u64) -> Self {
        let mut map = Self::table(n_in, n_out, seed, stream);
        let scale = as_f32(n_in).sqrt().recip();
        map.weights.iter_mut().for_each(|weight| *weight *= scale);
        map
    }

    /// For one-hot inputs, which pick one row: weights of variance 1.
    pub(super) fn table(n_in: usize, n_out: usize, seed: u64, stream: u64) -> Self {
        let mut weights = vec![0.0; n_in * n_out];
        fill_normal(&mut weights, seed, stream);
        Self { n_in, n_out, weights }
    }

    /// What the one-hot input `class` is mapped to.
    pub(super) fn row(&self, class: usize) -> &[f32] {
        &self.weights[class * self.n_out..][..self.n_out]
    }

    /// The weights of `count` inputs from `first` on.
    pub(super) fn rows(&self, first: usize, count: usize) -> &[f32] {
        &self.weights[first * self.n_out..][..count * self.n_out]
    }

    /// Maps each row of `x`, `[rows, n_in]`, to a row of `tensor`, `[rows, n_out]`.
    ///
    /// # Errors
    ///
    /// [`FeatureError::TooLarge`] and [`FeatureError::NoMemory`].
    pub(super) fn apply(&self, tensor: &'static str, x: &[f32]) -> Result<Vec<f32>, FeatureError> {
        let mut out = zeros(tensor, &[x.len() / self.n_in, self.n_out])?;
        out.par_chunks_mut(self.n_out * BLOCK_ROWS)
            .zip(x.par_chunks(self.n_in * BLOCK_ROWS))
            .for_each(|(out, x)| accumulate(x, &self.weights, (self.n_in, self.n_out), out));
        Ok(out)
    }
}

/// `out += x weights` for `x` `[rows, n_in]`, `weights` `[n_in, n_out]`, `out` `[rows, n_out]`, in the order of the
/// inputs.
pub(super) fn accumulate(x: &[f32], weights: &[f32], (n_in, n_out): (usize, usize), out: &mut [f32]) {
    for (x, out) in x.chunks(n_in * BLOCK_ROWS).zip(out.chunks_mut(n_out * BLOCK_ROWS)) {
        for (input, weights) in weights.chunks_exact(n_out).enumerate() {
            for (x, out) in x.chunks_exact(n_in).zip(out.chunks_exact_mut(n_out)) {
                add_scaled(out, x[input], weights);
            }
        }
    }
}

/// `out += factor * values`.
pub(super) fn add_scaled(out: &mut [f32], factor: f32, values: &[f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out += factor * value;
    }
}

/// Gives each row of `channels` values mean 0 and variance 1 (no learned scale or offset).
pub(super) fn layer_norm(rows: &mut [f32], channels: usize) {
    /// Keeps a constant row finite.
    const EPSILON: f32 = 1e-5;
    let count = as_f32(channels);
    rows.par_chunks_mut(channels).for_each(|row| {
        let mean = row.iter().sum::<f32>() / count;
        let variance = row.iter().map(|value| (value - mean) * (value - mean)).sum::<f32>() / count;
        let scale = (variance + EPSILON).sqrt().recip();
        row.iter_mut().for_each(|value| *value = (*value - mean) * scale);
    });
}

/// A channel count as a number; counts are far below 2^24, so this is exact.
fn as_f32(count: usize) -> f32 {
    count as f32
}

//! Mean cross-entropy of the next token, its logits tied to the embedding and computed in tiles of the vocabulary.
//!
//! The logits of all tokens, `[rows, vocabulary]`, are never stored: a tile is used and forgotten, and computed once more for
//! the gradients.
//!
//! ```text
//! for tile of vocabulary:                     for tile of vocabulary:
//!   l = y · embedding[tile]ᵀ                    l = y · embedding[tile]ᵀ
//!   max, sum = merged with those of l           d = (exp(l - lse) - [target]) / tokens
//! lse = max + ln sum                            dy += d · embedding[tile]
//! loss = Σ rows (lse - l[target]) / tokens      d_embedding[tile] += dᵀ · y
//! ```

use std::ops::Range;

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, Slice};
use tilefold::Element;

use super::tokens::VOCABULARY;

/// Logits of a token that are in memory at a time.
pub const VOCABULARY_TILE: usize = 16;

/// The loss of these rows and the gradient of y; that of the embedding is added to `d_embedding`.
///
/// *Numerics*: products and gradients in f32, the sum over rows in f64.
pub(super) fn tied_cross_entropy(
    y: &Array2<f32>,
    embedding: &Array2<f32>,
    targets: &[u32],
    tokens: usize,
    d_embedding: &mut Array2<f32>,
) -> (f32, Array2<f32>) {
    let (lse, loss) = log_sum_exp(y, embedding, targets);
    let scale = 1.0 / tokens as f32;
    let mut dy = Array2::zeros(y.raw_dim());
    for tile in tiles() {
        let weights = rows(embedding, &tile);
        let mut d = y.dot(&weights.t());
        for ((mut d, lse), &target) in d.rows_mut().into_iter().zip(&lse).zip(targets) {
            d.mapv_inplace(|logit| (logit - lse).exp() * scale);
            if let Some(column) = in_tile(target, &tile) {
                d[column] -= scale;
            }
        }
        general_mat_mul(1.0, &d, &weights, 1.0, &mut dy);
        general_mat_mul(1.0, &d.t(), y, 1.0, &mut rows_mut(d_embedding, &tile));
    }
    (f32::from_f64(loss / tokens as f64), dy)
}

/// For each row, the natural log of the sum of exponentials; and the sum of the losses of all rows.
fn log_sum_exp(y: &Array2<f32>, embedding: &Array2<f32>, targets: &[u32]) -> (Vec<f32>, f64) {
    let mut running = vec![(f32::NEG_INFINITY, 0.0_f32); y.nrows()];
    let mut loss = 0.0;
    for tile in tiles() {
        let logits = y.dot(&rows(embedding, &tile).t());
        for ((logits, (max, sum)), &target) in logits.rows().into_iter().zip(&mut running).zip(targets) {
            let higher = logits.fold(*max, |max, &logit| max.max(logit));
            let part: f32 = logits.iter().map(|logit| (logit - higher).exp()).sum();
            *sum = *sum * (*max - higher).exp() + part;
            *max = higher;
            loss -= in_tile(target, &tile).map_or(0.0, |column| f64::from(logits[column]));
        }
    }
    let lse: Vec<f32> = running.into_iter().map(|(max, sum)| max + sum.ln()).collect();
    loss += lse.iter().copied().map(f64::from).sum::<f64>();
    (lse, loss)
}

fn tiles() -> impl Iterator<Item = Range<usize>> {
    (0..VOCABULARY).step_by(VOCABULARY_TILE).map(|start| start..VOCABULARY.min(start + VOCABULARY_TILE))
}

/// The column of a token in a tile.
fn in_tile(token: u32, tile: &Range<usize>) -> Option<usize> {
    let token = usize::try_from(token).ok().filter(|token| tile.contains(token))?;
    Some(token - tile.start)
}

fn rows<'a>(matrix: &'a Array2<f32>, range: &Range<usize>) -> ArrayView2<'a, f32> {
    matrix.slice_axis(Axis(0), Slice::from(range.clone()))
}

fn rows_mut<'a>(matrix: &'a mut Array2<f32>, range: &Range<usize>) -> ArrayViewMut2<'a, f32> {
    matrix.slice_axis_mut(Axis(0), Slice::from(range.clone()))
}

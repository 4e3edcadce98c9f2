//! Rotary positions: channel i of a head and channel i + D/2 are a point, turned by `position · base^(-2i/D)`.
//!
//! On the host, by the tokens' positions in the whole sequence, before anything travels; the one place to put a device's own
//! rotation. Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

use ndarray::Array2;
use tilefold::Element;

use super::config::Config;

/// Angles fall from 1 to about one over this number.
const BASE: f64 = 10_000.0;

/// Cosine and sine of every angle of this rank's tokens.
#[derive(Debug)]
pub(super) struct Rotary {
    head_dim: usize,
    /// `[positions of this rank, head_dim / 2]`.
    turns: Array2<[f32; 2]>,
}

impl Rotary {
    /// For tokens at these positions.
    pub(super) fn new(config: &Config, positions: &[usize]) -> Self {
        let head_dim = config.head_dim();
        let turn = |(token, pair): (usize, usize)| {
            let angle = positions[token] as f64 * BASE.powf(-2.0 * pair as f64 / head_dim as f64);
            [angle.cos(), angle.sin()].map(f32::from_f64)
        };
        Self { head_dim, turns: Array2::from_shape_fn((positions.len(), head_dim / 2), turn) }
    }

    /// Rotates rows `[batch · positions, hidden]`.
    pub(super) fn forward(&self, x: &mut Array2<f32>) {
        self.rotate(x, 1.0);
    }

    /// Rotates gradients back: the adjoint.
    pub(super) fn backward(&self, dx: &mut Array2<f32>) {
        self.rotate(dx, -1.0);
    }

    fn rotate(&self, x: &mut Array2<f32>, direction: f32) {
        let turns = self.turns.rows().into_iter().cycle();
        for (mut row, turns) in x.rows_mut().into_iter().zip(turns) {
            for mut head in row.exact_chunks_mut(self.head_dim) {
                for (i, &[cos, sin]) in turns.iter().enumerate() {
                    let (a, b, sin) = (head[i], head[i + turns.len()], direction * sin);
                    head[i] = a * cos - b * sin;
                    head[i + turns.len()] = a * sin + b * cos;
                }
            }
        }
    }
}

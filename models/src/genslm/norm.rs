//! Root-mean-square norm, row by row: `y = x · r ⊙ gain` with `r = 1/√(mean(x²) + ε)`.
//!
//! Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

use ndarray::{Array2, ArrayView1, Zip};

/// Keeps rows of zeros finite.
const EPSILON: f32 = 1e-5;

/// The normed rows.
pub(super) fn forward(x: &Array2<f32>, gain: &Array2<f32>) -> Array2<f32> {
    let mut y = x * gain;
    Zip::from(y.rows_mut()).and(x.rows()).for_each(|mut y, x| y *= factor(x));
    y
}

/// Gradient of x; that of the gain is added to `d_gain`.
///
/// ```text
/// d_gain = Σ rows  dy ⊙ x · r
/// dx     = r · (gain ⊙ dy) - x · r³/width · ⟨x, gain ⊙ dy⟩
/// ```
pub(super) fn backward(x: &Array2<f32>, gain: &Array2<f32>, dy: &Array2<f32>, d_gain: &mut Array2<f32>) -> Array2<f32> {
    let mut dx = dy * gain;
    Zip::from(dx.rows_mut()).and(x.rows()).and(dy.rows()).for_each(|mut dx, x, dy| {
        let r = factor(x);
        let along = x.dot(&dx) * r * r / x.len() as f32;
        Zip::from(&mut dx).and(x).for_each(|dx, x| *dx = r * (*dx - x * along));
        Zip::from(d_gain.row_mut(0)).and(x).and(dy).for_each(|d_gain, x, dy| *d_gain += dy * x * r);
    });
    dx
}

fn factor(x: ArrayView1<'_, f32>) -> f32 {
    1.0 / (x.dot(&x) / x.len() as f32 + EPSILON).sqrt()
}

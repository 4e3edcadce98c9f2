//! Rotary position embedding in f64: what every backend is held against.

use std::f64::consts::TAU;

use super::RopeSpec;
use super::turns::{frequencies, turn};

/// The rotation of row-major `values` of shape `[batch, rows, seqlen, heads, head_dim]`, where they are that many.
///
/// Equations (19)-(21) as they are written, with the angle of each position by itself: docs/mathematics.md.
#[must_use]
pub fn rope(spec: &RopeSpec, shape: [usize; 5], values: &[f64]) -> Vec<f64> {
    let [_, _, seqlen, heads, head_dim] = shape;
    let frequencies = frequencies(spec);
    let mut result = values.to_vec();
    for (index, row) in result.chunks_exact_mut(head_dim).enumerate() {
        let position = i128::from(spec.offset) + i128::try_from(index / heads % seqlen).unwrap_or(0);
        for (pair, &frequency) in frequencies.iter().enumerate() {
            let (sin, cos) = radians(turn(frequency, position)).sin_cos();
            let [first, second] = spec.channels(pair);
            (row[first], row[second]) = (row[first] * cos - row[second] * sin, row[first] * sin + row[second] * cos);
        }
    }
    result
}

/// From 2⁶⁴ths of a turn, as the angle between -π and π.
#[allow(clippy::cast_precision_loss, reason = "2^-53 of half a turn is exact enough")]
fn radians(turn: u64) -> f64 {
    turn.cast_signed() as f64 * 2_f64.powi(-64) * TAU
}

#[cfg(test)]
mod tests {
    use super::super::{RopePairs, RopeSpec};
    use super::*;

    #[test]
    fn small_positions_follow_the_equations() {
        for pairs in [RopePairs::Interleaved, RopePairs::Halves] {
            let mut spec = RopeSpec { offset: 40, position_scale: 2.0, ..RopeSpec::new(6, pairs) };
            let shape = [1, 2, 3, 2, 8];
            let values: Vec<f64> = (0_u8..96).map(|i| f64::from(i % 11) - 5.0).collect();
            let got = rope(&spec, shape, &values);
            for (index, (x, y)) in values.chunks(8).zip(got.chunks(8)).enumerate() {
                for pair in 0..3 {
                    let position = 40.0 + [0.0, 1.0, 2.0][index / 2 % 3];
                    let angle: f64 = position / 2.0 * 10_000_f64.powf(-2.0 * [0.0, 1.0, 2.0][pair] / 6.0);
                    let [a, b] = if pairs == RopePairs::Halves { [pair, pair + 3] } else { [2 * pair, 2 * pair + 1] };
                    let expected = x[a] * angle.cos() - x[b] * angle.sin();
                    assert!((y[a] - expected).abs() < 1e-13, "{pairs:?}: {} {expected}", y[a]);
                    assert!((y[a].hypot(y[b]) - x[a].hypot(x[b])).abs() < 1e-13, "lengths stay");
                }
                assert_eq!(x[6..], y[6..], "channels beyond rotary_dim are copied");
            }
            spec.inverse = true;
            let back = rope(&spec, shape, &got);
            assert!(back.iter().zip(&values).all(|(a, b)| (a - b).abs() < 1e-13));
        }
    }
}

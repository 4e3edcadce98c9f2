//! How far a result may lie from the oracle, and why.
//!
//! allowed = 3 · (error of the plain computation + estimated error + rounding of the result), for each row of
//! channels.
//!
//! * The factor 3 is trifast's: a fused kernel orders its sums differently, folds scales into operands and rescales its
//!   accumulators, and each may cost as much again as the plain computation; an error of logic costs far more.
//! * The plain computation ([`crate::plain`]) has the problem's dtype, so that what is hard for every implementation
//!   (logits of thousands, -1e9 added to every key) is allowed to a backend too, and nothing else is.
//! * Where factors of products may be rounded to tf32, the plain computation rounds them, and a term of a product has an
//!   estimated error of √2 · 2^-11 of itself, from two roundings at random. Nothing else is allowed more than in f32: sums,
//!   softmax, lse beyond what its logits have, and storing. What computes exactly is well inside.
//! * The estimated error stands in for luck: a plain result may be exact where another order of sums is not.
//! * Rounding of the result is the unit roundoff of the dtype times the row's largest value. Below that, numbers may
//!   vanish: half the smallest positive one in f16, and 2^16 times the smallest normal one in f32 and bf16.
//!
//! Beyond that: NaN exactly where the oracle has it; what nothing contributes to is exactly 0 (lse exactly -inf); where
//! the tolerance is wide, the direction still has to be right (cosine, at least 0.99 wherever the plain computation has
//! it), and so has the scale.
//!
//! The scale of a result is ⟨result, e⟩ / ⟨e, e⟩, where e is the oracle. In bf16 each element may be 2 % off, but
//! rounding does so at random, and over a tensor it averages out; a wrong factor does not. What is allowed to the scale
//! is again 3 times what the plain computation has and what chance gives. An error in a row e_r is in part common to its
//! channels and proportional to them (the row's normalisation), in part independent in each (products, the rounding of
//! the result); rows are independent of each other. With f_r the estimated error and a_r that and the rounding of the
//! result, the scale has a standard deviation of √(Σ |e_r|² ((f_r |e_r| / max e_r)² + a_r²)) / |e|². Where numbers are
//! equal their errors are, too, and fewer numbers share in the average.

use tilefold_core::DType;

use crate::plain::Estimate;

/// trifast's factor.
const FACTOR: f64 = 3.0;

/// The cosine between result and oracle may miss 1 by this much, or 3 times as much as the plain computation does.
const COSINE_DEFECT: f64 = 0.01;

/// Where the plain computation's own direction is this bad, the direction says nothing.
const COSINE_NOISE: f64 = 0.2;

/// Systematic errors of f32 arithmetic, such as those of an approximate exponential: they do not average out.
const SCALE_DEFECT: f64 = 8.0 / 16_777_216.0;

/// The type a result is stored in.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    /// Its range.
    pub dtype: DType,
    /// Relative error of storing a number: that of the dtype, or less for a sum of two parts.
    pub unit: f64,
    /// How often parts of the result, or it, were rounded so.
    pub roundings: f64,
    /// Relative error that all elements of a row may have in common, beyond the plain computation's.
    pub common: f64,
}

impl From<DType> for Stored {
    fn from(dtype: DType) -> Self {
        Self { dtype, unit: dtype.unit_roundoff(), roundings: 1.0, common: 0.0 }
    }
}

/// Checks one result against the oracle.
///
/// Gives the largest error as a fraction of what is allowed.
///
/// # Errors
/// The tensor, index, expected and got of the worst element.
pub fn check(name: &str, got: &[f64], expected: &[f64], plain: &Estimate, stored: Stored) -> Result<f64, String> {
    if got.len() != expected.len() || plain.values.len() != expected.len() {
        return Err(format!("{name}: {} elements, expected {}", got.len(), expected.len()));
    }
    let mut worst = Worst { ratio: 0.0, index: 0, allowed: 0.0 };
    let (mut allowed_squares, mut scale_squares) = (0.0, 0.0);
    for (row, start) in (0..expected.len()).step_by(plain.row).enumerate() {
        let range = start..start + plain.row;
        if plain.empty[row] {
            check_empty(name, got, expected, range)?;
            continue;
        }
        let own = &expected[range.clone()];
        let (largest, squares, floor) = (largest(own), squares(own), plain.floor[row]);
        let rounding = stored.roundings * (stored.unit * largest + smallest(stored.dtype));
        let chance = floor + stored.common * largest + rounding;
        let allowed = FACTOR * (plain_error(own, &plain.values[range.clone()]) + chance);
        allowed_squares += allowed * allowed * f64::from(u32::try_from(plain.row).unwrap_or(u32::MAX));
        let common = if largest > 0.0 { floor * squares.sqrt() / largest } else { 0.0 };
        scale_squares += squares * (common * common + chance * chance);
        for index in range {
            worst.see(index, error(got[index], expected[index], allowed, stored.dtype), allowed);
        }
    }
    if worst.ratio > 1.0 || worst.ratio.is_nan() {
        let Worst { ratio, index, allowed } = worst;
        let (expected, got) = (expected[index], got[index]);
        return Err(format!(
            "{name}[{index}]: expected {expected:e}, got {got:e}, allowed error {allowed:.3e} ({ratio:.2} of it)"
        ));
    }
    // A tensor of nothing but rounding errors has no direction.
    if allowed_squares < expected.iter().map(|e| e * e).sum() {
        check_direction(name, got, expected, &plain.values, stored.roundings)?;
        check_scale(name, got, expected, &plain.values, scale_squares.sqrt(), stored.common)?;
    }
    Ok(worst.ratio)
}

/// The largest error of the plain computation in a row.
fn plain_error(expected: &[f64], plain: &[f64]) -> f64 {
    expected.iter().zip(plain).map(|(e, p)| (e - p).abs()).filter(|e| e.is_finite()).fold(0.0, f64::max)
}

/// The largest finite magnitude.
fn largest(values: &[f64]) -> f64 {
    values.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f64::max)
}

/// The sum of the squares of finite elements.
fn squares(values: &[f64]) -> f64 {
    values.iter().filter(|x| x.is_finite()).map(|x| x * x).sum()
}

/// Devices may flush or clamp what is below the smallest normal f32 inside a computation, and other factors, taken to
/// be below 2^16, enlarge what that leaves.
const UNDERFLOW: f64 = 65_536.0 * f32::MIN_POSITIVE as f64;

/// What may vanish in a result.
fn smallest(dtype: DType) -> f64 {
    if dtype == DType::F16 { 0.5 / 16_777_216.0 } else { UNDERFLOW }
}

/// Largest finite number of a dtype.
fn largest_finite(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 65_504.0,
        DType::BF16 => f64::from(half::bf16::MAX),
        _ => f64::from(f32::MAX),
    }
}

/// Error as a fraction of what is allowed; NaN for a NaN.
fn error(got: f64, expected: f64, allowed: f64, dtype: DType) -> f64 {
    if expected.is_nan() {
        return if got.is_nan() { 0.0 } else { f64::NAN };
    }
    let overflows = expected.abs() + allowed >= largest_finite(dtype);
    if got == expected || (got.is_infinite() && overflows && got.signum() == expected.signum()) {
        return 0.0;
    }
    if got.is_nan() || !(expected - got).is_finite() {
        return f64::NAN;
    }
    (got - expected).abs() / allowed
}

fn check_empty(name: &str, got: &[f64], expected: &[f64], range: std::ops::Range<usize>) -> Result<(), String> {
    match range.clone().find(|&index| got[index] != expected[index]) {
        None => Ok(()),
        Some(index) => Err(format!(
            "{name}[{index}]: nothing contributes here: expected exactly {:e}, got {:e}",
            expected[index], got[index]
        )),
    }
}

/// 1 - cosine grows with the square of the error: with the number of roundings, which are independent.
fn check_direction(name: &str, got: &[f64], expected: &[f64], plain: &[f64], roundings: f64) -> Result<(), String> {
    let (Some(defect), Some(plain_defect)) = (cosine_defect(got, expected), cosine_defect(plain, expected)) else {
        return Ok(());
    };
    if plain_defect > COSINE_NOISE || defect <= (FACTOR * roundings * plain_defect).max(COSINE_DEFECT) {
        return Ok(());
    }
    Err(format!(
        "{name}: cosine to the expected tensor is {:.4}, of the plain computation {:.4}",
        1.0 - defect,
        1.0 - plain_defect
    ))
}

/// 1 - cosine; `None` when one of them is 0, or something is not finite.
fn cosine_defect(a: &[f64], b: &[f64]) -> Option<f64> {
    let scale = |x: &[f64]| x.iter().fold(0.0_f64, |largest, x| largest.max(x.abs()));
    let (a_scale, b_scale) = (scale(a), scale(b));
    if !(a_scale > 0.0 && b_scale > 0.0 && a_scale.is_finite() && b_scale.is_finite()) {
        return None;
    }
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(b).map(|(a, b)| (a / a_scale, b / b_scale)) {
        ab += a * b;
        aa += a * a;
        bb += b * b;
    }
    let defect = 1.0 - ab / (aa * bb).sqrt();
    defect.is_finite().then_some(defect)
}

/// `spread` is the standard deviation of ⟨got - expected, expected⟩.
fn check_scale(
    name: &str,
    got: &[f64],
    expected: &[f64],
    plain: &[f64],
    spread: f64,
    common: f64,
) -> Result<(), String> {
    let finite = |index: &usize| [got, expected, plain].iter().all(|values| values[*index].is_finite());
    let (mut squares, mut error, mut plain_error) = (0.0, 0.0, 0.0);
    let mut distinct = Vec::new();
    for index in (0..expected.len()).filter(finite).filter(|&index| expected[index] != 0.0) {
        let e = expected[index];
        squares += e * e;
        error += (got[index] - e) * e;
        plain_error += (plain[index] - e) * e;
        #[allow(clippy::cast_possible_truncation, reason = "numbers that are equal in f32 count as equal")]
        distinct.push((e.abs() as f32).to_bits());
    }
    let count = distinct.len();
    distinct.sort_unstable();
    distinct.dedup();
    let number = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    let spread = spread * (number(count) / number(distinct.len())).sqrt();
    let allowed = FACTOR * ((plain_error.abs() + spread) / squares + SCALE_DEFECT + common);
    let defect = error / squares;
    if squares == 0.0 || defect.abs() <= allowed {
        return Ok(());
    }
    Err(format!("{name}: {:.5} times the expected tensor, allowed 1 ± {allowed:.2e}", 1.0 + defect))
}

/// The element with the largest ratio; a NaN stays.
struct Worst {
    ratio: f64,
    index: usize,
    allowed: f64,
}

impl Worst {
    fn see(&mut self, index: usize, ratio: f64, allowed: f64) {
        if (ratio > self.ratio || ratio.is_nan()) && !self.ratio.is_nan() {
            *self = Self { ratio, index, allowed };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(values: &[f64], row: usize) -> Estimate {
        let rows = values.len() / row;
        Estimate { name: "x".into(), values: values.to_vec(), row, floor: vec![1e-6; rows], empty: vec![false; rows] }
    }

    #[test]
    fn errors_are_measured_against_their_row() {
        let expected = [1.0, 2.0, 1000.0, 2000.0];
        let plain = estimate(&expected, 2);
        assert!(check("x", &[1.0, 2.0, 1000.0, 2000.0001], &expected, &plain, DType::F32.into()).unwrap() < 1.0);
        let message = check("x", &[1.0, 2.0001, 1000.0, 2000.0], &expected, &plain, DType::F32.into()).unwrap_err();
        assert!(message.starts_with("x[1]: expected 2e0"), "{message}");
    }

    #[test]
    fn nan_and_a_missing_zero_are_failures() {
        let expected = [0.0, 1.0];
        let mut plain = estimate(&expected, 1);
        assert!(check("x", &[f64::NAN, 1.0], &expected, &plain, DType::BF16.into()).is_err());
        assert!(check("x", &[1e-9, 1.0], &expected, &plain, DType::F32.into()).is_ok());
        plain.empty[0] = true;
        assert!(check("x", &[1e-9, 1.0], &expected, &plain, DType::F32.into()).is_err());
        assert!(check("x", &[0.0], &expected, &plain, DType::F32.into()).is_err());
    }

    #[test]
    fn a_common_factor_shows_where_single_elements_hide_it() {
        let expected: Vec<f64> = (0..2000).map(|i| (f64::from(i) * 0.37).sin()).collect();
        let plain = estimate(&expected, 8);
        let times = |factor: f64| -> Vec<f64> { expected.iter().map(|e| e * factor).collect() };
        let message = check("x", &times(1.01), &expected, &plain, DType::BF16.into()).unwrap_err();
        assert!(message.starts_with("x: 1.01000 times the expected tensor"), "{message}");
        assert!(check("x", &times(1.0002), &expected, &plain, DType::BF16.into()).is_ok());
        // Equal elements have equal errors: half a unit in the last place is no wrong factor.
        let equal = vec![0.3; 2000];
        let got = vec![0.3 * (1.0 + 0.8 * DType::BF16.unit_roundoff()); 2000];
        assert!(check("x", &got, &equal, &estimate(&equal, 8), DType::BF16.into()).is_ok());
    }

    #[test]
    fn overflow_of_the_dtype_may_be_infinite() {
        let expected = [70_000.0, 1.0];
        let plain = estimate(&expected, 1);
        assert!(check("x", &[f64::INFINITY, 1.0], &expected, &plain, DType::F16.into()).is_ok());
        assert!(check("x", &[f64::INFINITY, 1.0], &expected, &plain, DType::F32.into()).is_err());
        assert!(check("x", &[f64::NEG_INFINITY, 1.0], &expected, &plain, DType::F16.into()).is_err());
    }
}

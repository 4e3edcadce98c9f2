//! Whether a rank's tensors have the shapes that its part of the problem has.

use tilefold_core::{DType, ProblemError, TensorView};

use crate::error::Result;

/// A shape with another size along one axis.
pub(crate) fn with_axis<const N: usize>(mut shape: [usize; N], axis: usize, size: usize) -> [usize; N] {
    shape[axis] = size;
    shape
}

/// Checks shape and dtype.
///
/// # Errors
/// A [`ProblemError`] that names tensor and dimension.
pub(crate) fn exact(tensor: &'static str, view: &TensorView<'_>, shape: &[usize], dtype: DType) -> Result<()> {
    fits(tensor, view, shape, dtype, false)
}

/// Checks a tensor that the problem may have, and that may be broadcast.
///
/// # Errors
/// As [`exact`]; [`ProblemError::Missing`] and [`ProblemError::Unexpected`].
pub(crate) fn optional(
    tensor: &'static str,
    view: Option<&TensorView<'_>>,
    wanted: bool,
    shape: &[usize],
    dtype: DType,
) -> Result<()> {
    match view {
        Some(view) if wanted => fits(tensor, view, shape, dtype, true),
        None if !wanted => Ok(()),
        Some(_) => Err(ProblemError::Unexpected { tensor, reason: "the problem has none" }.into()),
        None => Err(ProblemError::Missing { tensor, reason: "the problem has one" }.into()),
    }
}

fn fits(tensor: &'static str, view: &TensorView<'_>, shape: &[usize], dtype: DType, broadcast: bool) -> Result<()> {
    if view.dtype() != dtype {
        let (expected, got) = (dtype.to_string(), view.dtype());
        return Err(ProblemError::UnsupportedDType { tensor, expected, got }.into());
    }
    if view.shape().len() != shape.len() {
        return Err(ProblemError::Rank { tensor, expected: shape.len(), got: view.shape().len() }.into());
    }
    for (axis, (&expected, &got)) in shape.iter().zip(view.shape()).enumerate() {
        if got != expected && !(broadcast && got == 1) {
            const AXES: [&str; 5] = ["axis 0", "axis 1", "axis 2", "axis 3", "axis 4"];
            let dimension = AXES.get(axis).copied().unwrap_or("axis above 4");
            return Err(ProblemError::Shape { tensor, dimension, expected, got }.into());
        }
    }
    Ok(())
}

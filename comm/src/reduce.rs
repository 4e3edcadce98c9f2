//! Sums over ranks, in the order of ranks whatever the engine.

use std::fmt;
use std::sync::Arc;

use half::{bf16, f16};
use tilefold_core::{DType, Element, ProblemError, Tensor};

use crate::error::{CommError, Result};

/// How the elements of all ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Their sum.
    Sum,
    /// The largest; NaN when there is one.
    Max,
}

impl fmt::Display for Reduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sum => "sum",
            Self::Max => "max",
        })
    }
}

/// The reduction of equally long tensors, the first of which belongs to rank 0; `None` when there are none.
///
/// *Numerics*: floats in f32, from the first rank to the last, rounded once; integers in i64.
pub(crate) fn reduce(operation: &str, parts: &[Arc<Tensor>], reduction: Reduction) -> Result<Option<Tensor>> {
    let Some(first) = parts.first() else { return Ok(None) };
    let reduced = match first.dtype() {
        DType::F32 => floats::<f32>(parts, reduction)?,
        DType::F16 => floats::<f16>(parts, reduction)?,
        DType::BF16 => floats::<bf16>(parts, reduction)?,
        DType::I32 => integers(operation, parts, reduction)?,
        got => {
            let expected = "f32, f16, bf16 or i32".into();
            return Err(ProblemError::UnsupportedDType { tensor: "values", expected, got }.into());
        }
    };
    Ok(Some(reduced))
}

fn floats<T: Element + Into<f32>>(parts: &[Arc<Tensor>], reduction: Reduction) -> Result<Tensor> {
    let mut sums: Vec<f32> = parts[0].as_slice::<T>()?.iter().map(|&value| value.into()).collect();
    for part in &parts[1..] {
        for (sum, &value) in sums.iter_mut().zip(part.as_slice::<T>()?) {
            let value = value.into();
            *sum = match reduction {
                Reduction::Sum => *sum + value,
                // `max` of the standard library drops NaN.
                Reduction::Max if value > *sum || value.is_nan() => value,
                Reduction::Max => *sum,
            };
        }
    }
    let rounded = sums.iter().map(|&sum| T::from_f64(f64::from(sum))).collect();
    Ok(Tensor::from_vec::<T>(rounded, parts[0].shape())?)
}

fn integers(operation: &str, parts: &[Arc<Tensor>], reduction: Reduction) -> Result<Tensor> {
    let mut sums: Vec<i64> = parts[0].as_slice::<i32>()?.iter().map(|&value| i64::from(value)).collect();
    for part in &parts[1..] {
        for (sum, &value) in sums.iter_mut().zip(part.as_slice::<i32>()?) {
            *sum = match reduction {
                Reduction::Sum => *sum + i64::from(value),
                Reduction::Max => (*sum).max(i64::from(value)),
            };
        }
    }
    let overflow = |(index, sum): (usize, i64)| {
        i32::try_from(sum).map_err(|_| CommError::IntegerOverflow { operation: operation.to_owned(), index, sum })
    };
    let sums = sums.into_iter().enumerate().map(overflow).collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(Tensor::from_vec(sums, parts[0].shape())?)
}

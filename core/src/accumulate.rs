//! Adding one tensor to another: sums of gradients that arrive in parts.

use crate::relayout::check_pair;
use crate::{DeviceId, ProblemError, TensorView, TensorViewMut};

/// A sum `destination += source` whose operands fit together.
///
/// *Shapes*: equal; strides are free, the source may broadcast. *dtypes*: floats, mixed freely. *Numerics*: both elements are
/// widened to f32, added in f32, and the sum is rounded to the destination's dtype, to nearest, ties to even; every element
/// by itself, so equal inputs give equal bits. Many parts are best added in f32 and rounded with
/// [`crate::RelayoutArgs`] at the end.
#[derive(Debug)]
pub struct AccumulateArgs<'a> {
    source: TensorView<'a>,
    destination: TensorViewMut<'a>,
}

impl<'a> AccumulateArgs<'a> {
    /// Checks shapes, dtypes, devices and aliasing.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the tensor.
    pub fn new(source: TensorView<'a>, destination: TensorViewMut<'a>) -> Result<Self, ProblemError> {
        if !source.dtype().is_float() {
            let (tensor, expected) = ("source", "f32, f16 or bf16".to_owned());
            return Err(ProblemError::UnsupportedDType { tensor, expected, got: source.dtype() });
        }
        check_pair(&source, destination.as_view())?;
        Ok(Self { source, destination })
    }

    /// The device both are on.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.source.device()
    }

    /// Source and destination.
    #[must_use]
    pub fn into_parts(self) -> (TensorView<'a>, TensorViewMut<'a>) {
        (self.source, self.destination)
    }
}

//! Strided copy with a change of dtype: transposes, gathers into contiguous memory, casts.

use crate::layout::dimension_name;
use crate::{DType, DeviceId, ProblemError, TensorView, TensorViewMut};

/// A copy whose source and destination fit together.
///
/// *Shapes*: equal; strides are free, the source may broadcast. *Numerics*: round to nearest, ties to even. *dtypes*:
/// floats into floats, otherwise equal ones.
#[derive(Debug)]
pub struct RelayoutArgs<'a> {
    source: TensorView<'a>,
    destination: TensorViewMut<'a>,
}

impl<'a> RelayoutArgs<'a> {
    /// Checks shapes, dtypes, devices and aliasing.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the tensor.
    pub fn new(source: TensorView<'a>, destination: TensorViewMut<'a>) -> Result<Self, ProblemError> {
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

    /// The dtypes of source and destination.
    #[must_use]
    pub fn dtypes(&self) -> (DType, DType) {
        (self.source.dtype(), self.destination.as_view().dtype())
    }
}

/// That elements of one shape, on one device, can go from `source` to `to`, whose memory is its own.
pub(crate) fn check_pair(source: &TensorView<'_>, to: &TensorView<'_>) -> Result<(), ProblemError> {
    let tensor = "destination";
    if to.device() != source.device() {
        return Err(ProblemError::WrongDevice { tensor, expected: source.device(), got: to.device() });
    }
    if to.dtype() != source.dtype() && !(to.dtype().is_float() && source.dtype().is_float()) {
        let expected = if source.dtype().is_float() { "f32, f16 or bf16".into() } else { source.dtype().to_string() };
        return Err(ProblemError::UnsupportedDType { tensor, expected, got: to.dtype() });
    }
    if to.shape().len() != source.shape().len() {
        return Err(ProblemError::Rank { tensor, expected: source.shape().len(), got: to.shape().len() });
    }
    for (dim, (&expected, &got)) in source.shape().iter().zip(to.shape()).enumerate() {
        if expected != got {
            return Err(ProblemError::Shape { tensor, dimension: dimension_name(dim), expected, got });
        }
    }
    if to.layout().overlaps_itself() {
        return Err(ProblemError::SelfOverlap { tensor, strides: to.layout().strides().to_vec() });
    }
    if to.overlaps(source) {
        return Err(ProblemError::Overlap { output: tensor, other: "source" });
    }
    Ok(())
}

//! Fills, strided copies and casts.

use tilefold_core::{DType, DeviceError, DeviceResult, Element, RelayoutArgs, TensorViewMut};

use crate::device::Limits;
use crate::memory::address_of;
use crate::module::{launch_all, unsupported};
use crate::stream::CudaStream;

/// Copies source to destination element by element, rounding where the dtypes differ.
///
/// # Errors
/// [`DeviceError::Unsupported`].
pub(crate) fn relayout(_: &CudaStream, _: Limits, _: RelayoutArgs<'_>) -> DeviceResult<()> {
    Err(DeviceError::Unsupported { limit: "copies between layouts on CUDA devices; copy on the CPU".to_owned() })
}

/// Sets every element to `value`.
///
/// # Errors
/// What compiler and driver report.
pub(crate) fn fill(
    stream: &CudaStream,
    limits: Limits,
    mut destination: TensorViewMut<'_>,
    value: f64,
) -> DeviceResult<()> {
    let view = destination.as_view();
    if !view.layout().is_contiguous() {
        let limit = "filling a tensor with gaps on CUDA devices; fill the whole of its memory".to_owned();
        return Err(DeviceError::Unsupported { limit });
    }
    let dtype = view.dtype();
    let element_bytes = u32::try_from(dtype.size_bytes()).map_err(unsupported)?;
    let count = u64::try_from(view.layout().len()).map_err(unsupported)?;
    let fill = tilefold_kernels::fill(address_of(destination.origin()), element_bytes, bits(dtype, value), count);
    launch_all(stream, limits, fill)
}

/// The bits of a value rounded to a dtype.
fn bits(dtype: DType, value: f64) -> u64 {
    match dtype {
        DType::F16 => <half::f16 as Element>::from_f64(value).to_bits().into(),
        DType::BF16 => <half::bf16 as Element>::from_f64(value).to_bits().into(),
        DType::I32 => i32::from_f64(value).cast_unsigned().into(),
        DType::Bool => u64::from(value != 0.0),
        _ => f32::from_f64(value).to_bits().into(),
    }
}

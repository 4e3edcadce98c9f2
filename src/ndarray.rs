//! `ndarray` arrays and views as tensors: no copy, strides kept (feature `ndarray`).

use ::ndarray::{ArrayRef, Dimension};

use crate::{DType, DeviceId, Element, Error, Layout, ProblemError, TensorView, TensorViewMut};

/// A tensor that borrows an array or an array view, whatever its strides.
///
/// ```
/// use ndarray::{Array, s};
/// let q = Array::from_shape_fn((1, 4, 6, 2, 8), |(_, n, l, h, d)| (n + l + h + d) as f32);
/// let every_other = q.slice(s![.., .., ..;-2, .., ..]); // reversed, every other position
/// let view = tilefold::ndarray::view(&every_other)?;
/// assert_eq!(view.shape(), [1, 4, 3, 2, 8]);
/// assert_eq!(view.layout().strides()[2], -32);
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`ProblemError::ZeroSize`] for an empty array.
pub fn view<T: Element, D: Dimension>(array: &ArrayRef<T, D>) -> Result<TensorView<'_>, Error> {
    view_as(array, T::DTYPE)
}

/// A mask that borrows an array of booleans (true = keep).
///
/// ```
/// let keep = ndarray::array![[[true, true, false]]];
/// assert_eq!(tilefold::ndarray::mask(&keep)?.shape(), [1, 1, 3]);
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// As [`view`].
pub fn mask<D: Dimension>(array: &ArrayRef<bool, D>) -> Result<TensorView<'_>, Error> {
    view_as(array, DType::Bool)
}

/// A tensor that borrows an array or an array view exclusively: an output in the caller's own memory.
///
/// ```
/// use ndarray::Array;
/// use tilefold::{Device, relayout};
/// let (source, mut turned) = (Array::from_vec(vec![1.0_f32, 2.0]), Array::<f32, _>::zeros(2));
/// turned.invert_axis(ndarray::Axis(0));
/// relayout(&Device::cpu()?, tilefold::ndarray::view(&source)?, tilefold::ndarray::view_mut(&mut turned)?)?;
/// assert_eq!(turned, source);
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// As [`view`].
pub fn view_mut<T: Element, D: Dimension>(array: &mut ArrayRef<T, D>) -> Result<TensorViewMut<'_>, Error> {
    let Block { lowest, bytes, layout } = block(array)?;
    let address = array.as_mut_ptr().wrapping_offset(lowest).cast();
    // SAFETY: `block` covers exactly the elements of the array, which is borrowed exclusively while the result lives.
    Ok(unsafe { TensorViewMut::from_raw(address, bytes, DeviceId::CPU, T::DTYPE, layout)? })
}

fn view_as<T, D: Dimension>(array: &ArrayRef<T, D>, dtype: DType) -> Result<TensorView<'_>, Error> {
    let Block { lowest, bytes, layout } = block(array)?;
    let address = array.as_ptr().wrapping_offset(lowest).cast();
    // SAFETY: `block` covers exactly the elements of the array, which is borrowed while the result lives.
    Ok(unsafe { TensorView::from_raw(address, bytes, DeviceId::CPU, dtype, layout)? })
}

/// The memory an array reaches, from its lowest element on.
struct Block {
    /// The lowest element, counted from element (0, 0, ...): negative when an axis is reversed.
    lowest: isize,
    bytes: usize,
    layout: Layout,
}

fn block<T, D: Dimension>(array: &ArrayRef<T, D>) -> Result<Block, ProblemError> {
    const OVERFLOW: ProblemError = ProblemError::Overflow { tensor: "array", quantity: "size or offset" };
    let strides = array.strides().iter().map(|&stride| i64::try_from(stride));
    let strides: Vec<i64> = strides.collect::<Result<_, _>>().map_err(|_| OVERFLOW)?;
    let extent = Layout::new(array.shape(), &strides, 0)?.extent();
    let elements = usize::try_from(extent.end - extent.start).map_err(|_| OVERFLOW)?;
    Ok(Block {
        lowest: isize::try_from(extent.start).map_err(|_| OVERFLOW)?,
        bytes: elements.checked_mul(size_of::<T>()).ok_or(OVERFLOW)?,
        layout: Layout::new(array.shape(), &strides, -extent.start)?,
    })
}

#[cfg(test)]
mod tests {
    use ::ndarray::{Array, Axis, s};

    use super::*;

    #[test]
    fn strides_are_kept_without_a_copy() {
        let array = Array::from_shape_fn((3, 4), |(i, j)| f32::from(u8::try_from(10 * i + j).unwrap()));
        for part in [array.view(), array.t(), array.slice(s![..;-1, ..]), array.slice(s![1..;-1, ..;2])] {
            let tensor = view(&part).unwrap();
            assert_eq!(tensor.shape(), part.shape());
            assert_eq!(tensor.to_f64().unwrap(), part.iter().map(|&value| f64::from(value)).collect::<Vec<_>>());
            assert_eq!(tensor.origin().cast(), part.as_ptr());
        }
        let row = array.row(2);
        let repeated = row.broadcast((5, 4)).unwrap();
        assert_eq!(view(&repeated).unwrap().layout().strides(), [0, 1]);
    }

    #[test]
    fn outputs_land_in_the_array() {
        let mut array = Array::<f32, _>::zeros((2, 3));
        array.invert_axis(Axis(1));
        let mut tensor = view_mut(&mut array).unwrap();
        // SAFETY: the first element, which nobody else can reach now.
        unsafe { tensor.origin().cast::<f32>().write(7.0) };
        assert_eq!(array[[0, 0]], 7.0);
    }

    #[test]
    fn masks_and_empty_arrays() {
        let keep = Array::from_vec(vec![true, false]);
        assert_eq!(mask(&keep).unwrap().to_f64().unwrap(), [1.0, 0.0]);
        let empty = Array::<f32, _>::zeros((2, 0));
        assert!(matches!(view(&empty), Err(Error::Problem(ProblemError::ZeroSize { .. }))));
    }
}

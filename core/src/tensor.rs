//! Tensors that own their memory, and views that borrow it.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use crate::storage::Kept;
use crate::{DType, DeviceId, Element, Layout, ProblemError, Storage};

/// A tensor that owns its memory.
#[derive(Debug)]
pub struct Tensor {
    storage: Storage,
    dtype: DType,
    layout: Layout,
}

impl Tensor {
    /// Memory seen as elements of `dtype` in `layout`.
    ///
    /// # Errors
    /// [`ProblemError::OutOfBounds`] when the layout reaches outside the memory, [`ProblemError::Misaligned`].
    pub fn new(storage: Storage, dtype: DType, layout: Layout) -> Result<Self, ProblemError> {
        check_memory(storage.address(), storage.bytes(), dtype, &layout)?;
        Ok(Self { storage, dtype, layout })
    }

    /// A row-major host tensor that takes over `data`, without a copy.
    ///
    /// # Errors
    /// [`ProblemError::Length`] when the shape has another number of elements than `data`.
    pub fn from_vec<T: Element>(data: Vec<T>, shape: &[usize]) -> Result<Self, ProblemError> {
        let layout = dense_layout(data.len(), shape)?;
        Self::new(Storage::from_vec(data), T::DTYPE, layout)
    }

    /// A row-major host tensor with `values` rounded to `dtype`: the one place test inputs are rounded.
    ///
    /// # Errors
    /// As [`Tensor::from_vec`], and [`ProblemError::OutOfMemory`].
    pub fn from_f64(values: &[f64], dtype: DType, shape: &[usize]) -> Result<Self, ProblemError> {
        fn convert<T: Element>(values: &[f64], shape: &[usize]) -> Result<Tensor, ProblemError> {
            let mut data = reserved::<T>(values.len())?;
            data.extend(values.iter().map(|&value| T::from_f64(value)));
            Tensor::from_vec(data, shape)
        }
        match dtype {
            DType::F32 => convert::<f32>(values, shape),
            DType::F16 => convert::<half::f16>(values, shape),
            DType::BF16 => convert::<half::bf16>(values, shape),
            DType::I32 => convert::<i32>(values, shape),
            DType::Bool => convert::<u8>(values, shape),
        }
    }

    /// A row-major host tensor of zeros.
    ///
    /// # Errors
    /// [`ProblemError::ZeroSize`], [`ProblemError::Overflow`], [`ProblemError::OutOfMemory`].
    pub fn zeros(dtype: DType, shape: &[usize]) -> Result<Self, ProblemError> {
        let layout = Layout::contiguous(shape)?;
        let bytes = layout.len().checked_mul(dtype.size_bytes()).ok_or(BYTES_OVERFLOW)?;
        // Allocated as u64, so that every dtype is aligned.
        let mut words = reserved::<u64>(bytes.div_ceil(8))?;
        words.resize(bytes.div_ceil(8), 0);
        let address = words.as_mut_ptr().cast::<u8>();
        // SAFETY: the vector's buffer does not move when the vector does, and the owner gives no access to it.
        let storage = unsafe { Storage::from_raw(address, bytes, DeviceId::CPU, Arc::new(Kept(words))) };
        Self::new(storage, dtype, layout)
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape, strides and offset.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Sizes of the dimensions.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// The device that holds it.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.storage.device()
    }

    /// The memory behind it.
    #[must_use]
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// The memory alone, to be seen in another layout.
    #[must_use]
    pub fn into_storage(self) -> Storage {
        self.storage
    }

    /// The bytes behind it, when the host can write them.
    #[must_use]
    pub fn host_bytes_mut(&mut self) -> Option<&mut [u8]> {
        self.storage.host_bytes_mut()
    }

    /// The elements of a row-major host tensor, without a copy; bools are `u8`.
    ///
    /// # Errors
    /// [`ProblemError::UnsupportedDType`] when `T` is not the tensor's type, and those of [`TensorView::as_bytes`].
    pub fn as_slice<T: Element>(&self) -> Result<&[T], ProblemError> {
        if self.dtype != T::DTYPE {
            let (tensor, expected) = ("tensor", T::DTYPE.to_string());
            return Err(ProblemError::UnsupportedDType { tensor, expected, got: self.dtype });
        }
        // `check_memory` made sure that the elements are aligned.
        Ok(bytemuck::cast_slice(self.view().as_bytes()?))
    }

    /// A shared view of the whole tensor.
    #[must_use]
    pub fn view(&self) -> TensorView<'_> {
        TensorView {
            address: self.storage.address(),
            device: self.storage.device(),
            dtype: self.dtype,
            layout: self.layout.clone(),
            borrow: PhantomData,
        }
    }

    /// An exclusive view of the whole tensor.
    #[must_use]
    pub fn view_mut(&mut self) -> TensorViewMut<'_> {
        TensorViewMut(self.view())
    }

    /// All elements as f64 in row-major order of their indices.
    ///
    /// # Errors
    /// As [`TensorView::to_f64`].
    pub fn to_f64(&self) -> Result<Vec<f64>, ProblemError> {
        self.view().to_f64()
    }
}

/// A shared view of a tensor: any layout over borrowed memory.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    address: *mut u8,
    device: DeviceId,
    dtype: DType,
    layout: Layout,
    borrow: PhantomData<&'a [u8]>,
}

// SAFETY: a view is a borrow of memory that may be shared between threads; writers go through `TensorViewMut`.
unsafe impl Send for TensorView<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorView<'_> {}

impl<'a> TensorView<'a> {
    /// A row-major view of a slice on the host.
    ///
    /// # Errors
    /// [`ProblemError::Length`] when the shape has another number of elements than the slice.
    pub fn from_slice<T: Element>(data: &'a [T], shape: &[usize]) -> Result<Self, ProblemError> {
        Self::from_slice_with_layout(data, dense_layout(data.len(), shape)?)
    }

    /// A view of a slice on the host with strides of its own.
    ///
    /// # Errors
    /// [`ProblemError::OutOfBounds`] when the layout reaches outside the slice.
    pub fn from_slice_with_layout<T: Element>(data: &'a [T], layout: Layout) -> Result<Self, ProblemError> {
        // SAFETY: the slice is initialised host memory, borrowed for 'a.
        unsafe { Self::from_raw(data.as_ptr().cast(), size_of_val(data), DeviceId::CPU, T::DTYPE, layout) }
    }

    /// A row-major mask from booleans (true = keep).
    ///
    /// # Errors
    /// As [`TensorView::from_slice`].
    pub fn from_bools(data: &'a [bool], shape: &[usize]) -> Result<Self, ProblemError> {
        Self::from_slice::<u8>(bytemuck::cast_slice(data), shape)
    }

    /// A view of any memory.
    ///
    /// # Safety
    /// `address..address + bytes` is memory of `device` that nobody writes during 'a; on a host device it is initialised.
    ///
    /// # Errors
    /// [`ProblemError::OutOfBounds`], [`ProblemError::Misaligned`].
    pub unsafe fn from_raw(
        address: *const u8,
        bytes: usize,
        device: DeviceId,
        dtype: DType,
        layout: Layout,
    ) -> Result<Self, ProblemError> {
        check_memory(address, bytes, dtype, &layout)?;
        Ok(Self { address: address.cast_mut(), device, dtype, layout, borrow: PhantomData })
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape, strides and offset.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Sizes of the dimensions.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// The device that holds it.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// Address of element (0, 0, ...).
    #[must_use]
    pub fn origin(&self) -> *const u8 {
        let offset = isize::try_from(self.layout.offset()).unwrap_or(0);
        let size = isize::try_from(self.dtype.size_bytes()).unwrap_or(1);
        self.address.wrapping_offset(offset.wrapping_mul(size))
    }

    /// The bytes of a row-major host tensor, without a copy.
    ///
    /// # Errors
    /// [`ProblemError::NotContiguous`]; [`ProblemError::WrongDevice`] when the host cannot read the memory.
    pub fn as_bytes(&self) -> Result<&'a [u8], ProblemError> {
        let tensor = "tensor";
        if !self.device.is_host() {
            return Err(ProblemError::WrongDevice { tensor, expected: DeviceId::CPU, got: self.device });
        }
        if !self.layout.is_contiguous() {
            return Err(ProblemError::NotContiguous { tensor, strides: self.layout.strides().to_vec() });
        }
        let bytes = self.layout.len() * self.dtype.size_bytes();
        // SAFETY: `check_memory` made sure that all elements are inside the memory, which is initialised and borrowed for 'a.
        Ok(unsafe { std::slice::from_raw_parts(self.origin(), bytes) })
    }

    fn with_layout(&self, layout: Layout) -> Self {
        Self { layout, ..self.clone() }
    }

    /// Dimensions reordered: dimension `i` of the result is dimension `order[i]`.
    ///
    /// # Errors
    /// As [`Layout::permute`].
    pub fn permute(&self, order: &[usize]) -> Result<Self, ProblemError> {
        Ok(self.with_layout(self.layout.permute(order)?))
    }

    /// Indices `range` of dimension `dim`, every `step`-th; a negative step walks from the end.
    ///
    /// # Errors
    /// As [`Layout::slice`].
    pub fn slice(&self, dim: usize, range: Range<usize>, step: i64) -> Result<Self, ProblemError> {
        Ok(self.with_layout(self.layout.slice(dim, range, step)?))
    }

    /// A new dimension of size 1 in front of dimension `dim`.
    ///
    /// # Errors
    /// As [`Layout::unsqueeze`].
    pub fn unsqueeze(&self, dim: usize) -> Result<Self, ProblemError> {
        Ok(self.with_layout(self.layout.unsqueeze(dim)?))
    }

    /// Dimensions of size 1 repeated (with stride 0) to `shape`.
    ///
    /// # Errors
    /// As [`Layout::expand`].
    pub fn expand(&self, shape: &[usize]) -> Result<Self, ProblemError> {
        Ok(self.with_layout(self.layout.expand(shape)?))
    }

    /// All elements as f64 in row-major order of their indices.
    ///
    /// # Errors
    /// [`ProblemError::WrongDevice`] when the host cannot read the memory, [`ProblemError::OutOfMemory`].
    pub fn to_f64(&self) -> Result<Vec<f64>, ProblemError> {
        fn read<T: Element>(view: &TensorView<'_>) -> Result<Vec<f64>, ProblemError> {
            let mut values = reserved(view.layout.len())?;
            let base = view.address.cast::<T>().cast_const();
            let at = |position: i64| base.wrapping_offset(isize::try_from(position).unwrap_or(0));
            // SAFETY: every position lies inside borrowed, initialised host memory (`check_memory`).
            values.extend(view.layout.positions().map(|position| unsafe { at(position).read() }.to_f64()));
            Ok(values)
        }
        if !self.device.is_host() {
            let (tensor, expected, got) = ("tensor", DeviceId::CPU, self.device);
            return Err(ProblemError::WrongDevice { tensor, expected, got });
        }
        match self.dtype {
            DType::F32 => read::<f32>(self),
            DType::F16 => read::<half::f16>(self),
            DType::BF16 => read::<half::bf16>(self),
            DType::I32 => read::<i32>(self),
            DType::Bool => read::<u8>(self),
        }
    }

    /// Whether an element of one may share memory with an element of the other.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let range = |view: &Self| -> Range<usize> {
            let (extent, size) = (view.layout.extent(), view.dtype.size_bytes());
            let at = |position: i64| {
                let step = isize::try_from(position).unwrap_or(0).wrapping_mul(isize::try_from(size).unwrap_or(1));
                view.address.wrapping_offset(step).addr()
            };
            at(extent.start)..at(extent.end)
        };
        let (a, b) = (range(self), range(other));
        if self.device != other.device || a.end <= b.start || b.end <= a.start {
            return false;
        }
        let shift = b.start.wrapping_sub(a.start).cast_signed();
        let size = self.dtype.size_bytes().cast_signed();
        if self.dtype.size_bytes() != other.dtype.size_bytes() || shift % size != 0 {
            return true;
        }
        // Both layouts in elements from the lowest element of `self`.
        let from = |view: &Self, start: isize| {
            let offset = view.layout.offset() - view.layout.extent().start + i64::try_from(start).unwrap_or(i64::MAX);
            Layout::new(view.layout.shape(), view.layout.strides(), offset)
        };
        match (from(self, 0), from(other, shift / size)) {
            (Ok(a), Ok(b)) => a.overlaps(&b),
            _ => true,
        }
    }
}

/// An exclusive view of a tensor.
#[derive(Debug)]
pub struct TensorViewMut<'a>(TensorView<'a>);

impl<'a> TensorViewMut<'a> {
    /// A row-major exclusive view of a slice on the host.
    ///
    /// # Errors
    /// As [`TensorView::from_slice`].
    pub fn from_slice<T: Element>(data: &'a mut [T], shape: &[usize]) -> Result<Self, ProblemError> {
        let layout = dense_layout(data.len(), shape)?;
        Self::from_slice_with_layout(data, layout)
    }

    /// An exclusive view of a slice on the host with strides of its own.
    ///
    /// # Errors
    /// As [`TensorView::from_slice_with_layout`].
    pub fn from_slice_with_layout<T: Element>(data: &'a mut [T], layout: Layout) -> Result<Self, ProblemError> {
        // SAFETY: the slice is initialised host memory, borrowed exclusively for 'a.
        unsafe { Self::from_raw(data.as_mut_ptr().cast(), size_of_val(data), DeviceId::CPU, T::DTYPE, layout) }
    }

    /// An exclusive view of any memory.
    ///
    /// # Safety
    /// `address..address + bytes` is memory of `device` that nobody else reads or writes during 'a, except elements this
    /// layout does not reach; on a host device it is initialised.
    ///
    /// # Errors
    /// [`ProblemError::OutOfBounds`], [`ProblemError::Misaligned`].
    pub unsafe fn from_raw(
        address: *mut u8,
        bytes: usize,
        device: DeviceId,
        dtype: DType,
        layout: Layout,
    ) -> Result<Self, ProblemError> {
        // SAFETY: the caller promises more than a shared view needs.
        Ok(Self(unsafe { TensorView::from_raw(address, bytes, device, dtype, layout)? }))
    }

    /// The same elements as a shared view, while this one is borrowed.
    #[must_use]
    pub fn as_view(&self) -> &TensorView<'_> {
        &self.0
    }

    /// Address of element (0, 0, ...).
    #[must_use]
    pub fn origin(&mut self) -> *mut u8 {
        self.0.origin().cast_mut()
    }

    /// Dimensions reordered: dimension `i` of the result is dimension `order[i]`.
    ///
    /// # Errors
    /// As [`Layout::permute`].
    pub fn permute(self, order: &[usize]) -> Result<Self, ProblemError> {
        Ok(Self(self.0.permute(order)?))
    }

    /// Indices `range` of dimension `dim`, every `step`-th; a negative step walks from the end.
    ///
    /// # Errors
    /// As [`Layout::slice`].
    pub fn slice(self, dim: usize, range: Range<usize>, step: i64) -> Result<Self, ProblemError> {
        Ok(Self(self.0.slice(dim, range, step)?))
    }

    /// A new dimension of size 1 in front of dimension `dim`.
    ///
    /// # Errors
    /// As [`Layout::unsqueeze`].
    pub fn unsqueeze(self, dim: usize) -> Result<Self, ProblemError> {
        Ok(Self(self.0.unsqueeze(dim)?))
    }

    /// Two views of the indices below and from `at` of dimension `dim`.
    ///
    /// # Errors
    /// As [`Layout::slice`]; [`ProblemError::SelfOverlap`] when elements share memory.
    pub fn split_at(self, dim: usize, at: usize) -> Result<(Self, Self), ProblemError> {
        if self.0.layout.overlaps_itself() {
            let strides = self.0.layout.strides().to_vec();
            return Err(ProblemError::SelfOverlap { tensor: "split", strides });
        }
        let size = self.0.shape().get(dim).copied().unwrap_or(0);
        Ok((Self(self.0.slice(dim, 0..at, 1)?), Self(self.0.slice(dim, at..size, 1)?)))
    }
}

const BYTES_OVERFLOW: ProblemError = ProblemError::Overflow { tensor: "tensor", quantity: "size in bytes" };

/// An empty vector with room for `count` elements.
fn reserved<T>(count: usize) -> Result<Vec<T>, ProblemError> {
    let mut data = Vec::new();
    let bytes = count.saturating_mul(size_of::<T>());
    data.try_reserve_exact(count).map_err(|_| ProblemError::OutOfMemory { tensor: "tensor", bytes })?;
    Ok(data)
}

fn dense_layout(elements: usize, shape: &[usize]) -> Result<Layout, ProblemError> {
    let layout = Layout::contiguous(shape)?;
    if layout.len() != elements {
        let expected = format!("{} for shape {shape:?}", layout.len());
        return Err(ProblemError::Length { list: "data", expected, got: elements });
    }
    Ok(layout)
}

/// Everything a view promises about its memory.
fn check_memory(address: *const u8, bytes: usize, dtype: DType, layout: &Layout) -> Result<(), ProblemError> {
    let size = i64::try_from(dtype.size_bytes()).map_err(|_| BYTES_OVERFLOW)?;
    let extent = layout.extent();
    let first = extent.start.checked_mul(size).ok_or(BYTES_OVERFLOW)?;
    let end = extent.end.checked_mul(size).ok_or(BYTES_OVERFLOW)?;
    if first < 0 || usize::try_from(end).map_or(true, |end| end > bytes) {
        return Err(ProblemError::OutOfBounds { tensor: "tensor", first, end, available: bytes });
    }
    let remainder = address.addr() % dtype.size_bytes();
    if remainder != 0 {
        return Err(ProblemError::Misaligned { tensor: "tensor", expected: dtype.size_bytes(), got: remainder });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_read_what_their_strides_say() {
        let data: Vec<f32> = (0_u8..6).map(f32::from).collect();
        let view = TensorView::from_slice(&data, &[2, 3]).unwrap();
        let turned = view.permute(&[1, 0]).unwrap().slice(1, 0..2, -1).unwrap();
        assert_eq!(turned.to_f64().unwrap(), [3.0, 0.0, 4.0, 1.0, 5.0, 2.0]);
    }

    #[test]
    fn strides_out_of_bounds_are_refused() {
        let data = [0_f32; 6];
        for (shape, stride, offset) in [([4], 2, 0), ([2], -1, 0), ([1], 1, 6)] {
            let layout = Layout::new(&shape, &[stride], offset).unwrap();
            let result = TensorView::from_slice_with_layout(&data, layout);
            assert!(matches!(result, Err(ProblemError::OutOfBounds { .. })), "{result:?}");
        }
        assert!(TensorView::from_slice(&data, &[5]).is_err());
    }

    #[test]
    fn elements_of_a_dense_tensor_are_a_slice() {
        let tensor = Tensor::from_vec(vec![1_f32, 2.0, 3.0, 4.0], &[2, 2]).unwrap();
        assert_eq!(tensor.as_slice::<f32>(), Ok([1.0, 2.0, 3.0, 4.0].as_slice()));
        assert!(matches!(tensor.as_slice::<i32>(), Err(ProblemError::UnsupportedDType { got: DType::F32, .. })));
        let part = |strides: &[i64], offset| {
            let layout = Layout::new(&[1, 2], strides, offset).unwrap();
            Tensor::new(Storage::from_vec(vec![1_f32, 2.0, 3.0, 4.0]), DType::F32, layout).unwrap()
        };
        assert_eq!(part(&[7, 1], 2).as_slice::<f32>(), Ok([3.0, 4.0].as_slice()));
        let strides = vec![0, 2];
        assert_eq!(part(&[0, 2], 0).as_slice::<f32>(), Err(ProblemError::NotContiguous { tensor: "tensor", strides }));
    }

    #[test]
    fn a_copy_beyond_memory_is_an_error() {
        let one = [1_f32];
        let layout = Layout::new(&[1 << 60], &[0], 0).unwrap();
        let error = TensorView::from_slice_with_layout(&one, layout).unwrap().to_f64().unwrap_err();
        assert_eq!(error, ProblemError::OutOfMemory { tensor: "tensor", bytes: 1 << 63 });
    }

    #[test]
    fn overlap_of_packed_views() {
        let mut data = vec![0_f32; 4 * 3 * 8];
        let all = TensorViewMut::from_slice(&mut data, &[4, 3, 8]).unwrap();
        let (q, rest) = all.split_at(1, 1).unwrap();
        let (k, v) = rest.split_at(1, 1).unwrap();
        assert!(!q.as_view().overlaps(k.as_view()) && !v.as_view().overlaps(k.as_view()));
        assert!(q.as_view().overlaps(q.as_view()));
    }
}

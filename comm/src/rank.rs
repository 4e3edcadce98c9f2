//! A rank with its device: moves tensors between the device and what travels.

use std::ops::Range;
use std::sync::Arc;

use tilefold_core::{
    AccumulateArgs, Backend, DType, Layout, ProblemError, RelayoutArgs, Stream, Tensor, TensorView, TensorViewMut,
};

use crate::communicator::Communicator;
use crate::error::Result;

/// One rank and the device it computes on.
#[derive(Clone, Copy, Debug)]
pub struct Rank<'a> {
    /// The ranks it works with.
    pub comm: &'a Communicator,
    /// Its device.
    pub device: &'a dyn Backend,
    /// Where its work is enqueued.
    pub stream: &'a Stream,
}

impl Rank<'_> {
    /// A row-major tensor of zeros on the device.
    ///
    /// # Errors
    /// [`tilefold_core::DeviceError::OutOfMemory`].
    pub fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let layout = Layout::contiguous(shape)?;
        let bytes = layout.len().checked_mul(dtype.size_bytes());
        let bytes = bytes.ok_or(ProblemError::Overflow { tensor: "tensor", quantity: "size in bytes" })?;
        Ok(Tensor::new(self.device.alloc(self.stream, bytes)?, dtype, layout)?)
    }

    /// Strided copy on the device, with a change of dtype.
    ///
    /// # Errors
    /// Those of [`RelayoutArgs::new`] and of the device.
    pub fn copy(&self, source: TensorView<'_>, destination: TensorViewMut<'_>) -> Result<()> {
        Ok(self.device.relayout(self.stream, RelayoutArgs::new(source, destination)?)?)
    }

    /// A row-major tensor of its own on the device.
    ///
    /// # Errors
    /// As [`Rank::zeros`] and [`Rank::copy`].
    pub fn dense(&self, source: &TensorView<'_>) -> Result<Tensor> {
        let mut copy = self.zeros(source.dtype(), source.shape())?;
        self.copy(source.clone(), copy.view_mut())?;
        Ok(copy)
    }

    /// What travels: a row-major copy on the host.
    ///
    /// # Errors
    /// As [`Rank::dense`].
    pub fn pack(&self, source: &TensorView<'_>) -> Result<Arc<Tensor>> {
        self.pack_shared(&Arc::new(self.dense(source)?))
    }

    /// The same for a tensor that is shared: itself, where it is a row-major host tensor already.
    ///
    /// # Errors
    /// As [`Rank::dense`].
    pub fn pack_shared(&self, source: &Arc<Tensor>) -> Result<Arc<Tensor>> {
        if source.layout().is_contiguous() && source.device().is_host() {
            return Ok(Arc::clone(source));
        }
        // A download begins at the front of the memory.
        if !source.layout().is_contiguous() || source.layout().offset() != 0 {
            return self.pack(&source.view());
        }
        let mut host = Tensor::zeros(source.dtype(), source.shape())?;
        let bytes = host.host_bytes_mut().unwrap_or_default();
        self.device.download(self.stream, source.storage(), bytes)?;
        Ok(Arc::new(host))
    }

    /// What has travelled, on the device.
    ///
    /// # Errors
    /// As [`Rank::zeros`].
    pub fn unpack(&self, packed: Arc<Tensor>) -> Result<Arc<Tensor>> {
        if self.device.info().id.is_host() {
            return Ok(packed);
        }
        let layout = Layout::contiguous(packed.shape())?;
        let view = packed.view();
        let bytes = view.as_bytes()?;
        let mut storage = self.device.alloc(self.stream, bytes.len())?;
        self.device.upload(self.stream, bytes, &mut storage)?;
        Ok(Arc::new(Tensor::new(storage, packed.dtype(), layout)?))
    }

    /// A tensor nobody else holds any more, or a copy of it.
    ///
    /// # Errors
    /// As [`Rank::dense`].
    pub fn own(&self, shared: Arc<Tensor>) -> Result<Tensor> {
        match Arc::try_unwrap(shared) {
            Ok(tensor) => Ok(tensor),
            Err(shared) => self.dense(&shared.view()),
        }
    }

    /// A sum in the dtype of what it is the sum of.
    ///
    /// # Errors
    /// As [`Rank::dense`].
    pub(crate) fn rounded(&self, sum: Tensor, dtype: DType) -> Result<Tensor> {
        if sum.dtype() == dtype {
            return Ok(sum);
        }
        let mut rounded = self.zeros(dtype, sum.shape())?;
        self.copy(sum.view(), rounded.view_mut())?;
        Ok(rounded)
    }

    /// `destination += source` on the device, in f32.
    ///
    /// # Errors
    /// Those of the arguments and of the device.
    pub fn add(&self, source: TensorView<'_>, destination: TensorViewMut<'_>) -> Result<()> {
        Ok(self.device.accumulate(self.stream, AccumulateArgs::new(source, destination)?)?)
    }
}

/// A range of an axis; the whole of it where the axis is broadcast.
///
/// # Errors
/// Those of [`TensorView::slice`].
pub(crate) fn along<'a>(view: &TensorView<'a>, axis: usize, range: Range<usize>) -> Result<TensorView<'a>> {
    if view.shape().get(axis) == Some(&1) { Ok(view.clone()) } else { Ok(view.slice(axis, range, 1)?) }
}

/// The same of a tensor that is written.
///
/// # Errors
/// As [`along`].
pub(crate) fn along_mut<'a>(view: TensorViewMut<'a>, axis: usize, range: Range<usize>) -> Result<TensorViewMut<'a>> {
    if view.as_view().shape().get(axis) == Some(&1) { Ok(view) } else { Ok(view.slice(axis, range, 1)?) }
}

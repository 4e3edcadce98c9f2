//! Row-major tensors of the host: what travels between ranks.

use std::sync::Arc;

use tilefold_core::{DType, DeviceId, Element, Layout, ProblemError, Tensor, TensorView};

use crate::error::Result;
use crate::transport::Parcel;

/// Whether a tensor is row-major and the host's.
///
/// # Errors
/// What it is instead.
pub(crate) fn dense(tensor: &'static str, view: &TensorView<'_>) -> Result<()> {
    if !view.device().is_host() {
        return Err(ProblemError::WrongDevice { tensor, expected: DeviceId::CPU, got: view.device() }.into());
    }
    if !view.layout().is_contiguous() {
        return Err(ProblemError::NotContiguous { tensor, strides: view.layout().strides().to_vec() }.into());
    }
    Ok(())
}

/// A tensor of its own with these bytes.
pub(crate) fn tensor(bytes: &[u8], dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let mut tensor = Tensor::zeros(dtype, shape)?;
    if let Some(memory) = tensor.host_bytes_mut() {
        memory.copy_from_slice(bytes);
    }
    Ok(tensor)
}

/// Consecutive runs of `counts` elements, one for each rank, as flat tensors; none where there is nothing.
pub(crate) fn cut(view: &TensorView<'_>, counts: &[usize]) -> Result<Vec<Parcel>> {
    dense("values", view)?;
    let mut rest = view.as_bytes()?;
    let runs = counts.iter().map(|&count| {
        let (run, behind) = rest.split_at(count * view.dtype().size_bytes());
        rest = behind;
        if count == 0 { Ok(Vec::new()) } else { Ok(vec![Arc::new(tensor(run, view.dtype(), &[count])?)]) }
    });
    runs.collect()
}

/// One tensor of `shape` with the elements of `parts`, one after the other.
pub(crate) fn join(parts: &[Arc<Tensor>], dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let mut whole = Tensor::zeros(dtype, shape)?;
    let mut rest = whole.host_bytes_mut().unwrap_or_default();
    for part in parts {
        let (view, expected) = (part.view(), rest.len());
        let bytes = view.as_bytes()?;
        if bytes.len() > expected {
            let expected = format!("at most {expected} bytes");
            return Err(ProblemError::Length { list: "parts", expected, got: bytes.len() }.into());
        }
        let (place, behind) = rest.split_at_mut(bytes.len());
        place.copy_from_slice(bytes);
        rest = behind;
    }
    Ok(whole)
}

/// The same elements in another shape.
pub(crate) fn reshaped(tensor: Tensor, shape: &[usize]) -> Result<Tensor> {
    let (dtype, layout) = (tensor.dtype(), Layout::contiguous(shape)?);
    Ok(Tensor::new(tensor.into_storage(), dtype, layout)?)
}

/// Elements in f32, in which every half-precision number is exact.
pub(crate) fn singles(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(match tensor.dtype() {
        DType::F32 => tensor.as_slice::<f32>()?.to_vec(),
        DType::F16 => tensor.as_slice::<half::f16>()?.iter().map(|x| x.to_f32()).collect(),
        DType::BF16 => tensor.as_slice::<half::bf16>()?.iter().map(|x| x.to_f32()).collect(),
        _ => tensor.to_f64()?.into_iter().map(f32::from_f64).collect(),
    })
}

//! Matrices of the host as tensors of a rank's device, and back.

use std::sync::Arc;

use ndarray::Array2;
use tilefold::comm::Rank;
use tilefold::comm::sequence_parallel::maps::Map;
use tilefold::{Tensor, TensorView};

use super::error::Result;

/// A matrix as a tensor with the same elements.
pub(super) fn to_device(rank: &Rank<'_>, matrix: Array2<f32>, shape: &[usize]) -> Result<Arc<Tensor>> {
    let elements =
        if matrix.is_standard_layout() { matrix.into_raw_vec_and_offset().0 } else { matrix.iter().copied().collect() };
    Ok(rank.unpack(Arc::new(Tensor::from_vec(elements, shape)?))?)
}

/// A tensor as a matrix with `width` columns.
pub(super) fn to_host(rank: &Rank<'_>, tensor: Arc<Tensor>, width: usize) -> Result<Array2<f32>> {
    let packed = rank.pack_shared(&tensor)?;
    matrix(&packed, width)
}

/// A copy of what a view shows, as a matrix with `width` columns.
pub(super) fn copy_to_host(rank: &Rank<'_>, view: &TensorView<'_>, width: usize) -> Result<Array2<f32>> {
    let packed = rank.pack(view)?;
    matrix(&packed, width)
}

fn matrix(tensor: &Tensor, width: usize) -> Result<Array2<f32>> {
    let elements = tensor.as_slice::<f32>()?;
    Ok(Array2::from_shape_vec((elements.len() / width.max(1), width), elements.to_vec())?)
}

/// A map between ranks applied to a matrix, taken as a tensor of `shape`; its value has the tensor's last axis for columns.
pub(super) fn apply(rank: &Rank<'_>, map: &impl Map, x: Array2<f32>, shape: &[usize]) -> Result<Array2<f32>> {
    let y = map.apply(rank, &to_device(rank, x, shape)?.view())?;
    let width = y.shape().last().copied().unwrap_or(1);
    to_host(rank, Arc::new(y), width)
}

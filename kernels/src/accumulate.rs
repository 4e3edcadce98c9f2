//! Sums of two strided tensors.

use tilefold_core::{DType, TensorView};

use crate::axes::AXES;
use crate::constants::{constant, element};
use crate::kernel::{Kernel, KernelError, Launch};
use crate::params::RelayoutParams;
use crate::relayout::between;

const BLOCK_THREADS: u32 = 256;
const ELEMENTS_PER_THREAD: u32 = 4;

/// The launch that adds `source` to `destination`, which a [`tilefold_core::AccumulateArgs`] has checked. Their origins are
/// addresses on the device.
///
/// # Errors
/// [`KernelError::Limit`] with more than [`crate::params::MAX_LAYOUT_AXES`] axes that cannot be joined.
pub fn accumulate(
    source: &TensorView<'_>,
    destination: &TensorView<'_>,
) -> Result<Launch<RelayoutParams>, KernelError> {
    let (axes, params) = between(source, destination)?;
    let blocks = params.count.unsigned_abs().div_ceil(u64::from(BLOCK_THREADS * ELEMENTS_PER_THREAD));
    Ok(Launch { kernel: kernel(source.dtype(), destination.dtype(), axes)?, blocks, params })
}

/// All kernels that a sum can choose.
pub(crate) fn kernels() -> impl Iterator<Item = Result<Kernel, KernelError>> {
    let floats = [DType::F32, DType::F16, DType::BF16];
    let pairs = floats.into_iter().flat_map(move |from| floats.map(move |to| (from, to)));
    pairs.flat_map(|(from, to)| AXES.map(|axes| kernel(from, to, axes)))
}

fn kernel(from: DType, to: DType, axes: usize) -> Result<Kernel, KernelError> {
    let constants = [
        constant("SOURCE", element(from)),
        constant("DESTINATION", element(to)),
        constant("AXES", axes),
        constant("BLOCK_THREADS", BLOCK_THREADS),
        constant("ELEMENTS_PER_THREAD", ELEMENTS_PER_THREAD),
    ];
    let name = format!("accumulate {from} into {to} axes={axes}");
    Kernel::new(name, "accumulate.cu", "accumulate", &constants, BLOCK_THREADS)
}

//! Strided copies with a change of dtype.

use tilefold_core::{DType, TensorView};

use crate::axes::{AXES, Axes, moved};
use crate::constants::{constant, element};
use crate::kernel::{Kernel, KernelError, Launch};
use crate::params::RelayoutParams;

const BLOCK_THREADS: u32 = 256;
const ELEMENTS_PER_THREAD: u32 = 4;

/// The launch that copies `source` to `destination`, which a [`tilefold_core::RelayoutArgs`] has checked. Their origins
/// are addresses on the device.
///
/// Equal dtypes keep their bits, NaN payloads included.
///
/// # Errors
/// [`KernelError::Limit`] with more than [`crate::params::MAX_LAYOUT_AXES`] axes that cannot be joined.
pub fn relayout(source: &TensorView<'_>, destination: &TensorView<'_>) -> Result<Launch<RelayoutParams>, KernelError> {
    let (axes, params) = between(source, destination)?;
    let blocks = params.count.unsigned_abs().div_ceil(u64::from(BLOCK_THREADS * ELEMENTS_PER_THREAD));
    Ok(Launch { kernel: kernel(types(source.dtype(), destination.dtype()), axes)?, blocks, params })
}

/// Axes of a kernel that meets the elements of two tensors in pairs, and its argument.
///
/// # Errors
/// As [`relayout`].
pub(crate) fn between(
    source: &TensorView<'_>,
    destination: &TensorView<'_>,
) -> Result<(usize, RelayoutParams), KernelError> {
    let axes = Axes::new(source.layout(), destination.layout())?;
    let address = |view: &TensorView<'_>, start| moved(view.origin().addr() as u64, start, view.dtype().size_bytes());
    let params = RelayoutParams {
        source: address(source, axes.source_start),
        destination: address(destination, axes.destination_start),
        sizes: axes.sizes(),
        source_strides: axes.source_strides(),
        destination_strides: axes.destination_strides(),
        count: axes.elements(),
        first_block: 0,
    };
    Ok((axes.compiled(), params))
}

/// All kernels that a relayout can choose.
pub(crate) fn kernels() -> impl Iterator<Item = Result<Kernel, KernelError>> {
    let floats = [DType::F32, DType::F16, DType::BF16];
    let mut pairs: Vec<_> = floats.into_iter().flat_map(|from| floats.map(|to| types(from, to))).collect();
    pairs.push(types(DType::Bool, DType::Bool));
    // Two dtypes of one size keep their bits in the same way.
    pairs.sort_unstable();
    pairs.dedup();
    pairs.into_iter().flat_map(|pair| AXES.map(|axes| kernel(pair, axes)))
}

/// Types of a source's and a destination's elements in the kernel.
fn types(from: DType, to: DType) -> [&'static str; 2] {
    if from == to {
        return match from.size_bytes() {
            1 => ["u8"; 2],
            2 => ["u16"; 2],
            _ => ["u32"; 2],
        };
    }
    [from, to].map(element)
}

fn kernel([source, destination]: [&str; 2], axes: usize) -> Result<Kernel, KernelError> {
    let constants = [
        constant("SOURCE", source),
        constant("DESTINATION", destination),
        constant("AXES", axes),
        constant("BLOCK_THREADS", BLOCK_THREADS),
        constant("ELEMENTS_PER_THREAD", ELEMENTS_PER_THREAD),
    ];
    let name = format!("relayout {source} to {destination} axes={axes}");
    Kernel::new(name, "relayout.cu", "relayout", &constants, BLOCK_THREADS)
}

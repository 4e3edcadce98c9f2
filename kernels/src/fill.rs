//! Fills elements with one value.

use tilefold_core::{DType, Element, Layout, TensorView};

use crate::axes::{AXES, Axes, moved};
use crate::constants::constant;
use crate::kernel::{Kernel, KernelError, Launch};
use crate::params::{FillParams, MAX_LAYOUT_AXES};

const BLOCK_THREADS: u32 = 256;
const ELEMENTS_PER_THREAD: u32 = 8;

/// The launch that writes `value` into `count` elements of `element_bytes` bytes (1, 2, 4 or 8) from `data` on.
///
/// # Errors
/// [`KernelError`].
pub fn fill(data: u64, element_bytes: u32, value: u64, count: u64) -> Result<Launch<FillParams>, KernelError> {
    let limit = i64::MAX.unsigned_abs();
    let count = i64::try_from(count).map_err(|_| KernelError::Limit { what: "elements", limit, got: count })?;
    let (mut sizes, mut strides) = ([1; MAX_LAYOUT_AXES], [0; MAX_LAYOUT_AXES]);
    (sizes[0], strides[0]) = (count, 1);
    let params = FillParams { data, value, sizes, strides, count, first_block: 0 };
    launch(Variant { element_bytes, axes: 1, serial: false }, params)
}

/// The launch that sets every element of a view to `value`, rounded to its dtype. Its origin is an address on the device.
///
/// # Errors
/// [`KernelError::Limit`] with more than [`MAX_LAYOUT_AXES`] axes that cannot be joined.
pub fn fill_view(view: &TensorView<'_>, value: f64) -> Result<Launch<FillParams>, KernelError> {
    let (dtype, layout) = (view.dtype(), view.layout());
    // An axis whose entries share a place is written once.
    let shape: Vec<usize> = layout
        .shape()
        .iter()
        .zip(layout.strides())
        .map(|(&size, &stride)| if stride == 0 { 1 } else { size })
        .collect();
    let once = Layout::new(&shape, layout.strides(), 0).unwrap_or_else(|_| layout.clone());
    let axes = Axes::new(&once, &once)?;
    let params = FillParams {
        data: moved(view.origin().addr() as u64, axes.destination_start, dtype.size_bytes()),
        value: bits(dtype, value),
        sizes: axes.sizes(),
        strides: axes.destination_strides(),
        count: axes.elements(),
        first_block: 0,
    };
    #[allow(clippy::cast_possible_truncation, reason = "at most 4")]
    let element_bytes = dtype.size_bytes() as u32;
    launch(Variant { element_bytes, axes: axes.compiled(), serial: once.overlaps_itself() }, params)
}

/// All kernels that a fill can choose.
pub(crate) fn kernels() -> impl Iterator<Item = Result<Kernel, KernelError>> {
    let variants = [1, 2, 4, 8].into_iter().flat_map(|element_bytes| {
        let parallel = AXES.map(|axes| Variant { element_bytes, axes, serial: false });
        // Elements of one axis share no place, and views have dtypes of 4 bytes at most.
        let serial = AXES.map(|axes| Variant { element_bytes, axes, serial: true });
        parallel.into_iter().chain(serial.into_iter().filter(move |variant| variant.axes > 1 && element_bytes < 8))
    });
    variants.map(Variant::kernel)
}

/// What is compiled in.
#[derive(Clone, Copy)]
struct Variant {
    element_bytes: u32,
    axes: usize,
    /// One thread writes all, in order: elements may share a place.
    serial: bool,
}

impl Variant {
    fn block_threads(self) -> u32 {
        if self.serial { 1 } else { BLOCK_THREADS }
    }

    fn kernel(self) -> Result<Kernel, KernelError> {
        let Self { element_bytes, axes, serial } = self;
        let constants = [
            constant("ELEMENT_BYTES", element_bytes),
            constant("AXES", axes),
            constant("SERIAL", serial),
            constant("BLOCK_THREADS", self.block_threads()),
            constant("ELEMENTS_PER_THREAD", ELEMENTS_PER_THREAD),
        ];
        let name = format!("fill {element_bytes} bytes axes={axes}{}", if serial { " serial" } else { "" });
        Kernel::new(name, "fill.cu", "fill", &constants, self.block_threads())
    }
}

fn launch(variant: Variant, params: FillParams) -> Result<Launch<FillParams>, KernelError> {
    let count = params.count.unsigned_abs();
    let blocks = if variant.serial { 1 } else { count.div_ceil(u64::from(BLOCK_THREADS * ELEMENTS_PER_THREAD)) };
    Ok(Launch { kernel: variant.kernel()?, blocks, params })
}

/// Bits of a number rounded to a dtype, in the low bytes.
fn bits(dtype: DType, value: f64) -> u64 {
    match dtype {
        DType::F16 => u64::from(<half::f16 as Element>::from_f64(value).to_bits()),
        DType::BF16 => u64::from(<half::bf16 as Element>::from_f64(value).to_bits()),
        DType::I32 => u64::from(i32::from_f64(value).cast_unsigned()),
        DType::Bool => u64::from(value != 0.0),
        _ => u64::from(f32::from_f64(value).to_bits()),
    }
}

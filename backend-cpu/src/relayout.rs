//! Strided copies, casts and fills.

use rayon::prelude::*;
use tilefold_core::{DType, Layout, RelayoutArgs, TensorViewMut};

use crate::attention::Row;

/// Rows of a tensor: positions of their first elements, and the last axis.
struct Rows {
    layout: Layout,
    count: usize,
    length: usize,
    stride: isize,
}

impl Rows {
    fn of(layout: &Layout) -> Self {
        let (length, stride) = match (layout.shape().last(), layout.strides().last()) {
            (Some(&length), Some(&stride)) => (length, isize::try_from(stride).unwrap_or(0)),
            _ => (1, 1),
        };
        Self { layout: layout.clone(), count: layout.len() / length, length, stride }
    }

    /// Elements from the tensor's first element to the first of row `row`.
    fn start(&self, mut row: usize) -> isize {
        let outer = self.layout.shape().len().saturating_sub(1);
        let mut position = 0_i64;
        for dim in (0..outer).rev() {
            let size = self.layout.shape()[dim];
            position += self.layout.strides()[dim] * i64::try_from(row % size).unwrap_or(0);
            row /= size;
        }
        isize::try_from(position).unwrap_or(0)
    }
}

#[derive(Clone, Copy)]
struct Address(*mut u8);

// SAFETY: an address is data; rows written through it belong to one worker each.
unsafe impl Send for Address {}
// SAFETY: as above.
unsafe impl Sync for Address {}

impl Address {
    /// Row `row` from its element `first`.
    fn piece(self, rows: &Rows, (row, first): (usize, usize), dtype: DType) -> Row {
        let position = rows.start(row).wrapping_add(rows.stride.wrapping_mul(first.cast_signed()));
        let bytes = position.wrapping_mul(dtype.size_bytes().cast_signed());
        Row { data: self.0.wrapping_offset(bytes), dtype, stride: rows.stride }
    }
}

/// Elements converted at a time: they fit the stack, and long rows are shared.
const PIECE: usize = 4096;

/// Copies source to destination element by element, rounding where the dtypes differ.
pub(crate) fn relayout(args: RelayoutArgs<'_>) {
    let (from_dtype, to_dtype) = args.dtypes();
    let (source, mut destination) = args.into_parts();
    let (from, to) = (Rows::of(source.layout()), Rows::of(destination.as_view().layout()));
    let (source, destination) = (Address(source.origin().cast_mut()), Address(destination.origin()));
    let pieces = to.length.div_ceil(PIECE);
    (0..to.count * pieces).into_par_iter().with_min_len(16).for_each(|index| {
        let (row, first) = (index / pieces, index % pieces * PIECE);
        let from = source.piece(&from, (row, first), from_dtype);
        let to_row = destination.piece(&to, (row, first), to_dtype);
        let length = PIECE.min(to.length - first);
        // SAFETY: both rows are inside their tensors, as core checked; the destination's piece belongs to this worker.
        unsafe {
            if from_dtype == to_dtype {
                copy_row(from, to_row, length);
            } else {
                let mut buffer = [0_f32; PIECE];
                from.read(length, buffer.as_mut_ptr());
                to_row.write(length, buffer.as_ptr());
            }
        }
    });
}

/// Bits are kept, NaN payloads included.
unsafe fn copy_row(from: Row, to: Row, length: usize) {
    let size = from.dtype.size_bytes();
    let step =
        |row: Row, i: usize| row.data.wrapping_offset((i.cast_signed() * row.stride).wrapping_mul(size.cast_signed()));
    // SAFETY: the caller's.
    unsafe {
        if from.stride == 1 && to.stride == 1 {
            from.data.copy_to_nonoverlapping(to.data, length * size);
            return;
        }
        for i in 0..length {
            step(from, i).copy_to_nonoverlapping(step(to, i), size);
        }
    }
}

/// Sets every element to `value`.
pub(crate) fn fill(mut destination: TensorViewMut<'_>, value: f64) {
    let (dtype, rows) = (destination.as_view().dtype(), Rows::of(destination.as_view().layout()));
    let address = Address(destination.origin());
    let mut one = [0_u8; 4];
    match dtype {
        DType::I32 => one = element::<i32>(value),
        DType::Bool => one[0] = u8::from(value != 0.0),
        DType::F16 => one = element::<half::f16>(value),
        DType::BF16 => one = element::<half::bf16>(value),
        _ => one = element::<f32>(value),
    }
    // Rows of a view that overlaps itself belong to one worker.
    let least = if destination.as_view().layout().overlaps_itself() { rows.count } else { 16 };
    (0..rows.count).into_par_iter().with_min_len(least).for_each(|row| {
        let row = address.piece(&rows, (row, 0), dtype);
        let size = dtype.size_bytes();
        for i in 0..rows.length {
            let offset = (i.cast_signed() * row.stride).wrapping_mul(size.cast_signed());
            // SAFETY: the element is inside the tensor, as core checked, and belongs to this worker.
            unsafe { row.data.wrapping_offset(offset).copy_from_nonoverlapping(one.as_ptr(), size) };
        }
    });
}

/// The bytes of a value rounded to `T`.
fn element<T: tilefold_core::Element>(value: f64) -> [u8; 4] {
    let value = T::from_f64(value);
    let mut bytes = [0; 4];
    // SAFETY: every element type has at most 4 bytes and no padding.
    unsafe { (&raw const value).cast::<u8>().copy_to_nonoverlapping(bytes.as_mut_ptr(), size_of::<T>()) };
    bytes
}

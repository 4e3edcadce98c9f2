//! Between operands of any dtype and stride and packed f32 tiles.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use tilefold_core::DType;

use super::product::Matrix;
use crate::arch::Simd;

/// A row of an operand: address of its first element and elements from one to the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) data: *mut u8,
    pub(crate) dtype: DType,
    pub(crate) stride: isize,
}

/// An element type the kernels read and write.
trait Float: Copy {
    fn to_f32(self) -> f32;
    fn from_f32(value: f32) -> Self;
    /// Widens a dense run.
    fn widen(from: &[Self], to: &mut [f32]);
    /// Rounds to a dense run.
    fn narrow(from: &[f32], to: &mut [Self]);
}

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        copy_short(from, to);
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        copy_short(from, to);
    }
}

/// Copies a row of a few vectors, for which a call of memcpy would cost more than the copy.
#[inline(always)]
fn copy_short(from: &[f32], to: &mut [f32]) {
    let (from_vectors, from_rest) = from.as_chunks::<8>();
    let (to_vectors, to_rest) = to.as_chunks_mut::<8>();
    for (to, from) in to_vectors.iter_mut().zip(from_vectors) {
        *to = *from;
    }
    for (to, from) in to_rest.iter_mut().zip(from_rest) {
        *to = *from;
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    /// Round to nearest even; branch-free, so that it vectorises.
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet_nan = (bits >> 16) | 0x40;
        let bits = if value.is_nan() { quiet_nan } else { rounded };
        #[allow(clippy::cast_possible_truncation, reason = "the upper half was shifted down")]
        Self::from_bits(bits as u16)
    }
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        from.iter().zip(to).for_each(|(&from, to)| *to = from.to_f32());
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        from.iter().zip(to).for_each(|(&from, to)| *to = Float::from_f32(from));
    }
}

impl Float for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

impl Row {
    /// Reads `count` elements as f32.
    ///
    /// # Safety
    /// The row has `count` readable elements, `to` room for as many.
    #[inline(always)]
    pub(crate) unsafe fn read(self, count: usize, to: *mut f32) {
        // SAFETY: the caller's promise, for the element type the operand has.
        unsafe {
            match self.dtype {
                DType::F32 => self.read_as::<f32>(count, to),
                DType::F16 => self.read_as::<f16>(count, to),
                _ => self.read_as::<bf16>(count, to),
            }
        }
    }

    #[inline(always)]
    unsafe fn read_as<T: Float>(self, count: usize, to: *mut f32) {
        let data = self.data.cast::<T>().cast_const();
        // SAFETY: the caller promises `count` elements on both sides.
        unsafe {
            let to = std::slice::from_raw_parts_mut(to, count);
            if self.stride == 1 {
                T::widen(std::slice::from_raw_parts(data, count), to);
            } else {
                for (i, to) in to.iter_mut().enumerate() {
                    *to = (*data.offset(i.cast_signed() * self.stride)).to_f32();
                }
            }
        }
    }

    /// Writes `count` elements, rounded to the dtype.
    ///
    /// # Safety
    /// The row has `count` writable elements that no other thread touches, `from` as many readable ones.
    #[inline(always)]
    pub(crate) unsafe fn write(self, count: usize, from: *const f32) {
        // SAFETY: the caller's promise, for the element type the operand has.
        unsafe {
            match self.dtype {
                DType::F32 => self.write_as::<f32>(count, from),
                DType::F16 => self.write_as::<f16>(count, from),
                _ => self.write_as::<bf16>(count, from),
            }
        }
    }

    #[inline(always)]
    unsafe fn write_as<T: Float>(self, count: usize, from: *const f32) {
        let data = self.data.cast::<T>();
        // SAFETY: the caller promises `count` elements on both sides.
        unsafe {
            let from = std::slice::from_raw_parts(from, count);
            if self.stride == 1 {
                T::narrow(from, std::slice::from_raw_parts_mut(data, count));
            } else {
                for (i, &from) in from.iter().enumerate() {
                    *data.offset(i.cast_signed() * self.stride) = T::from_f32(from);
                }
            }
        }
    }
}

/// Rows of an operand into a packed matrix, zero beyond `columns` and beyond the last row.
///
/// # Safety
/// `row(i)` has `columns` readable elements for `i < rows`; `to` has `padded_rows` rows of at least `columns` elements.
#[inline(always)]
pub(crate) unsafe fn pack_rows(
    (rows, padded_rows, columns): (usize, usize, usize),
    row: impl Fn(usize) -> Row,
    to: Matrix,
) {
    for i in 0..padded_rows {
        // SAFETY: row i of `to` has `stride` elements.
        unsafe {
            let filled = if i < rows { columns } else { 0 };
            if filled > 0 {
                row(i).read(filled, to.at(i, 0));
            }
            for column in filled..to.stride {
                *to.at(i, column) = 0.0;
            }
        }
    }
}

/// Rounds rows of f32 to bf16: slots are pairs of neighbours in a row.
///
/// # Safety
/// `from` has `rows` rows of `columns` elements, a multiple of 8, `to` as many of half as many slots.
#[inline(always)]
pub(crate) unsafe fn pair_columns<S: Simd>(s: S, rows: usize, columns: usize, from: Matrix, to: Matrix) {
    if !columns.is_multiple_of(S::LANES) {
        // SAFETY: the caller's.
        return unsafe { pair_columns(s.half(), rows, columns, from, to) };
    }
    for i in 0..rows {
        for j in (0..columns).step_by(S::LANES) {
            // SAFETY: LANES elements of row i on both sides.
            unsafe { s.store_bf16(to.at(i, 0).cast::<bf16>().add(j), s.load(from.at(i, j))) }
        }
    }
}

/// Rounds rows of f32 to bf16: slots are pairs of rows, the last one of an odd number with zeros.
///
/// # Safety
/// `from` has `rows` rows of `columns` elements, a multiple of 8, `to` half as many rows, rounded up.
#[inline(always)]
pub(crate) unsafe fn pair_rows<S: Simd>(s: S, rows: usize, columns: usize, from: Matrix, to: Matrix) {
    if !columns.is_multiple_of(S::LANES) {
        // SAFETY: the caller's.
        return unsafe { pair_rows(s.half(), rows, columns, from, to) };
    }
    for i in (0..rows).step_by(2) {
        for j in (0..columns).step_by(S::LANES) {
            // SAFETY: LANES elements of row i, and of the next one where there is one.
            unsafe {
                let second = if i + 1 < rows { s.load(from.at(i + 1, j)) } else { s.splat(0.0) };
                s.store(to.at(i / 2, j), s.pair(s.load(from.at(i, j)), second));
            }
        }
    }
}

/// `to[j][i] = factor · from[i][j]` for `rows × columns`, both multiples of the lanes of S or of its half.
///
/// # Safety
/// Both matrices cover the padded sizes and do not overlap.
#[inline(always)]
pub(crate) unsafe fn transpose<S: Simd>(s: S, rows: usize, columns: usize, from: Matrix, to: Matrix) {
    // SAFETY: the caller's; every block is inside both matrices.
    unsafe {
        if rows.is_multiple_of(S::LANES) && columns.is_multiple_of(S::LANES) {
            transpose_blocks(s, rows, columns, from, to);
        } else {
            transpose_blocks(s.half(), rows, columns, from, to);
        }
    }
}

#[inline(always)]
unsafe fn transpose_blocks<S: Simd>(s: S, rows: usize, columns: usize, from: Matrix, to: Matrix) {
    debug_assert!(rows.is_multiple_of(S::LANES) && columns.is_multiple_of(S::LANES));
    for i in (0..rows).step_by(S::LANES) {
        for j in (0..columns).step_by(S::LANES) {
            // SAFETY: the block is inside both matrices.
            unsafe { s.transpose(from.at(i, j), from.stride, to.at(j, i), to.stride) }
        }
    }
}

/// Multiplies a packed matrix by a factor in place.
///
/// # Safety
/// `matrix` has `rows` rows of `columns` elements.
#[inline(always)]
pub(crate) unsafe fn scale(rows: usize, columns: usize, factor: f32, matrix: Matrix) {
    for i in 0..rows {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(matrix.at(i, 0), columns) }.iter_mut().for_each(|x| *x *= factor);
    }
}

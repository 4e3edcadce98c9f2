//! Between operands of any dtype and stride and packed f32 tiles.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use tilefold_core::DType;

use super::product::Matrix;
use crate::arch::{BLOCK, Halves, Simd};

/// A row of an operand: address of its first element and elements from one to the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) data: *mut u8,
    pub(crate) dtype: DType,
    pub(crate) stride: isize,
}

/// An element type the kernels read and write.
pub(crate) trait Float: Copy + Send + Sync {
    /// Whether blocks are converted by [`Halves`]. Loops over the others are for the compiler, which makes the most of them
    /// when they are not cut into blocks.
    const BY_BLOCKS: bool = false;
    fn to_f32(self) -> f32;
    fn from_f32(value: f32) -> Self;
    /// Widens a dense run.
    fn widen(from: &[Self], to: &mut [f32]);
    /// Rounds to a dense run.
    fn narrow(from: &[f32], to: &mut [Self]);
    /// Widens a block inside [`crate::arch::Arch::vectorize`].
    #[inline(always)]
    fn widen_block(_: Halves, from: &[Self; BLOCK]) -> [f32; BLOCK] {
        from.map(Self::to_f32)
    }
    /// Rounds a block there.
    #[inline(always)]
    fn narrow_block(_: Halves, from: [f32; BLOCK]) -> [Self; BLOCK] {
        from.map(Self::from_f32)
    }
}

/// `to = f(to, from)` for dense runs of one length.
#[inline(always)]
pub(crate) fn update_dense<A: Float, B: Float>(halves: Halves, from: &[A], to: &mut [B], f: impl Fn(f32, f32) -> f32) {
    let whole = if A::BY_BLOCKS || B::BY_BLOCKS { from.len() / BLOCK * BLOCK } else { 0 };
    let (blocks, rest) = from.split_at(whole);
    let (to_blocks, to_rest) = to.split_at_mut(whole);
    for (to, from) in to_blocks.as_chunks_mut().0.iter_mut().zip(blocks.as_chunks().0) {
        let (mut sum, from) = (B::widen_block(halves, to), A::widen_block(halves, from));
        for (sum, from) in sum.iter_mut().zip(from) {
            *sum = f(*sum, from);
        }
        *to = B::narrow_block(halves, sum);
    }
    for (to, from) in to_rest.iter_mut().zip(rest) {
        *to = B::from_f32(f(to.to_f32(), from.to_f32()));
    }
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
        convert_short(from, to, |value| value);
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        convert_short(from, to, |value| value);
    }
}

/// Converts a row of a few vectors: a call of memcpy, or a loop made for many, would cost more than the work.
#[inline(always)]
fn convert_short<A: Copy, B>(from: &[A], to: &mut [B], convert: impl Fn(A) -> B) {
    let (from_vectors, from_rest) = from.as_chunks::<8>();
    let (to_vectors, to_rest) = to.as_chunks_mut::<8>();
    for (to, from) in to_vectors.iter_mut().zip(from_vectors) {
        *to = from.map(&convert);
    }
    for (to, from) in to_rest.iter_mut().zip(from_rest) {
        *to = convert(*from);
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
        convert_short(from, to, Float::to_f32);
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        convert_short(from, to, Float::from_f32);
    }
}

impl Float for f16 {
    const BY_BLOCKS: bool = true;
    /// Branch-free, so that it vectorises.
    #[inline(always)]
    fn to_f32(self) -> f32 {
        // Exponent and mantissa where those of f32 are, and the difference of the biases, 112, as an exact factor.
        let magnitude = u32::from(self.to_bits() & 0x7fff) << 13;
        let scaled = (f32::from_bits(magnitude) * f32::from_bits((112 + 127) << 23)).to_bits();
        // Infinity and NaN, which is quiet from here on.
        let quiet = if magnitude > 0x0f80_0000 { 0x40_0000 } else { 0 };
        let bits = if magnitude >= 0x0f80_0000 { magnitude | 0x7f80_0000 | quiet } else { scaled };
        f32::from_bits(bits | u32::from(self.to_bits() & 0x8000) << 16)
    }
    /// Round to nearest even; branch-free, so that it vectorises.
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        // The last bit of 2^-24 counts one of f16 in the mantissa of a sum with it.
        const HALF: f32 = 0.5;
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        let small = (f32::from_bits(magnitude) + HALF).to_bits().wrapping_sub(HALF.to_bits());
        // From 2^-14 on: a carry goes into the exponent, up to infinity.
        let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + ((magnitude >> 13) & 1)) >> 13;
        let finite = if magnitude < 0x3880_0000 { small } else { normal };
        let nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
        let special = if magnitude > 0x7f80_0000 { nan } else { 0x7c00 };
        let magnitude = if magnitude >= 0x4780_0000 { special } else { finite };
        #[allow(clippy::cast_possible_truncation, reason = "all of these have 16 bits")]
        Self::from_bits(magnitude as u16 | (bits >> 16) as u16 & 0x8000)
    }
    #[inline(always)]
    fn widen_block(halves: Halves, from: &[Self; BLOCK]) -> [f32; BLOCK] {
        halves.widen(from)
    }
    #[inline(always)]
    fn narrow_block(halves: Halves, from: [f32; BLOCK]) -> [Self; BLOCK] {
        halves.narrow(from)
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

/// Rows of an operand: the first one, and elements from one to the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) first: Row,
    pub(crate) step: isize,
}

impl Rows {
    fn row(self, i: usize) -> Row {
        let bytes = self.step_bytes().wrapping_mul(i.cast_signed());
        Row { data: self.first.data.wrapping_offset(bytes), ..self.first }
    }

    fn step_bytes(self) -> isize {
        self.step.wrapping_mul(self.first.dtype.size_bytes().cast_signed())
    }
}

/// Rows of an operand into a packed matrix, zero beyond `columns` and beyond the last row.
///
/// # Safety
/// The first `rows` rows have `columns` readable elements; `to` has `padded_rows` rows of at least `columns` elements.
#[inline(always)]
pub(crate) unsafe fn pack_rows<S: Simd>(
    s: S,
    (rows, padded_rows, columns): (usize, usize, usize),
    from: Rows,
    to: Matrix,
) {
    // SAFETY: the caller's; every row of `to` has `stride` elements.
    unsafe {
        if from.first.dtype == DType::F32 && from.first.stride == 1 && columns.is_multiple_of(COPIED_SLOTS) {
            copy_rows(s, rows, columns, from, to);
        } else if from.first.dtype == DType::BF16 && from.first.stride == 1 && columns.is_multiple_of(S::Half::LANES) {
            widen_rows(s, rows, columns, from, to);
        } else {
            for i in 0..rows {
                from.row(i).read(columns, to.at(i, 0));
            }
        }
        clear_beyond((rows, padded_rows, columns), to);
    }
}

/// Rows of a bf16 operand as slots of two neighbours, zero beyond `columns` and beyond the last row.
///
/// # Safety
/// As [`pack_rows`], with two columns in an element of `to`.
#[inline(always)]
pub(crate) unsafe fn pack_slots<S: Simd>(
    s: S,
    (rows, padded_rows, columns): (usize, usize, usize),
    from: Rows,
    to: Matrix,
) {
    debug_assert_eq!(from.first.dtype, DType::BF16);
    // SAFETY: the caller's; every row of `to` has `stride` slots.
    unsafe {
        if from.first.stride == 1 && columns.is_multiple_of(2 * COPIED_SLOTS) {
            copy_rows(s, rows, columns / 2, from, to);
        } else {
            for i in 0..rows {
                let row = from.row(i);
                if columns % 2 == 1 {
                    *to.at(i, columns / 2) = 0.0;
                }
                for j in 0..columns {
                    let value = *row.data.cast::<u16>().offset(j.cast_signed() * row.stride);
                    *to.at(i, 0).cast::<u16>().add(j) = value;
                }
            }
        }
        clear_beyond((rows, padded_rows, columns.div_ceil(2)), to);
    }
}

#[inline(always)]
unsafe fn clear_beyond((rows, padded_rows, columns): (usize, usize, usize), to: Matrix) {
    // SAFETY: the caller's.
    unsafe {
        if columns < to.stride {
            for i in 0..rows {
                to.at(i, columns).write_bytes(0, to.stride - columns);
            }
        }
        to.at(rows, 0).write_bytes(0, (padded_rows - rows) * to.stride);
    }
}

/// Dense rows are copied in pieces of so many slots, 16 bytes, or more.
const COPIED_SLOTS: usize = 4;
/// Rows read before the first one is written, so that their cache misses overlap; a tenth of forward. Read and written row
/// by row they do not, most likely since a read waits for an earlier write whose address agrees in the lower 12 bits.
const ROWS_AT_ONCE: usize = 8;

/// Copies dense rows of `slots` slots, a multiple of [`COPIED_SLOTS`].
#[inline(always)]
unsafe fn copy_rows<S: Simd>(s: S, rows: usize, slots: usize, from: Rows, to: Matrix) {
    let half = s.half();
    let mut at = 0;
    while at < slots {
        let from = |i: usize| from.row(i).data.cast::<f32>().cast_const().wrapping_add(at);
        let to = |i: usize| to.at(i, at);
        // SAFETY: so many slots are left in every row on both sides.
        unsafe {
            at += match slots - at {
                left if left >= S::LANES => {
                    copy_columns(rows, from, to, |from| s.load(from), |to, v| s.store(to, v));
                    S::LANES
                }
                left if left >= S::Half::LANES => {
                    copy_columns(rows, from, to, |from| half.load(from), |to, v| half.store(to, v));
                    S::Half::LANES
                }
                _ => {
                    let read = |from: *const f32| from.cast::<u128>().read_unaligned();
                    copy_columns(rows, from, to, read, |to, v| to.cast::<u128>().write_unaligned(v));
                    COPIED_SLOTS
                }
            };
        }
    }
}

/// Widens dense rows of `columns` bf16, a multiple of the lanes of S or of its half.
#[inline(always)]
unsafe fn widen_rows<S: Simd>(s: S, rows: usize, columns: usize, from: Rows, to: Matrix) {
    let half = s.half();
    let mut at = 0;
    while at < columns {
        let from = |i: usize| from.row(i).data.cast::<bf16>().cast_const().wrapping_add(at);
        let to = |i: usize| to.at(i, at);
        // SAFETY: so many columns are left in every row on both sides.
        unsafe {
            if columns - at >= S::LANES {
                copy_columns(rows, from, to, |from| s.load_bf16(from), |to, v| s.store(to, v));
                at += S::LANES;
            } else {
                copy_columns(rows, from, to, |from| half.load_bf16(from), |to, v| half.store(to, v));
                at += S::Half::LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn copy_columns<T, V: Copy>(
    rows: usize,
    from: impl Fn(usize) -> *const T,
    to: impl Fn(usize) -> *mut f32,
    read: impl Fn(*const T) -> V,
    write: impl Fn(*mut f32, V),
) {
    let whole = rows - rows % ROWS_AT_ONCE;
    for i in (0..whole).step_by(ROWS_AT_ONCE) {
        let block: [V; ROWS_AT_ONCE] = std::array::from_fn(|j| read(from(i + j)));
        for (j, v) in block.into_iter().enumerate() {
            write(to(i + j), v);
        }
    }
    for i in whole..rows {
        write(to(i), read(from(i)));
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

/// From slots that are pairs of neighbours in a row to slots that are pairs of rows.
///
/// # Safety
/// `from` has `rows` rows, an even number, of `columns` bf16, a multiple of 8, `to` half as many rows of `columns` slots.
#[inline(always)]
pub(crate) unsafe fn pair_rows<S: Simd>(s: S, rows: usize, columns: usize, from: Matrix, to: Matrix) {
    if !columns.is_multiple_of(S::LANES) {
        // SAFETY: the caller's.
        return unsafe { pair_rows(s.half(), rows, columns, from, to) };
    }
    debug_assert!(rows.is_multiple_of(2));
    for i in (0..rows).step_by(2) {
        for j in (0..columns).step_by(S::LANES) {
            // SAFETY: LANES elements of both rows, and of the row of slots.
            unsafe {
                let [first, second] = [i, i + 1].map(|i| from.at(i, 0).cast::<bf16>().cast_const().add(j));
                s.store(to.at(i / 2, j), s.interleave(first, second));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_of_f16_are_those_of_the_reference() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            let wide = Float::to_f32(half);
            assert!(wide.to_bits() == half.to_f32().to_bits(), "{bits:x}");
            // The number itself, the middle to the next one, and what lies beside the middle.
            let middle = f32::from_bits(wide.to_bits().wrapping_add(1 << 12));
            for shift in [0, 1, u32::MAX] {
                for near in [wide, middle].map(|x| f32::from_bits(x.to_bits().wrapping_add(shift))) {
                    let expected = f16::from_f32(near);
                    assert_eq!(<f16 as Float>::from_f32(near).to_bits(), expected.to_bits(), "{near:e}");
                }
            }
        }
        // Below the smallest normal number the spacing does not shrink.
        for units in 0..2048_u16 {
            for part in [0.25, 0.5, 0.500_001, 0.75, 1.0] {
                let x = (f32::from(units) + part) * 2_f32.powi(-24);
                assert_eq!(<f16 as Float>::from_f32(-x).to_bits(), f16::from_f32(-x).to_bits(), "{x:e}");
            }
        }
    }
}

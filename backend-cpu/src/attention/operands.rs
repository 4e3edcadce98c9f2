//! Operands as raw strided memory, and the biases sorted by how they are read.

use tilefold_core::{AttentionProblem, DType, TensorView, TensorViewMut};

use super::pack::{Row, Rows};
use crate::arch::Simd;

/// An operand of R dimensions: address of its first element and strides in elements, 0 along broadcast axes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand<const R: usize> {
    origin: *mut u8,
    pub(crate) dtype: DType,
    pub(crate) strides: [isize; R],
}

// SAFETY: an operand is only read, or written at elements that belong to one work item; every user says which.
unsafe impl<const R: usize> Send for Operand<R> {}
// SAFETY: as above.
unsafe impl<const R: usize> Sync for Operand<R> {}

impl<const R: usize> Operand<R> {
    /// An operand that is read. The shape was checked by core: R dimensions.
    pub(crate) fn read(view: &TensorView<'_>) -> Self {
        Self::new(view.origin().cast_mut(), view)
    }

    /// An operand that is written.
    pub(crate) fn write(mut view: TensorViewMut<'_>) -> Self {
        Self::new(view.origin(), view.as_view())
    }

    /// A dense f32 operand over scratch memory; strides saturate where memory is only counted.
    pub(crate) fn dense_f32(origin: *mut u8, shape: [usize; R]) -> Self {
        let mut strides = [0; R];
        let mut next = 1_isize;
        for dim in (0..R).rev() {
            strides[dim] = next;
            next = next.saturating_mul(shape[dim].cast_signed());
        }
        Self { origin, dtype: DType::F32, strides }
    }

    fn new(origin: *mut u8, view: &TensorView<'_>) -> Self {
        debug_assert_eq!(view.shape().len(), R);
        let strides = std::array::from_fn(|dim| match view.shape()[dim] {
            1 => 0,
            _ => isize::try_from(view.layout().strides()[dim]).unwrap_or(0),
        });
        Self { origin, dtype: view.dtype(), strides }
    }

    /// Address of one element; inside the operand when the index is.
    pub(crate) fn at(&self, index: [usize; R]) -> *mut u8 {
        let steps = index.into_iter().zip(self.strides);
        let elements = steps.fold(0_isize, |sum, (i, stride)| sum.wrapping_add(i.cast_signed().wrapping_mul(stride)));
        self.origin.wrapping_offset(elements.wrapping_mul(self.dtype.size_bytes().cast_signed()))
    }
}

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

const PACE_BITS: u32 = 16;

/// Rows of an operand to ask for while a product runs, a few lines with every register block: rows of one head lie far
/// apart in memory, where no hardware prefetcher follows, and many lines asked for at once wait for each other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ahead {
    origin: *const u8,
    row_bytes: isize,
    /// Byte offsets inside a row: first one, and the end.
    bytes: (usize, usize),
    /// Rows of this operand per row of the product, in units of 2^-[`PACE_BITS`].
    pace: usize,
}

impl Ahead {
    /// Nothing to ask for.
    pub(crate) const NOTHING: Self = Self { origin: std::ptr::null(), row_bytes: 0, bytes: (0, 0), pace: 0 };

    /// Rows of this operand up to row `row` of the product.
    #[inline(always)]
    fn scaled(self, row: usize) -> usize {
        (row * self.pace) >> PACE_BITS
    }

    /// Asks for the share of rows `row..row + count` of the product.
    #[inline(always)]
    pub(crate) fn fetch<S: Simd>(self, s: S, row: usize, count: usize) {
        let (begin, end) = (self.scaled(row), self.scaled(row + count));
        for i in begin..end {
            let row = self.origin.wrapping_offset(i.cast_signed() * self.row_bytes);
            let mut at = self.bytes.0;
            while at < self.bytes.1 {
                s.prefetch(row.wrapping_add(at));
                at += LINE_BYTES;
            }
        }
    }
}

impl Operand<5> {
    /// Rows along one axis and elements of a row along another, from `index`.
    #[inline(always)]
    pub(crate) fn rows(&self, index: [usize; 5], [along_rows, along_row]: [usize; 2]) -> Rows {
        let first = Row { data: self.at(index), dtype: self.dtype, stride: self.strides[along_row] };
        Rows { first, step: self.strides[along_rows] }
    }

    /// Part `part` of `parts` of `count` rows of `channels` elements along axis 2, from `index`, spread over a product of
    /// `rows` rows. Parts are cut by channels.
    #[inline(always)]
    pub(crate) fn ahead(
        &self,
        index: [usize; 5],
        (count, channels): (usize, usize),
        (part, parts): (usize, usize),
        rows: usize,
    ) -> Ahead {
        let size = self.dtype.size_bytes();
        let lines = (channels * size).div_ceil(LINE_BYTES);
        Ahead {
            origin: self.at(index).cast_const(),
            row_bytes: self.strides[2].wrapping_mul(size.cast_signed()),
            bytes: (lines * part / parts * LINE_BYTES, lines * (part + 1) / parts * LINE_BYTES),
            pace: (count << PACE_BITS).div_ceil(rows),
        }
    }
}

/// What both passes read.
#[derive(Debug)]
pub(crate) struct Inputs<'p> {
    pub(crate) problem: &'p AttentionProblem,
    pub(crate) q: Operand<5>,
    pub(crate) k: Operand<5>,
    pub(crate) v: Operand<5>,
    pub(crate) gate: Option<Operand<5>>,
    pub(crate) key_mask: Option<Operand<3>>,
    /// Segment ids of queries and of keys.
    pub(crate) segments: Option<(Operand<3>, Operand<3>)>,
    /// Biases equal for all queries: one value per key.
    pub(crate) key_biases: Vec<Operand<5>>,
    /// Biases equal for all rows: transposed once per slab and used for every row.
    pub(crate) slab_biases: Vec<Operand<5>>,
    /// Biases of their own for every row: read tile by tile.
    pub(crate) tile_biases: Vec<Operand<5>>,
}

/// The tensors that [`Inputs`] are made of.
pub(crate) struct Views<'v, 'a> {
    pub(crate) q: &'v TensorView<'a>,
    pub(crate) k: &'v TensorView<'a>,
    pub(crate) v: &'v TensorView<'a>,
    pub(crate) biases: &'v [TensorView<'a>],
    pub(crate) key_mask: Option<&'v TensorView<'a>>,
    pub(crate) q_segments: Option<&'v TensorView<'a>>,
    pub(crate) k_segments: Option<&'v TensorView<'a>>,
    pub(crate) gate: Option<&'v TensorView<'a>>,
}

impl<'p> Inputs<'p> {
    /// Sorts the biases; `slab` says whether biases that rows share go to a slab or are read tile by tile.
    pub(crate) fn new(problem: &'p AttentionProblem, views: &Views<'_, '_>, slab: bool) -> Self {
        let (mut key_biases, mut slab_biases, mut tile_biases) = (Vec::new(), Vec::new(), Vec::new());
        for bias in views.biases.iter().map(Operand::<5>::read) {
            let list = match bias.strides {
                [_, _, _, 0, _] => &mut key_biases,
                [_, 0, ..] if slab => &mut slab_biases,
                _ => &mut tile_biases,
            };
            list.push(bias);
        }
        Self {
            problem,
            q: Operand::read(views.q),
            k: Operand::read(views.k),
            v: Operand::read(views.v),
            gate: views.gate.map(Operand::read),
            key_mask: views.key_mask.map(Operand::read),
            segments: views.q_segments.zip(views.k_segments).map(|(q, k)| (Operand::read(q), Operand::read(k))),
            key_biases,
            slab_biases,
            tile_biases,
        }
    }
}

//! Shapes and strides: where element (i, j, ...) of a tensor lies.

use std::ops::Range;

use crate::ProblemError;

/// Shape, strides and offset of a tensor, counted in elements.
///
/// Strides may be 0 (broadcast) or negative (reversed). All arithmetic is 64-bit and checked: a layout that exists has an
/// element count and offsets that fit `i64`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    shape: Vec<usize>,
    strides: Vec<i64>,
    offset: i64,
}

impl Layout {
    /// A row-major layout without gaps.
    ///
    /// # Errors
    /// [`ProblemError::ZeroSize`] and [`ProblemError::Overflow`].
    pub fn contiguous(shape: &[usize]) -> Result<Self, ProblemError> {
        let mut strides = vec![0; shape.len()];
        let mut next = 1_i64;
        for (stride, &size) in strides.iter_mut().zip(shape).rev() {
            *stride = next;
            next = i64::try_from(size).ok().and_then(|size| next.checked_mul(size)).ok_or(OVERFLOW)?;
        }
        Self::new(shape, &strides, 0)
    }

    /// A layout with strides and offset given in elements.
    ///
    /// # Errors
    /// [`ProblemError::Rank`] when shape and strides differ in length, [`ProblemError::ZeroSize`],
    /// [`ProblemError::Overflow`] when an element's position does not fit `i64`.
    pub fn new(shape: &[usize], strides: &[i64], offset: i64) -> Result<Self, ProblemError> {
        if shape.len() != strides.len() {
            return Err(ProblemError::Rank { tensor: "strides", expected: shape.len(), got: strides.len() });
        }
        if let Some(dim) = shape.iter().position(|&size| size == 0) {
            return Err(ProblemError::ZeroSize { tensor: "layout", dimension: dimension_name(dim) });
        }
        let layout = Self { shape: shape.to_vec(), strides: strides.to_vec(), offset };
        layout.checked_extent().ok_or(OVERFLOW)?;
        Ok(layout)
    }

    /// Sizes of the dimensions.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Elements from one index to the next, for each dimension.
    #[must_use]
    pub fn strides(&self) -> &[i64] {
        &self.strides
    }

    /// Position of element (0, 0, ...).
    #[must_use]
    pub fn offset(&self) -> i64 {
        self.offset
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements; never, since a dimension of 0 is refused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Lowest position and one past the highest position of any element.
    #[must_use]
    pub fn extent(&self) -> Range<i64> {
        self.checked_extent().unwrap_or(i64::MIN..i64::MAX)
    }

    fn checked_extent(&self) -> Option<Range<i64>> {
        let (mut low, mut high, mut count) = (self.offset, self.offset, 1_i64);
        for (&size, &stride) in self.shape.iter().zip(&self.strides) {
            let size = i64::try_from(size).ok()?;
            count = count.checked_mul(size)?;
            let span = size.checked_sub(1)?.checked_mul(stride)?;
            low = low.checked_add(span.min(0))?;
            high = high.checked_add(span.max(0))?;
        }
        Some(low..high.checked_add(1)?)
    }

    /// Position of the element at `index`; dimensions of size 1 and stride 0 accept what they hold.
    #[must_use]
    pub fn position(&self, index: &[usize]) -> Option<i64> {
        if index.len() != self.shape.len() || index.iter().zip(&self.shape).any(|(i, size)| i >= size) {
            return None;
        }
        // Index 0 of a dimension of size 1 may have any stride; positions of elements fit, whatever the sums on the way.
        let steps = index.iter().zip(&self.strides);
        let step = |(&i, stride): (&usize, &i64)| i64::try_from(i).unwrap_or(i64::MAX).wrapping_mul(*stride);
        Some(steps.map(step).fold(self.offset, i64::wrapping_add))
    }

    /// Positions of all elements in row-major order of their indices.
    pub fn positions(&self) -> impl Iterator<Item = i64> + '_ {
        let mut index = vec![0_usize; self.shape.len()];
        let mut position = self.offset;
        (0..self.len()).map(move |_| {
            let current = position;
            for dim in (0..index.len()).rev() {
                let (size, stride) = (self.shape[dim], self.strides[dim]);
                index[dim] += 1;
                // Wraps on the way past the last element only.
                position = position.wrapping_add(stride);
                if index[dim] < size {
                    break;
                }
                position = position.wrapping_sub(stride.wrapping_mul(i64::try_from(size).unwrap_or(i64::MAX)));
                index[dim] = 0;
            }
            current
        })
    }

    /// Whether the elements lie row-major without gaps.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1_i64;
        self.shape.iter().zip(&self.strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected *= i64::try_from(size).unwrap_or(i64::MAX);
            fits
        })
    }

    /// Whether two different indices may lie at the same position.
    ///
    /// Exact for layouts made by slicing, permuting, flipping and broadcasting a dense tensor; other interleavings may be
    /// reported as overlapping although they are not.
    #[must_use]
    pub fn overlaps_itself(&self) -> bool {
        let mut steps: Vec<(i64, i64)> = (self.shape.iter().zip(&self.strides))
            .filter(|&(&size, _)| size > 1)
            .map(|(&size, &stride)| (stride.saturating_abs(), i64::try_from(size - 1).unwrap_or(i64::MAX)))
            .collect();
        steps.sort_unstable();
        let mut reach = 0_i64;
        steps.iter().any(|&(stride, count)| {
            let overlaps = stride <= reach;
            reach = reach.saturating_add(stride.saturating_mul(count));
            overlaps
        })
    }

    /// Whether an element of `self` may lie at the position of an element of `other`, both in units of the same element
    /// size and from the same base.
    ///
    /// Ranges that do not meet are disjoint; so are views that interleave in one buffer with a common period, as q, k and
    /// v packed in one tensor do. Anything else that meets counts as overlapping.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let (a, b) = (self.extent(), other.extent());
        if a.end <= b.start || b.end <= a.start {
            return false;
        }
        let periods = self.strides.iter().chain(&other.strides).map(|stride| stride.saturating_abs());
        !periods.filter(|&period| period > 1).any(|period| match (self.window(period), other.window(period)) {
            (Some(a), Some(b)) => {
                let shift = (b.start - a.start).rem_euclid(period);
                shift >= a.end - a.start && shift + (b.end - b.start) <= period
            }
            _ => false,
        })
    }

    /// The positions modulo `period` as one window, if every other stride is a multiple of the period.
    fn window(&self, period: i64) -> Option<Range<i64>> {
        let (mut low, mut high) = (self.offset, self.offset);
        for (&size, &stride) in self.shape.iter().zip(&self.strides) {
            if size > 1 && stride % period != 0 {
                let span = i64::try_from(size - 1).ok()?.checked_mul(stride)?;
                low = low.checked_add(span.min(0))?;
                high = high.checked_add(span.max(0))?;
            }
        }
        (high.checked_sub(low)? < period).then_some(low..high.checked_add(1)?)
    }

    /// Dimensions reordered: dimension `i` of the result is dimension `order[i]`.
    ///
    /// # Errors
    /// [`ProblemError::Length`] when `order` is not a permutation.
    pub fn permute(&self, order: &[usize]) -> Result<Self, ProblemError> {
        let mut seen = order.to_vec();
        seen.sort_unstable();
        if !seen.iter().copied().eq(0..self.shape.len()) {
            let expected = format!("a permutation of 0..{}", self.shape.len());
            return Err(ProblemError::Length { list: "order", expected, got: order.len() });
        }
        Ok(Self {
            shape: order.iter().map(|&dim| self.shape[dim]).collect(),
            strides: order.iter().map(|&dim| self.strides[dim]).collect(),
            offset: self.offset,
        })
    }

    /// Indices `range` of dimension `dim`, every `step`-th; a negative step walks from the end of the range.
    ///
    /// # Errors
    /// [`ProblemError::Limit`] for a range or dimension that is not there, [`ProblemError::ZeroSize`] for an empty one.
    pub fn slice(&self, dim: usize, range: Range<usize>, step: i64) -> Result<Self, ProblemError> {
        let size = *self.shape.get(dim).ok_or(ProblemError::Limit {
            what: "slice dimension",
            limit: self.shape.len().saturating_sub(1),
            got: dim,
        })?;
        if range.end > size {
            return Err(ProblemError::Limit { what: "slice end", limit: size, got: range.end });
        }
        if range.is_empty() || step == 0 {
            return Err(ProblemError::ZeroSize { tensor: "slice", dimension: "range or step" });
        }
        let stride = self.strides[dim];
        let first = if step > 0 { range.start } else { range.end - 1 };
        let first = i64::try_from(first).map_err(|_| OVERFLOW)?;
        let mut shape = self.shape.clone();
        let mut strides = self.strides.clone();
        let stride_by = usize::try_from(step.unsigned_abs()).map_err(|_| OVERFLOW)?;
        shape[dim] = range.len().div_ceil(stride_by);
        strides[dim] = stride.checked_mul(step).ok_or(OVERFLOW)?;
        let offset = first.checked_mul(stride).and_then(|shift| shift.checked_add(self.offset)).ok_or(OVERFLOW)?;
        Self::new(&shape, &strides, offset)
    }

    /// A new dimension of size 1 in front of dimension `dim`.
    ///
    /// # Errors
    /// [`ProblemError::Limit`] when `dim` is above the number of dimensions.
    pub fn unsqueeze(&self, dim: usize) -> Result<Self, ProblemError> {
        if dim > self.shape.len() {
            return Err(ProblemError::Limit { what: "new dimension", limit: self.shape.len(), got: dim });
        }
        let mut layout = self.clone();
        layout.shape.insert(dim, 1);
        layout.strides.insert(dim, 0);
        Ok(layout)
    }

    /// Dimensions of size 1 repeated (with stride 0) to `shape`.
    ///
    /// # Errors
    /// [`ProblemError::Rank`], [`ProblemError::NotBroadcastable`], [`ProblemError::ZeroSize`], [`ProblemError::Overflow`].
    pub fn expand(&self, shape: &[usize]) -> Result<Self, ProblemError> {
        if shape.len() != self.shape.len() {
            return Err(ProblemError::Rank { tensor: "expand", expected: self.shape.len(), got: shape.len() });
        }
        let mut strides = self.strides.clone();
        for (dim, (&own, &full)) in self.shape.iter().zip(shape).enumerate() {
            if own == 1 && full != 1 {
                strides[dim] = 0;
            } else if own != full {
                let (tensor, dimension) = ("expand", dimension_name(dim));
                return Err(ProblemError::NotBroadcastable { tensor, dimension, expected: full, got: own });
            }
        }
        Self::new(shape, &strides, self.offset)
    }
}

/// What errors call a dimension of a tensor that has no axes by name.
pub(crate) fn dimension_name(dim: usize) -> &'static str {
    const NAMES: [&str; 8] = [
        "dimension 0",
        "dimension 1",
        "dimension 2",
        "dimension 3",
        "dimension 4",
        "dimension 5",
        "dimension 6",
        "dimension 7",
    ];
    NAMES.get(dim).copied().unwrap_or("a dimension above 7")
}

const OVERFLOW: ProblemError = ProblemError::Overflow { tensor: "layout", quantity: "size or offset" };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_follow_strides() {
        let layout = Layout::contiguous(&[2, 3]).unwrap();
        assert_eq!(layout.strides(), [3, 1]);
        let turned = layout.permute(&[1, 0]).unwrap().slice(0, 0..3, -1).unwrap();
        assert_eq!(turned.positions().collect::<Vec<_>>(), [2, 5, 1, 4, 0, 3]);
        assert_eq!(turned.position(&[2, 1]), Some(3));
        assert_eq!(turned.extent(), 0..6);
        assert!(layout.is_contiguous() && !turned.is_contiguous());
    }

    #[test]
    fn overlap_is_told_from_interleaving() {
        let packed = Layout::contiguous(&[4, 3, 8]).unwrap(); // q, k and v of 8 channels side by side
        let part = |i: usize| packed.slice(1, i..i + 1, 1).unwrap();
        assert!(!part(0).overlaps(&part(2)) && !part(2).overlaps(&part(1)));
        assert!(part(1).overlaps(&part(1)));
        assert!(packed.overlaps(&part(2)));
        assert!(!part(0).overlaps_itself());
        assert!(Layout::new(&[4, 2], &[0, 1], 0).unwrap().overlaps_itself());
        assert!(Layout::new(&[4, 3], &[2, 1], 0).unwrap().overlaps_itself());
    }

    #[test]
    fn extreme_strides_neither_overflow_nor_matter() {
        let one = Layout::new(&[1, 2], &[i64::MIN, 1], 0).unwrap();
        assert_eq!(one.positions().collect::<Vec<_>>(), [0, 1]);
        assert_eq!(one.position(&[0, 1]), Some(1));
        assert!(!one.overlaps_itself() && one.overlaps(&one));
        let far = Layout::new(&[2], &[i64::MIN], 0).unwrap();
        assert_eq!(far.positions().collect::<Vec<_>>(), [0, i64::MIN]);
        assert!(!far.overlaps_itself() && far.overlaps(&one));
        let end = Layout::new(&[2], &[i64::MAX - 1], 0).unwrap();
        assert_eq!(end.positions().last(), Some(i64::MAX - 1));
    }

    #[test]
    fn errors_number_the_dimension() {
        let zero = Layout::contiguous(&[2, 0]).unwrap_err();
        assert_eq!(zero, ProblemError::ZeroSize { tensor: "layout", dimension: "dimension 1" });
        let error = Layout::contiguous(&[2, 3]).unwrap().expand(&[2, 4]).unwrap_err();
        assert!(matches!(error, ProblemError::NotBroadcastable { dimension: "dimension 1", expected: 4, got: 3, .. }));
    }

    #[test]
    fn overflow_is_an_error() {
        let huge = usize::try_from(i64::MAX / 2).unwrap();
        assert_eq!(Layout::contiguous(&[huge, 3]), Err(OVERFLOW));
        assert!(Layout::new(&[3], &[i64::MAX], 0).is_err());
        assert!(Layout::contiguous(&[2, 0]).is_err());
    }
}

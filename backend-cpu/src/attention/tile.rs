//! The additive part of a tile of logits: biases, ALiBi and masks, in base 2 and transposed to `[key][query]`.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use tilefold_core::attention::Cover;

use super::operands::{Inputs, Operand};
use super::pack::{Row, pack_rows, pack_slots, transpose};
use super::product::{Matrix, TileBias};
use super::workspace::Carver;
use crate::arch::Simd;

/// Finite biases saturate here (in base 2, on both sides): a sum of five stays finite, and lse, carried to 48 bits,
/// still tells how many keys share such a bias.
const LARGEST_BIAS: f32 = 8_589_934_592.0; // 2^33

/// One attention: batch, row, head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position {
    pub(crate) batch: usize,
    pub(crate) row: usize,
    pub(crate) head: usize,
}

/// Memory for the additive part of one tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileScratch {
    /// One value per key.
    keys: *mut f32,
    /// `[query][key]`, as biases are stored.
    rows: Matrix,
    /// `[key][query]`, one bias.
    turned: Matrix,
    /// `[key][query]`, the sum.
    sum: Matrix,
}

impl TileScratch {
    pub(crate) fn carve(carver: &mut Carver, tile_q: usize, tile_k: usize) -> Self {
        Self {
            keys: carver.floats(tile_k),
            rows: carver.matrix(tile_q, tile_k),
            turned: carver.matrix(tile_k, tile_q),
            sum: carver.matrix(tile_k, tile_q),
        }
    }
}

impl Inputs<'_> {
    /// Keys or values of one (batch, row, key head), packed in what products take: f32, or with `PAIRS` slots of two
    /// channels, in an even number of rows. A key that the bool mask excludes becomes 0, so that what stands there, NaN
    /// included, has no influence.
    ///
    /// # Safety
    /// The keys exist and have so many channels, and the matrix has room for them.
    #[inline(always)]
    pub(crate) unsafe fn pack_keys<S: Simd>(
        &self,
        s: S,
        operand: &Operand<5>,
        (batch, row, head): (usize, usize, usize),
        k: &Range<usize>,
        channels: usize,
        to: Matrix,
    ) {
        let rows = operand.rows([batch, row, k.start, head, 0], [2, 4]);
        // SAFETY: the caller's.
        unsafe {
            if S::PAIRS {
                pack_slots(s, (k.len(), k.len().next_multiple_of(2), channels), rows, to);
            } else {
                pack_rows(s, (k.len(), k.len(), channels), rows, to);
            }
        }
        let Some(mask) = &self.key_mask else { return };
        for i in 0..k.len() {
            // SAFETY: one byte inside the mask, and row i of the matrix.
            unsafe {
                if *mask.at([batch, row, k.start + i]) == 0 {
                    clear_tile(Matrix { data: to.at(i, 0), ..to }, 1, to.stride);
                }
            }
        }
    }

    /// The value per key of `k` (padded to `padded`): key biases, key mask, kv lengths. `None` when every key is excluded.
    ///
    /// # Safety
    /// The scratch has room for `padded` keys; the ranges are inside the problem.
    #[inline(always)]
    pub(crate) unsafe fn key_values(
        &self,
        at: Position,
        k: &Range<usize>,
        padded: usize,
        scratch: &TileScratch,
    ) -> Option<*const f32> {
        // SAFETY: room for `padded` values; `rows` is free here and holds one value per key in its first row.
        let (keys, read) = unsafe {
            (
                std::slice::from_raw_parts_mut(scratch.keys, padded),
                std::slice::from_raw_parts_mut(scratch.rows.data, k.len()),
            )
        };
        keys.fill(0.0);
        for bias in &self.key_biases {
            let data = bias.at([at.batch, at.row, at.head, 0, k.start]);
            // SAFETY: the bias has all keys of `k`.
            unsafe { Row { data, dtype: bias.dtype, stride: bias.strides[4] }.read(k.len(), read.as_mut_ptr()) };
            keys.iter_mut().zip(read.iter()).for_each(|(key, bias)| *key += base2(*bias));
        }
        if let Some(mask) = &self.key_mask {
            for (i, key) in keys.iter_mut().enumerate().take(k.len()) {
                // SAFETY: one byte inside the mask.
                if unsafe { *mask.at([at.batch, at.row, k.start + i]) } == 0 {
                    *key = f32::NEG_INFINITY;
                }
            }
        }
        let length = self.problem.kv_length(at.batch, at.row).saturating_sub(k.start).min(k.len());
        keys[length..].fill(f32::NEG_INFINITY);
        keys.iter().any(|&key| key != f32::NEG_INFINITY).then_some(scratch.keys.cast_const())
    }

    /// The additive part of the tile `q × k`, or `None` when no pair is visible. `slab` is the tile's share of what all
    /// rows have in common, `keys` what [`Inputs::key_values`] gave.
    ///
    /// # Safety
    /// The scratch covers the tile padded to whole vectors; `slab` as well; the ranges are inside the problem.
    #[inline(always)]
    pub(crate) unsafe fn tile_bias<S: Simd>(
        &self,
        s: S,
        at: Position,
        (q, k): (&Range<usize>, &Range<usize>),
        slab: Option<Matrix>,
        keys: *const f32,
        scratch: &TileScratch,
    ) -> Option<TileBias> {
        let mask = &self.problem.spec().mask;
        let structure = mask.cover(q, k);
        let segments = self.segments.map_or(Cover::Full, |segments| {
            // SAFETY: the ranges are inside the problem.
            unsafe { segment_cover(segments, at, q, k) }
        });
        if structure == Cover::Empty || segments == Cover::Empty {
            return None;
        }
        let alibi = mask.alibi_slopes.is_some() && slab.is_none();
        let partial = structure == Cover::Partial || segments == Cover::Partial;
        if self.tile_biases.is_empty() && !alibi && !partial {
            return Some(TileBias { keys, tile: slab });
        }
        // SAFETY: scratch and slab cover the tile.
        unsafe {
            let sum = scratch.sum;
            match slab {
                Some(slab) => copy_tile(slab, sum, k.len(), sum.stride),
                None => clear_tile(sum, k.len(), sum.stride),
            }
            for bias in &self.tile_biases {
                add_bias(s, bias, at, q, k, scratch, sum);
            }
            if alibi {
                self.add_alibi(at.head, q, k, sum);
            }
            if structure == Cover::Partial {
                self.exclude_by_position(q, k, sum);
            }
            if let (Some(segments), Cover::Partial) = (self.segments, segments) {
                exclude_other_segments(segments, at, q, k, sum);
            }
            Some(TileBias { keys, tile: Some(sum) })
        }
    }

    /// What all rows have in common for the tile `q × k`, into `slab`.
    ///
    /// # Safety
    /// `slab` and the scratch cover the tile padded to whole vectors; the ranges are inside the problem.
    #[inline(always)]
    pub(crate) unsafe fn slab_tile<S: Simd>(
        &self,
        s: S,
        at: Position,
        (q, k): (&Range<usize>, &Range<usize>),
        scratch: &TileScratch,
        slab: Matrix,
    ) {
        // SAFETY: the caller's.
        unsafe {
            clear_tile(slab, k.len(), slab.stride);
            for bias in &self.slab_biases {
                add_bias(s, bias, at, q, k, scratch, slab);
            }
            if self.problem.spec().mask.alibi_slopes.is_some() {
                self.add_alibi(at.head, q, k, slab);
            }
        }
    }

    /// `sum[k][q] -= slope · |distance|`
    #[inline(always)]
    unsafe fn add_alibi(&self, head: usize, q: &Range<usize>, k: &Range<usize>, sum: Matrix) {
        let mask = &self.problem.spec().mask;
        let slope = mask.alibi_slopes.as_ref().map_or(0.0, |slopes| base2(slopes[head]));
        for j in 0..k.len() {
            // SAFETY: row j of the tile has a value for every query.
            let row = unsafe { std::slice::from_raw_parts_mut(sum.at(j, 0), q.len()) };
            let first = mask.distance(q.start, k.start + j);
            for (i, value) in row.iter_mut().enumerate() {
                #[allow(clippy::cast_precision_loss, reason = "exact up to 2^24 positions, correctly rounded beyond")]
                let distance = first.saturating_sub(i.cast_signed() as i64).unsigned_abs() as f32;
                *value -= (slope * distance).clamp(-LARGEST_BIAS, LARGEST_BIAS);
            }
        }
    }

    /// -inf where causality or the window hides the key.
    #[inline(always)]
    unsafe fn exclude_by_position(&self, q: &Range<usize>, k: &Range<usize>, sum: Matrix) {
        let mask = &self.problem.spec().mask;
        let (low, high) = mask.visible_distances();
        for j in 0..k.len() {
            // SAFETY: row j of the tile has a value for every query.
            let row = unsafe { std::slice::from_raw_parts_mut(sum.at(j, 0), q.len()) };
            // The distance falls by 1 from query to query.
            let first = mask.distance(q.start, k.start + j);
            let index = |steps: i64| usize::try_from(steps.max(0)).map_or(q.len(), |steps| steps.min(q.len()));
            let begin = index(first.saturating_sub(high));
            let end = index(first.saturating_sub(low).saturating_add(1)).max(begin);
            row[..begin].fill(f32::NEG_INFINITY);
            row[end..].fill(f32::NEG_INFINITY);
        }
    }
}

/// A bias in base 2; finite values stay finite.
#[inline(always)]
fn base2(bias: f32) -> f32 {
    // NaN and infinities pass.
    if bias.is_finite() { (bias * LOG2_E).clamp(-LARGEST_BIAS, LARGEST_BIAS) } else { bias }
}

#[inline(always)]
unsafe fn clear_tile(tile: Matrix, rows: usize, columns: usize) {
    for j in 0..rows {
        // SAFETY: row j has `columns` elements.
        unsafe { tile.at(j, 0).write_bytes(0, columns) }
    }
}

#[inline(always)]
unsafe fn copy_tile(from: Matrix, to: Matrix, rows: usize, columns: usize) {
    for j in 0..rows {
        // SAFETY: row j of both has `columns` elements, and they are different memory.
        unsafe { to.at(j, 0).copy_from_nonoverlapping(from.at(j, 0), columns) }
    }
}

/// `sum[k][q] += base2(bias[q][k])`
#[inline(always)]
unsafe fn add_bias<S: Simd>(
    s: S,
    bias: &Operand<5>,
    at: Position,
    q: &Range<usize>,
    k: &Range<usize>,
    scratch: &TileScratch,
    sum: Matrix,
) {
    let [.., q_stride, k_stride] = bias.strides;
    let first = [at.batch, at.row, at.head, q.start, k.start];
    // SAFETY: the tile is inside the bias, and the scratch covers it.
    unsafe {
        if k_stride == 0 || q_stride.abs() < k_stride.abs() {
            // Stored along the queries already.
            pack_rows(s, (k.len(), k.len(), q.len()), bias.rows(first, [4, 3]), scratch.turned);
        } else {
            let rows = Matrix { stride: k.len().next_multiple_of(S::LANES), ..scratch.rows };
            let padded = q.len().next_multiple_of(S::LANES);
            pack_rows(s, (q.len(), padded, k.len()), bias.rows(first, [3, 4]), rows);
            transpose(s, padded, rows.stride, rows, scratch.turned);
        }
        for j in 0..k.len() {
            let from = std::slice::from_raw_parts(scratch.turned.at(j, 0), q.len());
            let to = std::slice::from_raw_parts_mut(sum.at(j, 0), q.len());
            to.iter_mut().zip(from).for_each(|(sum, &bias)| *sum += base2(bias));
        }
    }
}

unsafe fn segment(ids: Operand<3>, at: Position, index: usize) -> i32 {
    // SAFETY: the index is inside the operand, whose dtype core checked.
    unsafe { ids.at([at.batch, at.row, index]).cast::<i32>().read() }
}

/// How far equal segments cover the tile.
unsafe fn segment_cover(
    (q_ids, k_ids): (Operand<3>, Operand<3>),
    at: Position,
    q: &Range<usize>,
    k: &Range<usize>,
) -> Cover {
    let range = |ids, range: &Range<usize>| {
        // SAFETY: the range is inside the operand.
        range
            .clone()
            .map(|i| unsafe { segment(ids, at, i) })
            .fold((i32::MAX, i32::MIN), |(low, high), id| (low.min(id), high.max(id)))
    };
    let (q, k) = (range(q_ids, q), range(k_ids, k));
    if q.1 < k.0 || k.1 < q.0 {
        Cover::Empty
    } else if q.0 == q.1 && q == k {
        Cover::Full
    } else {
        Cover::Partial
    }
}

unsafe fn exclude_other_segments(
    (q_ids, k_ids): (Operand<3>, Operand<3>),
    at: Position,
    q: &Range<usize>,
    k: &Range<usize>,
    sum: Matrix,
) {
    for j in 0..k.len() {
        // SAFETY: the tile is inside the operands and inside `sum`.
        unsafe {
            let id = segment(k_ids, at, k.start + j);
            for i in 0..q.len() {
                if segment(q_ids, at, q.start + i) != id {
                    *sum.at(j, i) = f32::NEG_INFINITY;
                }
            }
        }
    }
}

//! Gradients of biases: dS summed over the axes a bias broadcasts over (equation (15)), always in a fixed order.
//!
//! Three ways, by the bias's shape:
//! * equal for all queries or all keys: sums per row and head, made by the main pass, added up here;
//! * a matrix per batch and head that rows share: summed by the main pass, which owns a head and goes through the rows;
//! * any other matrix: a pass of its own, in which an owner of a part of the bias goes through all that share it.

use std::ops::Range;

use tilefold_core::{AttentionSpec, BiasSpec, DeviceResult};

use super::backward::{Backward, Part, Wants};
use super::forward::{Item, key_tiles};
use super::operands::Operand;
use super::pack::{Row, transpose};
use super::product::Matrix;
use super::schedule::part;
use super::share;
use super::workspace::{Carver, Lease};
use crate::arch::Simd;

/// How a bias's gradient is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reduction {
    /// From sums over the queries.
    Queries,
    /// From sums over the keys.
    Keys,
    /// By the main pass, over rows.
    Rows,
    /// By a pass of its own.
    Owner,
}

impl Reduction {
    pub(crate) fn of(bias: &BiasSpec, spec: &AttentionSpec) -> Self {
        match bias.shape {
            [_, _, _, _, 1] => Self::Keys,
            [_, _, _, 1, _] => Self::Queries,
            [batch, 1, heads, _, _] if batch == spec.batch && heads == spec.heads => Self::Rows,
            _ => Self::Owner,
        }
    }
}

/// The indices that share index `i` of an axis of size `own` and full size `full`.
fn sharing(own: usize, full: usize, i: usize) -> Range<usize> {
    if own == full { i..i + 1 } else { 0..full }
}

/// How many (batch, row, head) a bias has.
fn owners(bias: &BiasSpec) -> usize {
    bias.shape[..3].iter().product()
}

/// One (batch, row, head) of a bias.
fn owner(bias: &BiasSpec, index: usize) -> [usize; 3] {
    let [_, rows, heads, ..] = bias.shape;
    [index / heads / rows, index / heads % rows, index % heads]
}

/// Writes a bias equal for all queries or all keys from the main pass's `sums` of shape
/// `[chunks · batch, rows, heads, length]`.
pub(crate) fn reduce_sums(
    sums: &Operand<4>,
    (chunks, length): (usize, usize),
    (spec, workers): (&AttentionSpec, usize),
    bias: &BiasSpec,
    to: &Operand<5>,
) -> DeviceResult<()> {
    let along_queries = bias.shape[3] != 1;
    let kept = bias.shape[3].max(bias.shape[4]);
    share::for_each(workers, owners(bias), |index| {
        let [b, n, h] = owner(bias, index);
        let mut total = vec![0_f64; kept];
        for chunk in 0..chunks {
            for batch in sharing(bias.shape[0], spec.batch, b) {
                for row in sharing(bias.shape[1], spec.rows, n) {
                    for head in sharing(bias.shape[2], spec.heads, h) {
                        let data = sums.at([chunk * spec.batch + batch, row, head, 0]).cast::<f32>().cast_const();
                        // SAFETY: the sums are dense along their last axis, of this length, and complete.
                        let data = unsafe { std::slice::from_raw_parts(data, length) };
                        if kept == 1 {
                            total[0] += data.iter().copied().map(f64::from).sum::<f64>();
                        } else {
                            total.iter_mut().zip(data).for_each(|(total, &value)| *total += f64::from(value));
                        }
                    }
                }
            }
        }
        for (i, total) in total.into_iter().enumerate() {
            let (q, k) = if along_queries { (i, 0) } else { (0, i) };
            let row = Row { data: to.at([b, n, h, q, k]), dtype: to.dtype, stride: 1 };
            #[allow(clippy::cast_possible_truncation, reason = "rounding a sum to the gradient's type")]
            // SAFETY: one element of the gradient, which this owner alone writes.
            unsafe {
                row.write(1, &(total as f32));
            }
        }
        Ok(())
    })
}

/// Writes one tile `[key][query]` of a gradient, keys `0..seqlen_k`.
///
/// # Safety
/// `from` has a row per key; `turned` has room for a tile; the elements written belong to the caller.
pub(crate) unsafe fn write_tile<S: Simd>(
    s: S,
    owner: [usize; 3],
    q: &Range<usize>,
    (seqlen_k, tile_k): (usize, usize),
    from: Matrix,
    turned: Matrix,
    to: &Operand<5>,
) {
    let [b, n, h] = owner;
    let [.., q_stride, k_stride] = to.strides;
    if q_stride.abs() < k_stride.abs() {
        for key in 0..seqlen_k {
            let row = Row { data: to.at([b, n, h, q.start, key]), dtype: to.dtype, stride: q_stride };
            // SAFETY: row `key` of the tile has a value for every query.
            s.vectorize(
                #[inline(always)]
                || unsafe { row.write(q.len(), from.at(key, 0)) },
            );
        }
        return;
    }
    for k in key_tiles(seqlen_k, tile_k) {
        // SAFETY: slabs are padded to whole key tiles, `turned` holds one.
        s.vectorize(
            #[inline(always)]
            || unsafe {
                let part = Matrix { data: from.at(k.start, 0), ..from };
                let padded = (k.len().next_multiple_of(S::LANES), q.len().next_multiple_of(S::LANES));
                transpose(s, padded.0, padded.1, part, turned);
                for i in 0..q.len() {
                    let data = to.at([b, n, h, q.start + i, k.start]);
                    Row { data, dtype: to.dtype, stride: k_stride }.write(k.len(), turned.at(i, 0));
                }
            },
        );
    }
}

/// What the pass of its own computes for one owner.
const OWNER_WANTS: Wants = Wants { row: false, bias_sum: true };

/// A pass of its own for one bias: `backward` has the shape of its items and no slab.
pub(crate) fn owner_pass<S: Simd>(
    s: S,
    backward: &Backward<'_>,
    bias: &BiasSpec,
    to: &Operand<5>,
    lease: &Lease<'_>,
    bytes: usize,
) -> DeviceResult<()> {
    let spec = backward.inputs.problem.spec();
    let group = backward.inputs.problem.group();
    let parts = spec.seqlen_q.div_ceil(backward.shape.item_q);
    share::for_each(backward.workers, owners(bias) * parts, |index| {
        let owner = owner(bias, index / parts);
        let [b, n, h] = owner;
        let queries = part(index % parts, backward.shape.item_q, spec.seqlen_q);
        lease.with(bytes, |leased| {
            let scratch = backward.scratch::<S>(&mut Carver::over(&mut leased.block), OWNER_WANTS);
            let mut part = Part { heads: 0..1, queries, chunk: 0, first: true, last: true };

            let rows = sharing(bias.shape[1], spec.rows, n);
            let mut item = Item { batch: b, kv_heads: 0..1, rows, queries: part.queries.clone() };
            backward.clear_bias_sum(&item, &part, &scratch);
            for batch in sharing(bias.shape[0], spec.batch, b) {
                for head in sharing(bias.shape[2], spec.heads, h) {
                    part.heads = head % group..head % group + 1;
                    (item.batch, item.kv_heads) = (batch, head / group..head / group + 1);
                    for row in item.rows.clone() {
                        backward.run_row(s, &item, &part, (row, head / group), &scratch, OWNER_WANTS);
                    }
                }
            }
            let Some(sum) = scratch.bias_sum else { return };
            for tile in 0..backward.tiles(&part) {
                let q = backward.tile_range(&part, tile);
                let from = backward.slab_at(sum, tile, 0);
                let keys = (spec.seqlen_k, backward.shape.tile_k);
                // SAFETY: the sum is complete, and this owner alone writes its part of the gradient.
                unsafe { write_tile(s, owner, &q, keys, from, scratch.turned, to) };
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use tilefold_core::DType;

    use super::*;

    #[test]
    fn every_broadcast_pattern_has_a_reduction() {
        let spec = AttentionSpec::new(DType::F32, 2, 3, 5, 4, 8);
        let full = [2, 3, 4, 5, 5];
        for pattern in 0..32 {
            let shape = std::array::from_fn(|axis| if pattern >> axis & 1 == 1 { 1 } else { full[axis] });
            let bias = BiasSpec { shape, dtype: DType::F32 };
            let expected = match (shape[3] == 1, shape[4] == 1) {
                (_, true) => Reduction::Keys,
                (true, false) => Reduction::Queries,
                _ if shape[0] == 2 && shape[1] == 1 && shape[2] == 4 => Reduction::Rows,
                _ => Reduction::Owner,
            };
            assert_eq!(Reduction::of(&bias, &spec), expected, "{shape:?}");
            let all: Vec<_> = (0..owners(&bias)).map(|index| owner(&bias, index)).collect();
            assert_eq!(all.len(), shape[0] * shape[1] * shape[2]);
            assert!(all.is_sorted() && all.last() == Some(&[shape[0] - 1, shape[1] - 1, shape[2] - 1]), "{all:?}");
        }
    }
}

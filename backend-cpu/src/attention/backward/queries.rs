//! The queries of one tile in backward: Q and dO in the forms that products take, delta, lse, gate; dQ at the end.

use std::ops::Range;

use tilefold_core::EmptyRows;

use super::super::forward::{padded_channels, padded_slots, scale_base2, sigmoid};
use super::super::operands::Operand;
use super::super::pack::{Row, pack_rows, pack_slots, pair_columns, pair_rows, scale, transpose};
use super::super::product::{Matrix, rows_of_twos, wants_twos};
use super::super::tile::Position;
use super::{Backward, Scratch, Wants, scale_f32};
use crate::arch::Simd;

#[derive(Clone, Copy)]
pub(super) struct QueryTile {
    /// What products take of Q and dO, summed over queries, and over channels.
    pub(super) q: Matrix,
    pub(super) q_turned: Matrix,
    pub(super) d_out: Matrix,
    pub(super) d_out_turned: Matrix,
    pub(super) dq_turned: Matrix,
    pub(super) lse: *mut f32,
    pub(super) lse_low: *mut f32,
    pub(super) delta: *mut f32,
    /// Sum of dS over the keys.
    pub(super) query_sum: *mut f32,
}

/// Whether products take rows of f32 as they are.
pub(super) fn takes_rows<S: Simd>(channels: usize) -> bool {
    !S::PAIRS && !wants_twos::<S>(channels)
}

impl Scratch {
    /// Where rows of f32 are packed that products take as `to`: there, unless they take another form.
    fn rows_of<S: Simd>(&self, to: Matrix, channels: usize) -> Matrix {
        if takes_rows::<S>(channels) { to } else { Matrix { data: self.wide.data, stride: channels } }
    }

    /// With `PAIRS`, `lanes` rows of f32 as slots.
    #[inline(always)]
    unsafe fn narrow<S: Simd>(&self, s: S, lanes: usize, rows: Matrix) -> Matrix {
        if !S::PAIRS {
            return rows;
        }
        let narrow = Matrix { stride: padded_slots::<S>(rows.stride), ..self.narrow };
        // SAFETY: the caller's; the matrix was carved for a tile.
        unsafe { pair_columns(s, lanes, rows.stride, rows, narrow) };
        narrow
    }

    /// What products take of `lanes` rows, summed over rows and, turned, over channels.
    #[inline(always)]
    unsafe fn turn<S: Simd>(&self, s: S, lanes: usize, rows: Matrix, (by_row, turned): (Matrix, Matrix)) {
        let channels = by_row.stride;
        // SAFETY: the caller's; the matrices were carved for a tile.
        unsafe {
            transpose(s, lanes, rows.stride, rows, turned);
            if !S::PAIRS {
                if wants_twos::<S>(channels) {
                    rows_of_twos(lanes, channels, rows, by_row);
                }
            } else if wants_twos::<S>(channels) {
                let paired = Matrix { data: self.wide.data, stride: channels };
                pair_rows(s, lanes, channels, rows, paired);
                rows_of_twos(lanes / 2, channels, paired, by_row);
            } else {
                pair_rows(s, lanes, channels, rows, by_row);
            }
        }
    }
}

impl Backward<'_> {
    #[inline(always)]
    pub(super) unsafe fn start_tile<S: Simd>(
        &self,
        s: S,
        at: Position,
        q: &Range<usize>,
        scratch: &Scratch,
        tile: QueryTile,
        wants: Wants,
    ) {
        let spec = self.inputs.problem.spec();
        let (channels, channels_v) = (padded_channels(spec.head_dim), padded_channels(spec.head_dim_v));
        let lanes = q.len().next_multiple_of(S::LANES);
        // SAFETY: all queries of `q` exist; the matrices were carved for a tile.
        unsafe {
            let first = [at.batch, at.row, q.start, at.head, 0];
            let from = self.inputs.q.rows(first, [2, 4]);
            let rows = if S::PAIRS {
                Matrix { stride: padded_slots::<S>(channels), ..scratch.narrow }
            } else {
                scratch.rows_of::<S>(tile.q, channels)
            };
            if S::PAIRS {
                pack_slots(s, (q.len(), lanes, spec.head_dim), from, rows);
            } else {
                pack_rows(s, (q.len(), lanes, spec.head_dim), from, rows);
            }
            scratch.turn(s, lanes, rows, (tile.q, tile.q_turned));
            if !S::PAIRS {
                scale(channels, lanes, scale_base2(&self.inputs), tile.q_turned);
            }
            let d_out = scratch.rows_of::<S>(tile.d_out, channels_v);
            pack_rows(s, (q.len(), lanes, spec.head_dim_v), self.d_out.rows(first, [2, 4]), d_out);
            let out = Matrix { stride: channels_v, ..scratch.out };
            pack_rows(s, (q.len(), lanes, spec.head_dim_v), self.out.rows(first, [2, 4]), out);
            row_products(s, (lanes, channels_v), d_out, out, scratch.products, tile.delta);
            if let Some(gate) = &self.inputs.gate {
                let d_gate = self.d_gate.filter(|_| wants.row);
                self.open_gate(s, (first, q.len()), (gate, d_gate.as_ref()), (d_out, out), scratch.rows);
            }
            for i in 0..self.shape.tile_q {
                let exists = i < q.len();
                let index = [at.batch, at.row, at.head, q.start + i];
                let (lse, low) = if exists { self.lse_base2(index) } else { (f32::INFINITY, 0.0) };
                if exists && lse == f32::INFINITY && spec.empty_rows == EmptyRows::Uniform {
                    self.add_uniform(d_out.at(i, 0), scratch.uniform);
                }
                *tile.lse.add(i) = lse;
                *tile.lse_low.add(i) = low;
                *tile.query_sum.add(i) = 0.0;
            }
            let rows = scratch.narrow(s, lanes, d_out);
            scratch.turn(s, lanes, rows, (tile.d_out, tile.d_out_turned));
            tile.dq_turned.data.write_bytes(0, channels * tile.dq_turned.stride);
        }
    }

    /// The gradient of the gate, and dO times the open gate in place of dO, for `count` queries from `first`.
    #[inline(always)]
    unsafe fn open_gate<S: Simd>(
        &self,
        s: S,
        (first, count): ([usize; 5], usize),
        (gate, d_gate): (&Operand<5>, Option<&Operand<5>>),
        (d_out, out): (Matrix, Matrix),
        [gate_row, d_gate_row]: [*mut f32; 2],
    ) {
        let [b, n, query, h, _] = first;
        let channels = self.inputs.problem.spec().head_dim_v;
        // SAFETY: the rows were carved for the channels; the elements written belong to this item.
        unsafe {
            gate_row.write_bytes(0, padded_channels(channels));
            for i in 0..count {
                let row = |operand: &Operand<5>| operand.rows([b, n, query + i, h, 0], [2, 4]).first;
                row(gate).read(channels, gate_row);
                gate_gradient(s.half(), padded_channels(channels), gate_row, out.at(i, 0), d_out.at(i, 0), d_gate_row);
                if let Some(operand) = d_gate {
                    row(operand).write(channels, d_gate_row);
                }
            }
        }
    }

    /// lse in base 2, in two parts; +inf for a row without keys, so that its probabilities are 0.
    unsafe fn lse_base2(&self, index: [usize; 4]) -> (f32, f32) {
        // SAFETY: f32 elements inside both operands.
        let (lse, low) =
            unsafe { (self.lse.at(index).cast::<f32>().read(), self.lse_low.at(index).cast::<f32>().read()) };
        if lse == f32::NEG_INFINITY {
            return (f32::INFINITY, 0.0);
        }
        let exact = (f64::from(lse) + f64::from(low)) * std::f64::consts::LOG2_E;
        #[allow(clippy::cast_possible_truncation, reason = "the split into two f32 is the point")]
        let (high, rest) = (exact as f32, (exact - f64::from(exact as f32)) as f32);
        (high, if high.is_finite() { rest } else { 0.0 })
    }

    /// A row without keys gives every v its share of dO.
    unsafe fn add_uniform(&self, d_out: *const f32, uniform: *mut f32) {
        let spec = self.inputs.problem.spec();
        #[allow(clippy::cast_precision_loss, reason = "a length as a factor")]
        let share = 1.0 / spec.seqlen_k as f32;
        for channel in 0..spec.head_dim_v {
            // SAFETY: both have the channels of v.
            unsafe { *uniform.add(channel) += *d_out.add(channel) * share };
        }
    }

    /// Turns dQᵀ and writes it; writes the sums of dS over the keys.
    #[inline(always)]
    pub(super) unsafe fn finish_tile<S: Simd>(
        &self,
        s: S,
        at: Position,
        q: &Range<usize>,
        scratch: &Scratch,
        tile: QueryTile,
    ) {
        let spec = self.inputs.problem.spec();
        let channels = padded_channels(spec.head_dim);
        // SAFETY: the tile's matrices were carved for it; every written element belongs to this item.
        unsafe {
            if let Some(dq) = self.dq {
                let lanes = q.len().next_multiple_of(S::LANES);
                // Q itself is no longer needed.
                let rows = scratch.rows_of::<S>(tile.q, channels);
                transpose(s, channels, lanes, tile.dq_turned, rows);
                scale(q.len(), channels, scale_f32(&self.inputs), rows);
                for i in 0..q.len() {
                    let data = dq.at([at.batch, at.row, q.start + i, at.head, 0]);
                    Row { data, dtype: dq.dtype, stride: dq.strides[4] }.write(spec.head_dim, rows.at(i, 0));
                }
            }
            if let Some(sums) = self.query_sums {
                for i in 0..q.len() {
                    *sums.at([at.batch, at.row, at.head, q.start + i]).cast::<f32>() = *tile.query_sum.add(i);
                }
            }
        }
    }
}

/// The inner products of the rows of two matrices with whole half vectors, `rows` of them, a multiple of the lanes.
#[inline(always)]
unsafe fn row_products<S: Simd>(
    s: S,
    (rows, columns): (usize, usize),
    a: Matrix,
    b: Matrix,
    products: [Matrix; 2],
    to: *mut f32,
) {
    let [sums, turned] = products;
    for first in (0..rows).step_by(S::LANES) {
        // SAFETY: LANES rows on all sides; the matrices of sums have LANES rows of LANES.
        unsafe {
            for i in 0..S::LANES {
                lane_products(s, columns, a.at(first + i, 0), b.at(first + i, 0), sums.at(i, 0));
            }
            s.transpose(sums.data, sums.stride, turned.data, turned.stride);
            let mut total = s.load(turned.data);
            for i in 1..S::LANES {
                total = s.add(total, s.load(turned.at(i, 0)));
            }
            s.store(to.add(first), total);
        }
    }
}

/// Products of two rows, added up lane by lane.
#[inline(always)]
unsafe fn lane_products<S: Simd>(s: S, columns: usize, a: *const f32, b: *const f32, to: *mut f32) {
    let half = s.half();
    let mut sum = s.splat(0.0);
    let whole = columns - columns % S::LANES;
    // SAFETY: both rows have `columns` elements, whole half vectors.
    unsafe {
        for at in (0..whole).step_by(S::LANES) {
            sum = s.fma(s.load(a.add(at)), s.load(b.add(at)), sum);
        }
        s.store(to, sum);
        if whole < columns {
            let rest = half.fma(half.load(a.add(whole)), half.load(b.add(whole)), half.load(to));
            half.store(to, rest);
        }
    }
}

/// `d_gate = d_out ⊙ out ⊙ (1 - sigmoid)`, then `d_out ⊙= sigmoid`: out already has the gate in it (equations (16) and (7)).
#[inline(always)]
unsafe fn gate_gradient<S: Simd>(
    s: S,
    channels: usize,
    gate: *const f32,
    out: *const f32,
    d_out: *mut f32,
    d_gate: *mut f32,
) {
    for at in (0..channels).step_by(S::LANES) {
        // SAFETY: all rows have `channels` elements, a multiple of the lanes.
        unsafe {
            let open = sigmoid(s, s.load(gate.add(at)));
            // 1 - sigmoid(x) = sigmoid(-x), without cancellation.
            let closed = sigmoid(s, s.sub(s.splat(0.0), s.load(gate.add(at))));
            let d = s.load(d_out.add(at));
            s.store(d_gate.add(at), s.mul(s.mul(d, s.load(out.add(at))), closed));
            s.store(d_out.add(at), s.mul(d, open));
        }
    }
}

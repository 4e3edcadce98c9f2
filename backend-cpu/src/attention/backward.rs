//! Backward pass of one work item: probabilities recomputed tile by tile, five products (equations (7)-(16)).
//!
//! ```text
//! for row in rows of the item
//!     for query tile of every head      pack Q, Qᵀ, dO, dOᵀ; delta; gate and its gradient
//!     for key tile                       pack K, V
//!         for head of the group, query tile
//!             Pᵀ = exp2(bias + K Qᵀ - lse)
//!             dSᵀ = Pᵀ ⊙ (V dOᵀ - delta)          bias sum += dSᵀ, in the order of the rows
//!             dV += Pᵀ dO,  dK += dSᵀ Q,  dQᵀ += Kᵀ dSᵀ
//!         write dK, dV
//!     write dQ
//! ```
//! One thread owns an item and adds in this order, so that the sums are the same bits whatever the number of threads.

use std::ops::Range;

use tilefold_core::attention::Cover;
use tilefold_core::{AttentionProblem, EmptyRows};

use super::forward::{Item, ItemShape, key_tiles, padded_channels, scale_base2, sigmoid};
use super::operands::{Inputs, Operand};
use super::pack::{Row, pack_rows, scale, transpose};
use super::product::{Accumulate, Matrix, Probabilities, ScoreGradients, product};
use super::tile::{Position, TileScratch};
use super::workspace::Carver;
use crate::arch::Simd;

/// What the backward pass reads and writes.
#[derive(Debug)]
pub(crate) struct Backward<'p> {
    pub(crate) inputs: Inputs<'p>,
    pub(crate) out: Operand<5>,
    pub(crate) d_out: Operand<5>,
    pub(crate) lse: Operand<4>,
    pub(crate) lse_low: Operand<4>,
    pub(crate) dq: Option<Operand<5>>,
    pub(crate) dk: Option<Operand<5>>,
    pub(crate) dv: Option<Operand<5>>,
    pub(crate) d_gate: Option<Operand<5>>,
    /// Sums of dS over the queries, f32 `[chunk · batch, rows, heads, seqlen_k]`, for biases equal for all queries.
    pub(crate) key_sums: Option<Operand<4>>,
    /// Sums of dS over the keys, f32 `[batch, rows, heads, seqlen_q]`, for biases equal for all keys.
    pub(crate) query_sums: Option<Operand<4>>,
    /// Where dK and dV are summed when an item does not see all queries at once.
    pub(crate) key_partials: KeyPartials,
    pub(crate) shape: ItemShape,
}

/// dK and dV in f32, `[chunk · batch, rows, seqlen_k, kv_heads, channels]`, unscaled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyPartials {
    pub(crate) dk: Option<Operand<5>>,
    pub(crate) dv: Option<Operand<5>>,
}

/// Which results of a row the caller wants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wants {
    /// Everything of the row itself: dq, dk, dv, d_gate and the vector sums; otherwise the bias sum alone.
    pub(crate) row: bool,
    /// The sum of dS over rows.
    pub(crate) bias_sum: bool,
}

/// Scratch memory of one item.
pub(crate) struct Scratch {
    /// What rows share, `[tile of every head][key][query]`.
    slab: Option<Matrix>,
    /// Sum of dS over rows, in the same order.
    pub(crate) bias_sum: Option<Matrix>,
    tiles: Vec<QueryTile>,
    keys: Matrix,
    values: Matrix,
    dk: Matrix,
    dv: Matrix,
    probabilities: Matrix,
    gradients: Matrix,
    key_sum: *mut f32,
    /// Gradient that rows without keys give every v.
    uniform: *mut f32,
    rows: [*mut f32; 3],
    pub(crate) bias: TileScratch,
    /// `[query][key]`, for turning a bias gradient.
    pub(crate) turned: Matrix,
}

#[derive(Clone, Copy)]
struct QueryTile {
    q: Matrix,
    q_turned: Matrix,
    d_out: Matrix,
    d_out_turned: Matrix,
    dq_turned: Matrix,
    lse: *mut f32,
    lse_low: *mut f32,
    delta: *mut f32,
    /// Sum of dS over the keys.
    query_sum: *mut f32,
}

impl Scratch {
    fn carve(carver: &mut Carver, problem: &AttentionProblem, shape: ItemShape, wants: Wants) -> Self {
        let spec = problem.spec();
        let (channels, channels_v) = (padded_channels(spec.head_dim), padded_channels(spec.head_dim_v));
        let group = if wants.row { problem.group() } else { 1 };
        let tiles = group * shape.item_q / shape.tile_q;
        let keys = spec.seqlen_k.next_multiple_of(shape.tile_k);
        let queries = shape.tile_q;
        Self {
            slab: shape.slab.then(|| carver.matrix(shape.heads * tiles * keys, queries)),
            bias_sum: wants.bias_sum.then(|| carver.matrix(shape.heads * tiles * keys, queries)),
            tiles: (0..tiles)
                .map(|_| QueryTile {
                    q: carver.matrix(queries, channels),
                    q_turned: carver.matrix(channels, queries),
                    d_out: carver.matrix(queries, channels_v),
                    d_out_turned: carver.matrix(channels_v, queries),
                    dq_turned: carver.matrix(channels, queries),
                    lse: carver.floats(queries),
                    lse_low: carver.floats(queries),
                    delta: carver.floats(queries),
                    query_sum: carver.floats(queries),
                })
                .collect(),
            keys: carver.matrix(shape.tile_k, channels),
            values: carver.matrix(shape.tile_k, channels_v),
            dk: carver.matrix(shape.tile_k, channels),
            dv: carver.matrix(shape.tile_k, channels_v),
            probabilities: carver.matrix(shape.tile_k, queries),
            gradients: carver.matrix(shape.tile_k, queries),
            key_sum: carver.floats(shape.tile_k),
            uniform: carver.floats(channels_v),
            rows: std::array::from_fn(|_| carver.floats(channels.max(channels_v))),
            bias: TileScratch::carve(carver, queries, shape.tile_k),
            turned: carver.matrix(queries, shape.tile_k),
        }
    }
}

/// Bytes one item needs.
pub(crate) fn scratch_bytes(problem: &AttentionProblem, shape: ItemShape, wants: Wants) -> usize {
    let mut carver = Carver::counting();
    Scratch::carve(&mut carver, problem, shape, wants);
    carver.bytes()
}

/// Heads of one key head, and which part of the queries an item computes.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// Heads of the group.
    pub(crate) heads: Range<usize>,
    /// Queries, at most `item_q`.
    pub(crate) queries: Range<usize>,
    /// Number of the chunk of queries, for partial sums.
    pub(crate) chunk: usize,
}

impl Backward<'_> {
    /// Scratch of an item, cut from a block of [`scratch_bytes`].
    pub(crate) fn scratch(&self, carver: &mut Carver, wants: Wants) -> Scratch {
        Scratch::carve(carver, self.inputs.problem, self.shape, wants)
    }

    /// Rows of one item for a part of the queries; the bias sum starts at 0.
    pub(crate) fn run<S: Simd>(&self, s: S, item: &Item, part: &Part, scratch: &Scratch, wants: Wants) {
        self.clear_bias_sum(item, part, scratch);
        self.build_slab(s, item, part, scratch);
        for row in item.rows.clone() {
            for kv_head in item.kv_heads.clone() {
                self.run_row(s, item, part, (row, kv_head), scratch, wants);
            }
        }
    }

    /// Sets the sum of dS over rows to 0.
    pub(crate) fn clear_bias_sum(&self, item: &Item, part: &Part, scratch: &Scratch) {
        if let Some(sum) = scratch.bias_sum {
            let tiles = item.kv_heads.len() * part.heads.len() * self.tiles(part);
            // SAFETY: the sum was carved with a matrix per tile.
            unsafe { sum.data.write_bytes(0, tiles * self.padded_keys() * sum.stride) };
        }
    }

    /// Keys of a slab: whole tiles.
    pub(crate) fn padded_keys(&self) -> usize {
        self.inputs.problem.spec().seqlen_k.next_multiple_of(self.shape.tile_k)
    }

    /// Query tiles of a part, per head.
    pub(crate) fn tiles(&self, part: &Part) -> usize {
        part.queries.len().div_ceil(self.shape.tile_q)
    }

    /// Queries of a tile.
    pub(crate) fn tile_range(&self, part: &Part, tile: usize) -> Range<usize> {
        let start = part.queries.start + tile * self.shape.tile_q;
        start..(start + self.shape.tile_q).min(part.queries.end)
    }

    /// The part of a slab for tile `index` (of all heads) and keys from `key`.
    pub(crate) fn slab_at(&self, slab: Matrix, index: usize, key: usize) -> Matrix {
        Matrix { data: slab.at(index * self.padded_keys() + key, 0), ..slab }
    }

    fn build_slab<S: Simd>(&self, s: S, item: &Item, part: &Part, scratch: &Scratch) {
        let Some(slab) = scratch.slab else { return };
        let tiles = self.tiles(part);
        for index in 0..item.kv_heads.len() * part.heads.len() * tiles {
            let (kv_head, head) =
                (index / tiles / part.heads.len(), part.heads.start + index / tiles % part.heads.len());
            let head = (item.kv_heads.start + kv_head) * self.inputs.problem.group() + head;
            let at = Position { batch: item.batch, row: item.rows.start, head };
            let q = self.tile_range(part, index % tiles);
            for k in key_tiles(self.inputs.problem.spec().seqlen_k, self.shape.tile_k) {
                let to = self.slab_at(slab, index, k.start);
                // SAFETY: the slab and the scratch were carved for these tiles.
                s.vectorize(
                    #[inline(always)]
                    || unsafe { self.inputs.slab_tile(s, at, (&q, &k), &scratch.bias, to) },
                );
            }
        }
    }

    /// One row of one key head; adds to the bias sum.
    pub(crate) fn run_row<S: Simd>(
        &self,
        s: S,
        item: &Item,
        part: &Part,
        (row, kv_head): (usize, usize),
        scratch: &Scratch,
        wants: Wants,
    ) {
        let (spec, tiles) = (self.inputs.problem.spec(), self.tiles(part));
        let first = kv_head * self.inputs.problem.group() + part.heads.start;
        let position = |head: usize| Position { batch: item.batch, row, head: first + head };
        // SAFETY: carved for the channels of v.
        unsafe { scratch.uniform.write_bytes(0, padded_channels(spec.head_dim_v)) };
        for index in 0..part.heads.len() * tiles {
            let at = position(index / tiles);
            let q = self.tile_range(part, index % tiles);
            // SAFETY: the tile's matrices were carved for it.
            s.vectorize(
                #[inline(always)]
                || unsafe { self.start_tile(s, at, &q, scratch, scratch.tiles[index], wants) },
            );
        }
        let length = self.inputs.problem.kv_length(item.batch, row);
        for k in key_tiles(spec.seqlen_k, self.shape.tile_k) {
            if wants.row {
                self.start_keys(&k, scratch);
            }
            let counted = k.start..k.end.min(length);
            if !counted.is_empty() && spec.mask.cover(&part.queries, &counted) != Cover::Empty {
                self.run_keys(s, item, part, (row, kv_head), &counted, scratch, wants);
            }
            if wants.row {
                // SAFETY: the key tile was carved; its elements belong to this item.
                s.vectorize(
                    #[inline(always)]
                    || unsafe { self.finish_keys(item.batch, part, (row, kv_head), &k, scratch) },
                );
            }
        }
        if wants.row {
            for index in 0..part.heads.len() * tiles {
                let at = position(index / tiles);
                let q = self.tile_range(part, index % tiles);
                // SAFETY: the tile was carved and computed; its elements belong to this item.
                s.vectorize(
                    #[inline(always)]
                    || unsafe { self.finish_tile(s, at, &q, scratch.tiles[index]) },
                );
            }
        }
    }

    /// Asks for a part of what the next row or head reads, while this one computes.
    #[inline(always)]
    fn prefetch_next<S: Simd>(&self, s: S, item: &Item, part: &Part, at: (usize, usize), step: (usize, usize)) {
        let spec = self.inputs.problem.spec();
        let Some((row, kv_head)) = item.after(at) else { return };
        for (operand, channels) in [(self.inputs.k, spec.head_dim), (self.inputs.v, spec.head_dim_v)] {
            operand.prefetch(s, [item.batch, row, 0, kv_head, 0], (spec.seqlen_k, channels), step);
        }
        let head = kv_head * self.inputs.problem.group() + part.heads.start;
        let of_queries = [(self.inputs.q, spec.head_dim), (self.out, spec.head_dim_v), (self.d_out, spec.head_dim_v)];
        for (operand, channels) in of_queries {
            let at = [item.batch, row, part.queries.start, head, 0];
            operand.prefetch(s, at, (part.queries.len(), channels), step);
        }
    }

    #[inline(always)]
    unsafe fn start_tile<S: Simd>(
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
        let row = |operand: &Operand<5>, i: usize| Row {
            data: operand.at([at.batch, at.row, q.start + i, at.head, 0]),
            dtype: operand.dtype,
            stride: operand.strides[4],
        };
        // SAFETY: all queries of `q` exist; the matrices were carved for a tile.
        unsafe {
            pack_rows((q.len(), lanes, spec.head_dim), |i| row(&self.inputs.q, i), tile.q);
            transpose(s, lanes, channels, tile.q, tile.q_turned);
            scale(channels, lanes, scale_base2(&self.inputs), tile.q_turned);
            pack_rows((q.len(), lanes, spec.head_dim_v), |i| row(&self.d_out, i), tile.d_out);
            let [out, gate, d_gate] = scratch.rows;
            out.write_bytes(0, channels_v);
            gate.write_bytes(0, channels_v);
            for i in 0..self.shape.tile_q {
                let exists = i < q.len();
                if exists {
                    row(&self.out, i).read(spec.head_dim_v, out);
                    *tile.delta.add(i) = dot(s.half(), channels_v, tile.d_out.at(i, 0), out);
                    if let Some(operand) = &self.inputs.gate {
                        row(operand, i).read(spec.head_dim_v, gate);
                        gate_gradient(s.half(), channels_v, gate, out, tile.d_out.at(i, 0), d_gate);
                        if let (Some(operand), true) = (&self.d_gate, wants.row) {
                            row(operand, i).write(spec.head_dim_v, d_gate);
                        }
                    }
                } else {
                    *tile.delta.add(i) = 0.0;
                }
                let index = [at.batch, at.row, at.head, q.start + i];
                let (lse, low) = if exists { self.lse_base2(index) } else { (f32::INFINITY, 0.0) };
                if exists && lse == f32::INFINITY && spec.empty_rows == EmptyRows::Uniform {
                    self.add_uniform(tile.d_out.at(i, 0), scratch.uniform);
                }
                *tile.lse.add(i) = lse;
                *tile.lse_low.add(i) = low;
                *tile.query_sum.add(i) = 0.0;
            }
            transpose(s, lanes, channels_v, tile.d_out, tile.d_out_turned);
            tile.dq_turned.data.write_bytes(0, channels * tile.dq_turned.stride);
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

    fn start_keys(&self, k: &Range<usize>, scratch: &Scratch) {
        // SAFETY: carved for a key tile; `uniform` has a row's channels.
        unsafe {
            scratch.dk.data.write_bytes(0, k.len() * scratch.dk.stride);
            for j in 0..k.len() {
                scratch.dv.at(j, 0).copy_from_nonoverlapping(scratch.uniform, scratch.dv.stride);
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "where in the problem, and what for")]
    fn run_keys<S: Simd>(
        &self,
        s: S,
        item: &Item,
        part: &Part,
        (row, kv_head): (usize, usize),
        k: &Range<usize>,
        scratch: &Scratch,
        wants: Wants,
    ) {
        let (spec, tiles) = (self.inputs.problem.spec(), self.tiles(part));
        let to = (scratch.keys, scratch.values);
        // SAFETY: the matrices were carved for a key tile.
        s.vectorize(
            #[inline(always)]
            || unsafe { self.inputs.pack_keys((item.batch, row, kv_head), k, to) },
        );
        let slab_start = (kv_head - item.kv_heads.start) * part.heads.len() * tiles;
        for head in 0..part.heads.len() {
            let at = Position {
                batch: item.batch,
                row,
                head: kv_head * self.inputs.problem.group() + part.heads.start + head,
            };
            // SAFETY: the scratch has room for a key tile.
            let keys = unsafe { self.inputs.key_values(at, k, k.len(), &scratch.bias) };
            let Some(keys) = keys else { continue };
            // SAFETY: carved for a key tile.
            unsafe { scratch.key_sum.write_bytes(0, k.len()) };
            for tile in 0..tiles {
                let q = self.tile_range(part, tile);
                let all = part.heads.len() * tiles;
                let step = k.start / self.shape.tile_k * all + head * tiles + tile;
                self.prefetch_next(s, item, part, (row, kv_head), (step, self.padded_keys() / self.shape.tile_k * all));
                self.run_tile(s, at, (&q, k), keys, (head * tiles + tile, slab_start), scratch, wants);
            }
            if let (Some(sums), true) = (&self.key_sums, wants.row) {
                let batch = part.chunk * spec.batch + at.batch;
                for j in 0..k.len() {
                    // SAFETY: an f32 element of this item alone.
                    unsafe {
                        *sums.at([batch, at.row, at.head, k.start + j]).cast::<f32>() += *scratch.key_sum.add(j);
                    }
                }
            }
        }
    }

    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "where in the problem, and what for")]
    fn run_tile<S: Simd>(
        &self,
        s: S,
        at: Position,
        (q, k): (&Range<usize>, &Range<usize>),
        keys: *const f32,
        (index, slab_start): (usize, usize),
        scratch: &Scratch,
        wants: Wants,
    ) {
        let spec = self.inputs.problem.spec();
        let tile = scratch.tiles[index];
        let slab = scratch.slab.map(|slab| self.slab_at(slab, slab_start + index, k.start));
        // SAFETY: the scratch covers the tile.
        let bias = s.vectorize(
            #[inline(always)]
            || unsafe { self.inputs.tile_bias(s, at, (q, k), slab, keys, &scratch.bias) },
        );
        let Some(bias) = bias else { return };
        let vectors = q.len().div_ceil(S::LANES);
        let (p, ds) = (scratch.probabilities, scratch.gradients);
        let bias_sum = scratch.bias_sum.map(|sum| self.slab_at(sum, slab_start + index, k.start));
        let d_scores = wants.bias_sum
            || self.dq.is_some()
            || self.dk.is_some()
            || self.key_sums.is_some()
            || self.query_sums.is_some();
        // The phases are separate functions: inlined into one body they would spill registers.
        // SAFETY: every matrix was carved for a tile, and holds what the phase before wrote.
        unsafe {
            let mut phase = Probabilities { bias, lse: tile.lse, lse_low: tile.lse_low, probabilities: p };
            let shape = (k.len(), vectors, spec.head_dim);
            s.vectorize(
                #[inline(always)]
                || product::<S, _, false>(s, shape, scratch.keys, tile.q_turned, &mut phase),
            );
            if d_scores {
                let mut phase = ScoreGradients { delta: tile.delta, probabilities: p, gradients: ds, bias_sum };
                let shape = (k.len(), vectors, spec.head_dim_v);
                s.vectorize(
                    #[inline(always)]
                    || product::<S, _, false>(s, shape, scratch.values, tile.d_out_turned, &mut phase),
                );
            }
            if !wants.row {
                return;
            }
            if self.dv.is_some() {
                outer(s, (k.len(), q.len()), p, tile.d_out, scratch.dv);
            }
            if self.dk.is_some() {
                outer(s, (k.len(), q.len()), ds, tile.q, scratch.dk);
            }
            if self.dq.is_some() {
                let mut phase = Accumulate { c: tile.dq_turned };
                let shape = (spec.head_dim, vectors, k.len());
                s.vectorize(
                    #[inline(always)]
                    || product::<S, _, true>(s, shape, scratch.keys, ds, &mut phase),
                );
            }
            if self.key_sums.is_some() || self.query_sums.is_some() {
                s.vectorize(
                    #[inline(always)]
                    || sums(s, k.len(), vectors, ds, scratch.key_sum, tile.query_sum),
                );
            }
        }
    }

    /// Writes dK and dV of a key tile, or adds them to the partial sums.
    #[inline(always)]
    unsafe fn finish_keys(
        &self,
        batch: usize,
        part: &Part,
        (row, kv_head): (usize, usize),
        k: &Range<usize>,
        scratch: &Scratch,
    ) {
        let spec = self.inputs.problem.spec();
        let softmax_scale = scale_f32(&self.inputs);
        let pairs = [
            (self.dk, self.key_partials.dk, scratch.dk, spec.head_dim, softmax_scale),
            (self.dv, self.key_partials.dv, scratch.dv, spec.head_dim_v, 1.0),
        ];
        for (operand, partial, from, channels, factor) in pairs {
            let Some(operand) = operand else { continue };
            for j in 0..k.len() {
                // SAFETY: the tile has row j; the elements written belong to this item.
                unsafe {
                    let values = std::slice::from_raw_parts_mut(from.at(j, 0), channels);
                    if let Some(partial) = partial {
                        let chunk = part.chunk * spec.batch + batch;
                        let to = partial.at([chunk, row, k.start + j, kv_head, 0]).cast::<f32>();
                        let to = std::slice::from_raw_parts_mut(to, channels);
                        to.iter_mut().zip(values).for_each(|(to, value)| *to += *value);
                        continue;
                    }
                    values.iter_mut().for_each(|value| *value *= factor);
                    let data = operand.at([batch, row, k.start + j, kv_head, 0]);
                    Row { data, dtype: operand.dtype, stride: operand.strides[4] }.write(channels, from.at(j, 0));
                }
            }
        }
    }

    /// Turns dQᵀ and writes it; writes the sums of dS over the keys.
    #[inline(always)]
    unsafe fn finish_tile<S: Simd>(&self, s: S, at: Position, q: &Range<usize>, tile: QueryTile) {
        let spec = self.inputs.problem.spec();
        let channels = padded_channels(spec.head_dim);
        // SAFETY: the tile's matrices were carved for it; every written element belongs to this item.
        unsafe {
            if let Some(dq) = self.dq {
                let lanes = q.len().next_multiple_of(S::LANES);
                // Q itself is no longer needed.
                transpose(s, channels, lanes, tile.dq_turned, tile.q);
                scale(q.len(), channels, scale_f32(&self.inputs), tile.q);
                for i in 0..q.len() {
                    let data = dq.at([at.batch, at.row, q.start + i, at.head, 0]);
                    Row { data, dtype: dq.dtype, stride: dq.strides[4] }.write(spec.head_dim, tile.q.at(i, 0));
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

/// The softmax scale in f32.
#[allow(clippy::cast_possible_truncation, reason = "kernels compute in f32")]
pub(crate) fn scale_f32(inputs: &Inputs<'_>) -> f32 {
    inputs.problem.softmax_scale() as f32
}

/// `C[key][channel] += A[key][query] B[query][channel]`, in half vectors where whole ones do not fit the channels.
#[inline(always)]
unsafe fn outer<S: Simd>(s: S, (keys, queries): (usize, usize), a: Matrix, b: Matrix, c: Matrix) {
    let mut phase = Accumulate { c };
    // SAFETY: the caller's.
    unsafe {
        if b.stride.is_multiple_of(S::LANES) {
            let shape = (keys, b.stride / S::LANES, queries);
            s.vectorize(
                #[inline(always)]
                || product::<S, _, false>(s, shape, a, b, &mut phase),
            );
        } else {
            let half = s.half();
            let shape = (keys, b.stride / S::Half::LANES, queries);
            half.vectorize(
                #[inline(always)]
                || product::<S::Half, _, false>(half, shape, a, b, &mut phase),
            );
        }
    }
}

/// Sums of a tile of dSᵀ over its queries and over its keys.
#[inline(always)]
unsafe fn sums<S: Simd>(s: S, keys: usize, vectors: usize, ds: Matrix, key_sum: *mut f32, query_sum: *mut f32) {
    for j in 0..keys {
        // SAFETY: the tile has row j, and the sums a value for every key and query.
        unsafe {
            let mut total = s.splat(0.0);
            for at in (0..vectors * S::LANES).step_by(S::LANES) {
                let value = s.load(ds.at(j, at));
                total = s.add(total, value);
                s.store(query_sum.add(at), s.add(s.load(query_sum.add(at)), value));
            }
            *key_sum.add(j) += horizontal_sum(s, total);
        }
    }
}

/// The sum of a vector's lanes, in order.
#[inline(always)]
fn horizontal_sum<S: Simd>(s: S, v: S::V) -> f32 {
    let mut lanes = [0.0; 16];
    debug_assert!(S::LANES <= lanes.len());
    // SAFETY: `lanes` has at least LANES elements.
    unsafe { s.store(lanes.as_mut_ptr(), v) };
    lanes.iter().sum()
}

/// The inner product of two rows of whole vectors.
#[inline(always)]
unsafe fn dot<S: Simd>(s: S, channels: usize, a: *const f32, b: *const f32) -> f32 {
    let mut sum = s.splat(0.0);
    for at in (0..channels).step_by(S::LANES) {
        // SAFETY: both rows have `channels` elements.
        sum = unsafe { s.fma(s.load(a.add(at)), s.load(b.add(at)), sum) };
    }
    horizontal_sum(s, sum)
}

/// `d_gate = d_out ⊙ out ⊙ (1 - sigmoid)`, then `d_out ⊙= sigmoid`: out already has the gate in it (equation (8)).
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

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

mod queries;

use std::ops::Range;

use queries::{QueryTile, takes_rows};
use tilefold_core::attention::Cover;
use tilefold_core::{AttentionProblem, EmptyRows};

use super::forward::{Item, ItemShape, key_tiles, padded_channels, padded_slots, scale_base2};
use super::operands::{Ahead, Inputs, Operand};
use super::pack::{Row, pair_rows};
use super::product::{Accumulate, Matrix, Probabilities, ScoreGradients, product, product_of_twos, slots, wants_twos};
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
    /// Threads that share the work.
    pub(crate) workers: usize,
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
    /// What products take of K and V, summed over channels, and of K summed over keys.
    keys: Matrix,
    values: Matrix,
    keys_by_key: Matrix,
    /// Of one key tile, or with [`ItemShape::whole_keys`] of all keys.
    dk: Matrix,
    dv: Matrix,
    /// P and dS in f32, and what products take of them, summed over queries and over keys: the same memory without
    /// `PAIRS`, with which dS in f32 has the memory of P.
    probabilities: Matrix,
    p_by_query: Matrix,
    gradients: Matrix,
    ds_by_query: Matrix,
    ds_by_key: Matrix,
    /// Rows in f32 and rows of slots, on the way in, where products take neither.
    wide: Matrix,
    narrow: Matrix,
    key_sum: *mut f32,
    /// Gradient that rows without keys give every v.
    uniform: *mut f32,
    /// The output of a tile, and its products with dO on the way to their sums.
    out: Matrix,
    products: [Matrix; 2],
    /// One row of the gate and of its gradient.
    rows: [*mut f32; 2],
    pub(crate) bias: TileScratch,
    /// `[query][key]`, for turning a bias gradient.
    pub(crate) turned: Matrix,
}

impl Scratch {
    fn carve<S: Simd>(carver: &mut Carver, problem: &AttentionProblem, shape: ItemShape, wants: Wants) -> Self {
        let spec = problem.spec();
        let (channels, channels_v) = (padded_channels(spec.head_dim), padded_channels(spec.head_dim_v));
        let group = if wants.row { problem.group() } else { 1 };
        let tiles = group.saturating_mul(shape.item_q / shape.tile_q);
        let keys = spec.seqlen_k.next_multiple_of(shape.tile_k);
        let slab = [tiles, keys].into_iter().fold(shape.heads, usize::saturating_mul);
        let queries = shape.tile_q;
        let only_pairs = |rows: usize| if S::PAIRS { rows } else { 0 };
        let (in_slots, in_slots_v) = (padded_slots::<S>(spec.head_dim), padded_slots::<S>(spec.head_dim_v));
        let probabilities = carver.matrix(shape.tile_k, queries);
        let mut of_pairs = |pairs: (usize, usize), otherwise: Option<Matrix>| {
            let (rows, stride) = if S::PAIRS { pairs } else { (shape.tile_k, queries) };
            otherwise.filter(|_| !S::PAIRS).unwrap_or_else(|| carver.matrix(rows, stride))
        };
        let p_by_query = of_pairs((shape.tile_k, queries / 2), Some(probabilities));
        let ds_by_query = of_pairs((shape.tile_k, queries / 2), None);
        let ds_by_key = of_pairs((shape.tile_k.div_ceil(2), queries), Some(ds_by_query));
        let wide_rows = if takes_rows::<S>(channels) && takes_rows::<S>(channels_v) { 0 } else { queries };
        let keys_matrix = carver.matrix(shape.tile_k, in_slots);
        Self {
            slab: shape.slab.then(|| carver.matrix(slab, queries)),
            bias_sum: wants.bias_sum.then(|| carver.matrix(slab, queries)),
            tiles: carver.pieces(tiles, |carver| QueryTile {
                q: carver.matrix(slots::<S>(queries), channels),
                q_turned: carver.matrix(in_slots, queries),
                d_out: carver.matrix(slots::<S>(queries), channels_v),
                d_out_turned: carver.matrix(in_slots_v, queries),
                dq_turned: carver.matrix(channels, queries),
                lse: carver.floats(queries),
                lse_low: carver.floats(queries),
                delta: carver.floats(queries),
                query_sum: carver.floats(queries),
            }),
            keys: keys_matrix,
            values: carver.matrix(shape.tile_k, in_slots_v),
            keys_by_key: if S::PAIRS { carver.matrix(shape.tile_k.div_ceil(2), channels) } else { keys_matrix },
            dk: carver.matrix(if shape.whole_keys { keys } else { shape.tile_k }, channels),
            dv: carver.matrix(if shape.whole_keys { keys } else { shape.tile_k }, channels_v),
            probabilities,
            p_by_query,
            gradients: if S::PAIRS { probabilities } else { ds_by_query },
            ds_by_query,
            ds_by_key,
            wide: carver.matrix(wide_rows, channels.max(channels_v)),
            narrow: carver.matrix(only_pairs(queries), in_slots.max(in_slots_v)),
            key_sum: carver.floats(shape.tile_k),
            uniform: carver.floats(channels_v),
            out: carver.matrix(queries, channels_v),
            products: std::array::from_fn(|_| carver.matrix(S::LANES, S::LANES)),
            rows: std::array::from_fn(|_| carver.floats(channels_v)),
            bias: TileScratch::carve(carver, queries, shape.tile_k),
            turned: carver.matrix(queries, shape.tile_k),
        }
    }
}

/// Bytes one item needs.
pub(crate) fn scratch_bytes<S: Simd>(problem: &AttentionProblem, shape: ItemShape, wants: Wants) -> usize {
    let mut carver = Carver::counting();
    Scratch::carve::<S>(&mut carver, problem, shape, wants);
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
    /// Whether sums over the parts of an item start and end here.
    pub(crate) first: bool,
    pub(crate) last: bool,
}

impl Backward<'_> {
    /// Scratch of an item, cut from a block of [`scratch_bytes`].
    pub(crate) fn scratch<S: Simd>(&self, carver: &mut Carver, wants: Wants) -> Scratch {
        Scratch::carve::<S>(carver, self.inputs.problem, self.shape, wants)
    }

    /// Rows of one item for a part of the queries, whose slab is there; the bias sum starts at 0.
    pub(crate) fn run<S: Simd>(&self, s: S, item: &Item, part: &Part, scratch: &Scratch, wants: Wants) {
        self.clear_bias_sum(item, part, scratch);
        for row in item.rows.clone() {
            for kv_head in item.kv_heads.clone() {
                self.run_row(s, item, part, (row, kv_head), scratch, wants);
            }
        }
    }

    /// All parts of the queries for one row after the other, where rows share nothing.
    pub(crate) fn run_by_row<S: Simd>(&self, s: S, item: &Item, parts: &[Part], scratch: &Scratch, wants: Wants) {
        for row in item.rows.clone() {
            for kv_head in item.kv_heads.clone() {
                parts.iter().for_each(|part| self.run_row(s, item, part, (row, kv_head), scratch, wants));
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

    /// What rows share, for a part of the queries.
    pub(crate) fn build_slab<S: Simd>(&self, s: S, item: &Item, part: &Part, scratch: &Scratch) {
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
            let gradients = self.key_gradients(&k, scratch);
            if wants.row {
                self.start_keys(&k, part, gradients, scratch.uniform);
            }
            let counted = k.start..k.end.min(length);
            if !counted.is_empty() && spec.mask.cover(&part.queries, &counted) != Cover::Empty {
                self.run_keys(s, item, part, (row, kv_head), &counted, scratch, wants);
            }
            if wants.row {
                // SAFETY: the key tile was carved; its elements belong to this item.
                s.vectorize(
                    #[inline(always)]
                    || unsafe { self.finish_keys(item.batch, part, (row, kv_head), &k, gradients) },
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
                    || unsafe { self.finish_tile(s, at, &q, scratch, scratch.tiles[index]) },
                );
            }
        }
    }

    /// What tile `index` of `all` asks for, of `q × k`: its share of the next key tile, and with the last key tile its own
    /// queries of the next row or head.
    #[inline(always)]
    fn ahead(
        &self,
        item: &Item,
        part: &Part,
        (row, kv_head): (usize, usize),
        (q, k): (&Range<usize>, &Range<usize>),
        (index, all): (usize, usize),
    ) -> [Ahead; 5] {
        let spec = self.inputs.problem.spec();
        let more = k.end < self.inputs.problem.kv_length(item.batch, row);
        let next = if more { Some((row, kv_head)) } else { item.after((row, kv_head)) };
        let mut ahead = [Ahead::NOTHING; 5];
        let Some((row, kv_head)) = next else { return ahead };
        let start = if more { k.end } else { 0 };
        let rows = self.shape.tile_k.min(spec.seqlen_k - start);
        // Values come half a turn after keys.
        let of_keys =
            [(&self.inputs.k, spec.head_dim, index), (&self.inputs.v, spec.head_dim_v, (index + all / 2) % all)];
        for (ahead, (operand, channels, index)) in ahead.iter_mut().zip(of_keys) {
            *ahead = operand.ahead([item.batch, row, start, kv_head, 0], (rows, channels), (index, all), k.len());
        }
        if more {
            return ahead;
        }
        let head = kv_head * self.inputs.problem.group() + part.heads.start + index * part.heads.len() / all;
        let of_queries =
            [(&self.inputs.q, spec.head_dim), (&self.out, spec.head_dim_v), (&self.d_out, spec.head_dim_v)];
        for (ahead, (operand, channels)) in ahead[2..].iter_mut().zip(of_queries) {
            *ahead = operand.ahead([item.batch, row, q.start, head, 0], (q.len(), channels), (0, 1), k.len());
        }
        ahead
    }

    /// Where dK and dV of a key tile are summed.
    fn key_gradients(&self, k: &Range<usize>, scratch: &Scratch) -> [Matrix; 2] {
        let row = if self.shape.whole_keys { k.start } else { 0 };
        [scratch.dk, scratch.dv].map(|sum| Matrix { data: sum.at(row, 0), ..sum })
    }

    fn start_keys(&self, k: &Range<usize>, part: &Part, [dk, dv]: [Matrix; 2], uniform: *const f32) {
        // SAFETY: carved for the key tile; `uniform` has a row's channels.
        unsafe {
            if part.first || !self.shape.whole_keys {
                dk.data.write_bytes(0, k.len() * dk.stride);
                dv.data.write_bytes(0, k.len() * dv.stride);
            }
            if self.inputs.problem.spec().empty_rows == EmptyRows::Uniform {
                for j in 0..k.len() {
                    for channel in 0..dv.stride {
                        *dv.at(j, channel) += *uniform.add(channel);
                    }
                }
            }
        }
    }

    /// K and V of a key tile.
    #[inline(always)]
    unsafe fn pack_keys<S: Simd>(&self, s: S, at: (usize, usize, usize), k: &Range<usize>, scratch: &Scratch) {
        let (inputs, spec) = (&self.inputs, self.inputs.problem.spec());
        // SAFETY: the caller's; the matrices were carved for a key tile.
        unsafe {
            inputs.pack_keys(s, &inputs.k, at, k, spec.head_dim, scratch.keys);
            inputs.pack_keys(s, &inputs.v, at, k, spec.head_dim_v, scratch.values);
            if S::PAIRS {
                let by_key = scratch.keys_by_key;
                pair_rows(s, k.len().next_multiple_of(2), by_key.stride, scratch.keys, by_key);
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
        // SAFETY: the matrices were carved for a key tile.
        s.vectorize(
            #[inline(always)]
            || unsafe { self.pack_keys(s, (item.batch, row, kv_head), k, scratch) },
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
                let index = head * tiles + tile;
                let ahead = self.ahead(item, part, (row, kv_head), (&q, k), (index, all));
                self.run_tile(s, at, (&q, k), keys, (index, slab_start), ahead, scratch, wants);
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
        ahead: [Ahead; 5],
        scratch: &Scratch,
        wants: Wants,
    ) {
        let spec = self.inputs.problem.spec();
        let tile = scratch.tiles[index];
        let [dk, dv] = self.key_gradients(k, scratch);
        let slab = scratch.slab.map(|slab| self.slab_at(slab, slab_start + index, k.start));
        // SAFETY: the scratch covers the tile.
        let bias = s.vectorize(
            #[inline(always)]
            || unsafe { self.inputs.tile_bias(s, at, (q, k), slab, keys, &scratch.bias) },
        );
        let Some(bias) = bias else { return };
        let vectors = q.len().div_ceil(S::LANES);
        let sums_wanted = self.key_sums.is_some() || self.query_sums.is_some();
        let d_scores = wants.bias_sum || self.dq.is_some() || self.dk.is_some() || sums_wanted;
        // The phases are separate functions: inlined into one body they would spill registers.
        // SAFETY: every matrix was carved for a tile, and holds what the phase before wrote.
        unsafe {
            let phase = Probabilities {
                bias,
                scale: scale_base2(&self.inputs),
                lse: tile.lse,
                lse_low: tile.lse_low,
                probabilities: scratch.probabilities,
                by_query: scratch.p_by_query,
                ahead,
            };
            let shape = (k.len(), vectors, slots::<S>(spec.head_dim));
            s.vectorize(
                #[inline(always)]
                || product::<S, _, false>(s, shape, scratch.keys, tile.q_turned, phase),
            );
            if d_scores {
                let phase = ScoreGradients {
                    delta: tile.delta,
                    probabilities: scratch.probabilities,
                    gradients: (!S::PAIRS || sums_wanted).then_some(scratch.gradients),
                    by_query: scratch.ds_by_query,
                    by_key: scratch.ds_by_key,
                    bias_sum: scratch.bias_sum.map(|sum| self.slab_at(sum, slab_start + index, k.start)),
                };
                let shape = (k.len(), vectors, slots::<S>(spec.head_dim_v));
                s.vectorize(
                    #[inline(always)]
                    || product::<S, _, false>(s, shape, scratch.values, tile.d_out_turned, phase),
                );
            }
            if !wants.row {
                return;
            }
            if self.dv.is_some() {
                outer(s, (k.len(), q.len()), scratch.p_by_query, tile.d_out, dv);
            }
            if self.dk.is_some() {
                outer(s, (k.len(), q.len()), scratch.ds_by_query, tile.q, dk);
            }
            if self.dq.is_some() {
                let phase = Accumulate::<true> { c: tile.dq_turned };
                let shape = (spec.head_dim, vectors, slots::<S>(k.len()));
                s.vectorize(
                    #[inline(always)]
                    || product::<S, _, true>(s, shape, scratch.keys_by_key, scratch.ds_by_key, phase),
                );
            }
            if sums_wanted {
                s.vectorize(
                    #[inline(always)]
                    || sums(s, k.len(), vectors, scratch.gradients, scratch.key_sum, tile.query_sum),
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
        [dk, dv]: [Matrix; 2],
    ) {
        if self.shape.whole_keys && !part.last {
            return;
        }
        let spec = self.inputs.problem.spec();
        let softmax_scale = scale_f32(&self.inputs);
        let pairs = [
            (self.dk, self.key_partials.dk, dk, spec.head_dim, softmax_scale),
            (self.dv, self.key_partials.dv, dv, spec.head_dim_v, 1.0),
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
                        if part.first || self.shape.whole_keys {
                            to.copy_from_slice(values);
                        } else {
                            to.iter_mut().zip(values).for_each(|(to, value)| *to += *value);
                        }
                        continue;
                    }
                    values.iter_mut().for_each(|value| *value *= factor);
                    let data = operand.at([batch, row, k.start + j, kv_head, 0]);
                    Row { data, dtype: operand.dtype, stride: operand.strides[4] }.write(channels, from.at(j, 0));
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

/// `C[key][channel] += A[key][query] B[query][channel]`
#[inline(always)]
unsafe fn outer<S: Simd>(s: S, (keys, queries): (usize, usize), a: Matrix, b: Matrix, c: Matrix) {
    // SAFETY: the caller's.
    unsafe {
        if wants_twos::<S>(b.stride) {
            // Beyond the last query, A and B are 0.
            let shape = (keys, b.stride, slots::<S>(queries).next_multiple_of(2));
            s.vectorize(
                #[inline(always)]
                || product_of_twos(s, shape, a, b, c),
            );
        } else {
            let shape = (keys, b.stride / S::LANES, slots::<S>(queries));
            s.vectorize(
                #[inline(always)]
                || product::<S, _, false>(s, shape, a, b, Accumulate::<false> { c }),
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

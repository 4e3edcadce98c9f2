//! Forward pass of one work item: online softmax over tiles of keys, lanes are queries (equations (1)-(6)).
//!
//! ```text
//! for row in rows of the item                       slab: what rows share, transposed once
//!     pack Qᵀ of all query tiles, scaled
//!     for key tile                                   pack K, V
//!         for head of the group, query tile
//!             Sᵀ = bias + K Qᵀ, row max              rescale O and the row sum if a maximum grew
//!             Pᵀ = exp2(Sᵀ - max), row sum
//!             Oᵀ += Vᵀ Pᵀ
//!     out = sigmoid(gate) ⊙ O / row sum, lse = max + ln(row sum)
//! ```

use std::f32::consts::LOG2_E;
use std::ops::Range;

use tilefold_core::attention::Cover;
use tilefold_core::{AttentionProblem, EmptyRows};

use super::operands::{Ahead, Inputs, Operand};
use super::pack::{Row, pack_rows, pack_slots, pair_rows, scale, transpose};
use super::product::{Accumulate, Matrix, Scores, product, slots};
use super::tile::{Position, TileScratch};
use super::workspace::{Carver, Leased};
use crate::arch::Simd;

/// What the forward pass reads and writes.
#[derive(Debug)]
pub(crate) struct Forward<'p> {
    pub(crate) inputs: Inputs<'p>,
    pub(crate) out: Operand<5>,
    pub(crate) lse: Option<Operand<4>>,
    pub(crate) lse_low: Option<Operand<4>>,
    pub(crate) shape: ItemShape,
}

/// Sizes that scratch memory depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ItemShape {
    /// Queries of a tile.
    pub(crate) tile_q: usize,
    /// Keys of a tile.
    pub(crate) tile_k: usize,
    /// Most queries of an item, a multiple of `tile_q`.
    pub(crate) item_q: usize,
    /// Most key heads of an item: narrow heads share a cache line.
    pub(crate) heads: usize,
    /// Whether an item keeps a slab of what its rows share.
    pub(crate) slab: bool,
    /// Whether backward keeps dK and dV of all keys of one row and head, to go through the queries in several parts.
    pub(crate) whole_keys: bool,
}

/// One work item: rows and key heads of one batch, with a range of queries.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) batch: usize,
    pub(crate) kv_heads: Range<usize>,
    pub(crate) rows: Range<usize>,
    pub(crate) queries: Range<usize>,
}

impl Item {
    /// The row and key head that come after one.
    pub(crate) fn after(&self, (row, kv_head): (usize, usize)) -> Option<(usize, usize)> {
        if kv_head + 1 < self.kv_heads.end {
            Some((row, kv_head + 1))
        } else {
            (row + 1 < self.rows.end).then_some((row + 1, self.kv_heads.start))
        }
    }

    /// Whether items differ in nothing that their slabs hold: in their rows alone.
    pub(crate) fn shares_slab(&self, other: &Self) -> bool {
        (self.batch, &self.kv_heads, &self.queries) == (other.batch, &other.kv_heads, &other.queries)
    }
}

/// Smallest running maximum: finite, so that a row that starts with -inf does not become NaN.
const LOWEST_MAX: f32 = f32::MIN;

/// Channels padded so that half vectors of every instruction set fit.
pub(crate) fn padded_channels(channels: usize) -> usize {
    channels.next_multiple_of(8)
}

/// Slots of a row of padded channels, padded in the same way.
pub(crate) fn padded_slots<S: Simd>(channels: usize) -> usize {
    padded_channels(slots::<S>(padded_channels(channels)))
}

struct Scratch {
    slab: Option<Matrix>,
    /// For every head of the group and query tile: Qᵀ, Oᵀ, row max, row sum.
    tiles: Vec<QueryTile>,
    /// What a product takes of K and V, and with `PAIRS` V as pairs of channels, on the way.
    keys: Matrix,
    values: Matrix,
    narrow: Matrix,
    scores: Matrix,
    old_max: *mut f32,
    /// `[query][channel]`, on the way in and out; with `PAIRS` also `[query][slot]`.
    rows: Matrix,
    pairs: Matrix,
    gate: *mut f32,
    mean: *mut f32,
    /// The two parts of lse, on the way out.
    lse: [*mut f32; 2],
    bias: TileScratch,
}

#[derive(Clone, Copy)]
struct QueryTile {
    q: Matrix,
    out: Matrix,
    row_max: *mut f32,
    row_sum: *mut f32,
}

impl Scratch {
    fn carve<S: Simd>(carver: &mut Carver, problem: &AttentionProblem, shape: ItemShape) -> Self {
        let spec = problem.spec();
        let (channels, channels_v) = (padded_channels(spec.head_dim), padded_channels(spec.head_dim_v));
        let tiles = problem.group().saturating_mul(shape.item_q / shape.tile_q);
        let keys = spec.seqlen_k.next_multiple_of(shape.tile_k);
        let slab = [tiles, keys].into_iter().fold(shape.heads, usize::saturating_mul);
        let slot_stride = padded_slots::<S>(spec.head_dim);
        let only_pairs = |rows: usize| if S::PAIRS { rows } else { 0 };
        Self {
            slab: shape.slab.then(|| carver.matrix(slab, shape.tile_q)),
            tiles: carver.pieces(tiles, |carver| QueryTile {
                q: carver.matrix(slot_stride, shape.tile_q),
                out: carver.matrix(channels_v, shape.tile_q),
                row_max: carver.floats(shape.tile_q),
                row_sum: carver.floats(shape.tile_q),
            }),
            keys: carver.matrix(shape.tile_k, slot_stride),
            values: carver.matrix(slots::<S>(shape.tile_k), channels_v),
            narrow: carver.matrix(only_pairs(shape.tile_k), padded_slots::<S>(spec.head_dim_v)),
            scores: carver.matrix(shape.tile_k, shape.tile_q),
            old_max: carver.floats(shape.tile_q),
            rows: carver.matrix(shape.tile_q, channels.max(channels_v)),
            pairs: carver.matrix(only_pairs(shape.tile_q), slot_stride),
            gate: carver.floats(channels_v),
            mean: carver.floats(channels_v),
            lse: std::array::from_fn(|_| carver.floats(shape.tile_q)),
            bias: TileScratch::carve(carver, shape.tile_q, shape.tile_k),
        }
    }
}

/// Bytes one item needs.
pub(crate) fn scratch_bytes<S: Simd>(problem: &AttentionProblem, shape: ItemShape) -> usize {
    let mut carver = Carver::counting();
    Scratch::carve::<S>(&mut carver, problem, shape);
    carver.bytes()
}

impl Forward<'_> {
    /// Computes one item in a block of [`scratch_bytes`].
    pub(crate) fn run<S: Simd>(&self, s: S, item: &Item, leased: &mut Leased) {
        let needs_slab = leased.needs_slab(item);
        let scratch = Scratch::carve::<S>(&mut Carver::over(&mut leased.block), self.inputs.problem, self.shape);
        if needs_slab {
            self.build_slab(s, item, &scratch);
        }
        for row in item.rows.clone() {
            for kv_head in item.kv_heads.clone() {
                self.run_row(s, item, (row, kv_head), &scratch);
            }
        }
    }

    fn tile_range(&self, item: &Item, tile: usize) -> Range<usize> {
        let start = item.queries.start + tile * self.shape.tile_q;
        start..(start + self.shape.tile_q).min(item.queries.end)
    }

    fn tiles_per_head(&self, item: &Item) -> usize {
        item.queries.len().div_ceil(self.shape.tile_q)
    }

    /// The slab's part for query tile `index` (of all heads of the item) and keys from `key`.
    fn slab_at(&self, slab: Matrix, index: usize, key: usize) -> Matrix {
        let keys = self.inputs.problem.spec().seqlen_k.next_multiple_of(self.shape.tile_k);
        Matrix { data: slab.at(index * keys + key, 0), ..slab }
    }

    fn build_slab<S: Simd>(&self, s: S, item: &Item, scratch: &Scratch) {
        let Some(slab) = scratch.slab else { return };
        let (tiles, group) = (self.tiles_per_head(item), self.inputs.problem.group());
        for index in 0..item.kv_heads.len() * group * tiles {
            let head = item.kv_heads.start * group + index / tiles;
            let at = Position { batch: item.batch, row: item.rows.start, head };
            let q = self.tile_range(item, index % tiles);
            for k in key_tiles(self.inputs.problem.spec().seqlen_k, self.shape.tile_k) {
                let part = self.slab_at(slab, index, k.start);
                // SAFETY: the slab and the scratch were carved for these tiles.
                s.vectorize(
                    #[inline(always)]
                    || unsafe { self.inputs.slab_tile(s, at, (&q, &k), &scratch.bias, part) },
                );
            }
        }
    }

    fn run_row<S: Simd>(&self, s: S, item: &Item, (row, kv_head): (usize, usize), scratch: &Scratch) {
        let (spec, tiles) = (self.inputs.problem.spec(), self.tiles_per_head(item));
        let (batch, group) = (item.batch, self.inputs.problem.group());
        let all = tiles * group;
        let position = |head_of_group: usize| Position { batch, row, head: kv_head * group + head_of_group };
        let slab_start = (kv_head - item.kv_heads.start) * all;
        for index in 0..all {
            let at = position(index / tiles);
            // SAFETY: the tile's matrices were carved for it.
            s.vectorize(
                #[inline(always)]
                || unsafe { self.start_tile(s, at, &self.tile_range(item, index % tiles), scratch, index) },
            );
        }
        let length = self.inputs.problem.kv_length(item.batch, row);
        for k in key_tiles(length, self.shape.tile_k) {
            let mask = &spec.mask;
            if mask.cover(&item.queries, &k) == Cover::Empty {
                continue;
            }
            // SAFETY: the matrices were carved for a key tile.
            s.vectorize(
                #[inline(always)]
                || unsafe { self.pack_keys(s, (batch, row, kv_head), &k, scratch) },
            );
            for head in 0..group {
                let at = position(head);
                // SAFETY: the scratch has room for a key tile.
                let keys = unsafe { self.inputs.key_values(at, &k, k.len(), &scratch.bias) };
                let Some(keys) = keys else { continue };
                for tile in 0..tiles {
                    let (q, index) = (self.tile_range(item, tile), head * tiles + tile);
                    let ahead = self.ahead(item, (row, kv_head), (&q, &k, length), (index, all));
                    self.run_tile(s, at, (&q, &k), keys, (index, slab_start), ahead, scratch);
                }
            }
        }
        let mut has_mean = false;
        for index in 0..all {
            let at = position(index / tiles);
            let q = self.tile_range(item, index % tiles);
            // SAFETY: the tile was carved and computed.
            unsafe { self.finish_tile(s, at, &q, scratch, scratch.tiles[index], &mut has_mean) };
        }
    }

    /// K and V of a key tile: K as rows of channels, V so that keys are summed over.
    #[inline(always)]
    unsafe fn pack_keys<S: Simd>(&self, s: S, at: (usize, usize, usize), k: &Range<usize>, scratch: &Scratch) {
        let (inputs, spec) = (&self.inputs, self.inputs.problem.spec());
        // SAFETY: the caller's; the matrices were carved for a key tile.
        unsafe {
            inputs.pack_keys(s, &inputs.k, at, k, spec.head_dim, scratch.keys);
            if S::PAIRS {
                inputs.pack_keys(s, &inputs.v, at, k, spec.head_dim_v, scratch.narrow);
                let rows = k.len().next_multiple_of(2);
                pair_rows(s, rows, scratch.values.stride, scratch.narrow, scratch.values);
            } else {
                inputs.pack_keys(s, &inputs.v, at, k, spec.head_dim_v, scratch.values);
            }
        }
    }

    /// What tile `part` of `parts` asks for, of `q × k`: its share of the next key tile, and with the last key tile its
    /// own queries and outputs of the next row or head.
    #[inline(always)]
    fn ahead(
        &self,
        item: &Item,
        (row, kv_head): (usize, usize),
        (q, k, length): (&Range<usize>, &Range<usize>, usize),
        (part, parts): (usize, usize),
    ) -> [Ahead; 4] {
        let spec = self.inputs.problem.spec();
        let more = k.end < length;
        let next = if more { Some((row, kv_head)) } else { item.after((row, kv_head)) };
        let Some((row, kv_head)) = next else { return [Ahead::NOTHING; 4] };
        let start = if more { k.end } else { 0 };
        let keys = [item.batch, row, start, kv_head, 0];
        let rows = self.shape.tile_k.min(spec.seqlen_k - start);
        let of_keys =
            |operand: &Operand<5>, channels, part| operand.ahead(keys, (rows, channels), (part, parts), k.len());
        // Values come half a turn after keys.
        let (k_part, v_part) = (part, (part + parts / 2) % parts);
        let (k_ahead, v_ahead) =
            (of_keys(&self.inputs.k, spec.head_dim, k_part), of_keys(&self.inputs.v, spec.head_dim_v, v_part));
        if more {
            return [k_ahead, v_ahead, Ahead::NOTHING, Ahead::NOTHING];
        }
        let group = self.inputs.problem.group();
        let queries = [item.batch, row, q.start, kv_head * group + part * group / parts, 0];
        let of_queries = |operand: &Operand<5>, channels| operand.ahead(queries, (q.len(), channels), (0, 1), k.len());
        [k_ahead, v_ahead, of_queries(&self.inputs.q, spec.head_dim), of_queries(&self.out, spec.head_dim_v)]
    }

    #[inline(always)]
    unsafe fn start_tile<S: Simd>(&self, s: S, at: Position, q: &Range<usize>, scratch: &Scratch, index: usize) {
        let tile = scratch.tiles[index];
        let channels = self.inputs.problem.spec().head_dim;
        let padded = padded_channels(channels);
        let operand = self.inputs.q;
        let lanes = q.len().next_multiple_of(S::LANES);
        let rows = Matrix { stride: padded, ..scratch.rows };
        let from = operand.rows([at.batch, at.row, q.start, at.head, 0], [2, 4]);
        // SAFETY: all queries of `q` exist; the matrices were carved for a tile.
        unsafe {
            if S::PAIRS {
                pack_slots(s, (q.len(), lanes, channels), from, scratch.pairs);
                transpose(s, lanes, scratch.pairs.stride, scratch.pairs, tile.q);
            } else {
                pack_rows(s, (q.len(), lanes, channels), from, rows);
                scale(lanes, padded, scale_base2(&self.inputs), rows);
                transpose(s, lanes, padded, rows, tile.q);
            }
            for i in 0..self.shape.tile_q {
                *tile.row_max.add(i) = LOWEST_MAX;
                *tile.row_sum.add(i) = 0.0;
            }
            tile.out.data.write_bytes(0, padded_channels(self.inputs.problem.spec().head_dim_v) * tile.out.stride);
        }
    }

    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "where in the problem, and what comes next")]
    fn run_tile<S: Simd>(
        &self,
        s: S,
        at: Position,
        (q, k): (&Range<usize>, &Range<usize>),
        keys: *const f32,
        (index, slab_start): (usize, usize),
        ahead: [Ahead; 4],
        scratch: &Scratch,
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
        // The phases are separate functions: inlined into one body they would spill registers.
        // SAFETY: every matrix was carved for a tile, and holds what the phase before wrote.
        unsafe {
            scratch.old_max.copy_from_nonoverlapping(tile.row_max, vectors * S::LANES);
            let scores =
                Scores { bias, scale: scale_base2(&self.inputs), scores: scratch.scores, row_max: tile.row_max, ahead };
            let shape = (k.len(), vectors, slots::<S>(spec.head_dim));
            s.vectorize(
                #[inline(always)]
                || product::<S, _, false>(s, shape, scratch.keys, tile.q, scores),
            );
            s.vectorize(
                #[inline(always)]
                || rescale(s, vectors, spec.head_dim_v, scratch.old_max, &tile),
            );
            s.vectorize(
                #[inline(always)]
                || exponentials(s, k.len(), vectors, scratch.scores, &tile),
            );
            let out = Accumulate::<true> { c: tile.out };
            let shape = (spec.head_dim_v, vectors, slots::<S>(k.len()));
            s.vectorize(
                #[inline(always)]
                || product::<S, _, true>(s, shape, scratch.values, scratch.scores, out),
            );
        }
    }

    /// Divides by the row sums, turns the tile and writes it.
    unsafe fn finish_tile<S: Simd>(
        &self,
        s: S,
        at: Position,
        q: &Range<usize>,
        scratch: &Scratch,
        tile: QueryTile,
        has_mean: &mut bool,
    ) {
        let spec = self.inputs.problem.spec();
        let padded = padded_channels(spec.head_dim_v);
        let rows = Matrix { stride: padded, ..scratch.rows };
        // SAFETY: the tile's matrices were carved for it; every written element belongs to this item.
        unsafe {
            s.vectorize(
                #[inline(always)]
                || {
                    if self.lse.is_some() || self.lse_low.is_some() {
                        self.write_lse(at, q, &tile, scratch.lse);
                    }
                    normalise(s, q.len().div_ceil(S::LANES), spec.head_dim_v, &tile);
                    transpose(s, padded, q.len().next_multiple_of(S::LANES), tile.out, rows);
                },
            );
            for i in 0..q.len() {
                let empty = *tile.row_sum.add(i) == 0.0;
                if empty && spec.empty_rows == EmptyRows::Uniform {
                    if !std::mem::replace(has_mean, true) {
                        self.mean_of_values(at, scratch.mean);
                    }
                    rows.at(i, 0).copy_from_nonoverlapping(scratch.mean, spec.head_dim_v);
                }
            }
            s.vectorize(
                #[inline(always)]
                || {
                    for i in 0..q.len() {
                        let index = [at.batch, at.row, q.start + i, at.head, 0];
                        if let Some(gate) = self.inputs.gate {
                            Row { data: gate.at(index), dtype: gate.dtype, stride: gate.strides[4] }
                                .read(spec.head_dim_v, scratch.gate);
                            gate_row(s.half(), padded, scratch.gate, rows.at(i, 0));
                        }
                        Row { data: self.out.at(index), dtype: self.out.dtype, stride: self.out.strides[4] }
                            .write(spec.head_dim_v, rows.at(i, 0));
                    }
                },
            );
        }
    }

    #[inline(always)]
    unsafe fn write_lse(&self, at: Position, q: &Range<usize>, tile: &QueryTile, [high, low]: [*mut f32; 2]) {
        // SAFETY: maxima, sums and both parts were carved for a tile; the f32 elements written belong to this item.
        unsafe {
            for i in 0..q.len() {
                (*high.add(i), *low.add(i)) = lse_parts(*tile.row_max.add(i), *tile.row_sum.add(i));
            }
            for (operand, part) in [(self.lse, high), (self.lse_low, low)] {
                let Some(operand) = operand else { continue };
                let data = operand.at([at.batch, at.row, at.head, q.start]);
                Row { data, dtype: operand.dtype, stride: operand.strides[3] }.write(q.len(), part);
            }
        }
    }

    /// The mean of v over all keys: what rows without keys give under [`EmptyRows::Uniform`].
    unsafe fn mean_of_values(&self, at: Position, mean: *mut f32) {
        let spec = self.inputs.problem.spec();
        let v = self.inputs.v;
        let mut sum = vec![0_f64; spec.head_dim_v];
        let mut row = vec![0_f32; spec.head_dim_v];
        let head = at.head / self.inputs.problem.group();
        for key in 0..spec.seqlen_k {
            let data = v.at([at.batch, at.row, key, head, 0]);
            // SAFETY: the key exists, and `row` has its channels.
            unsafe { Row { data, dtype: v.dtype, stride: v.strides[4] }.read(row.len(), row.as_mut_ptr()) };
            sum.iter_mut().zip(&row).for_each(|(sum, &value)| *sum += f64::from(value));
        }
        for (i, sum) in sum.into_iter().enumerate() {
            #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "rounding a mean to f32")]
            // SAFETY: `mean` was carved for the channels.
            unsafe {
                *mean.add(i) = (sum / spec.seqlen_k as f64) as f32;
            }
        }
    }
}

/// Ranges of at most `tile` keys.
pub(crate) fn key_tiles(keys: usize, tile: usize) -> impl Iterator<Item = Range<usize>> {
    (0..keys).step_by(tile).map(move |start| start..(start + tile).min(keys))
}

/// The softmax scale for base-2 exponentials.
#[allow(clippy::cast_possible_truncation, reason = "kernels compute in f32")]
pub(crate) fn scale_base2(inputs: &Inputs<'_>) -> f32 {
    (inputs.problem.softmax_scale() * std::f64::consts::LOG2_E) as f32
}

/// Natural lse of a row, and what its rounding to f32 took away (equation (5a)). Without branches, so that it vectorises.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the split into two f32 is the point")]
fn lse_parts(row_max: f32, row_sum: f32) -> (f32, f32) {
    let exact = (f64::from(row_max) + log2(row_sum)) * std::f64::consts::LN_2;
    let high = exact as f32;
    let low = (exact - f64::from(high)) as f32;
    let empty = row_sum == 0.0;
    (if empty { f32::NEG_INFINITY } else { high }, if empty || !high.is_finite() { 0.0 } else { low })
}

/// log2 of a positive normal number, NaN for what is not finite (by the product with 0); error below 1e-14. The library's is a call per element.
#[inline(always)]
fn log2(x: f32) -> f64 {
    // The bits of sqrt(1/2): the mantissa is taken between there and sqrt(2).
    const LEAST: u32 = 0x3f35_04f3;
    let exponent = x.to_bits().wrapping_sub(LEAST).cast_signed() >> 23;
    let mantissa = f64::from(f32::from_bits(x.to_bits().wrapping_sub(exponent.cast_unsigned() << 23)));
    // ln m = 2 artanh t
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let mut series = 1.0 / 19.0;
    for odd in [17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = series * (t * t) + 1.0 / odd;
    }
    f64::from(exponent) + 2.0 * std::f64::consts::LOG2_E * t * series + f64::from(x * 0.0)
}

/// Brings O and the row sums to the new maxima, if any maximum grew.
#[inline(always)]
unsafe fn rescale<S: Simd>(s: S, vectors: usize, channels: usize, old_max: *const f32, tile: &QueryTile) {
    for at in (0..vectors * S::LANES).step_by(S::LANES) {
        // SAFETY: the vectors are inside the tile.
        unsafe {
            let (old, new) = (s.load(old_max.add(at)), s.load(tile.row_max.add(at)));
            if !s.any_gt(new, old) {
                continue;
            }
            let factor = s.exp2(s.sub(old, new));
            s.store(tile.row_sum.add(at), s.mul(s.load(tile.row_sum.add(at)), factor));
            for channel in 0..channels {
                let value = tile.out.at(channel, at);
                s.store(value, s.mul(s.load(value), factor));
            }
        }
    }
}

/// Pᵀ = exp2(Sᵀ - max) in place, added into the row sums; with `PAIRS` a slot is a pair of keys, rounded after the sum.
#[inline(always)]
unsafe fn exponentials<S: Simd>(s: S, keys: usize, vectors: usize, scores: Matrix, tile: &QueryTile) {
    let mut vector = 0;
    while vector < vectors {
        // SAFETY: the columns are inside the tile.
        unsafe {
            // Two columns at a time: one alone waits for its own sum.
            if vectors - vector >= 2 {
                exponential_columns::<S, 2>(s, keys, vector * S::LANES, scores, tile);
                vector += 2;
            } else {
                exponential_columns::<S, 1>(s, keys, vector * S::LANES, scores, tile);
                vector += 1;
            }
        }
    }
}

#[inline(always)]
unsafe fn exponential_columns<S: Simd, const N: usize>(s: S, keys: usize, at: usize, scores: Matrix, tile: &QueryTile) {
    // SAFETY: the caller's.
    unsafe {
        let mut max = [s.splat(0.0); N];
        for j in 0..N {
            max[j] = s.load(tile.row_max.add(at + j * S::LANES));
        }
        let mut sum = [s.splat(0.0); N];
        for key in (0..keys).step_by(if S::PAIRS { 2 } else { 1 }) {
            for j in 0..N {
                let score = scores.at(key, at + j * S::LANES);
                let p = s.exp2(s.sub(s.load(score), max[j]));
                sum[j] = s.add(sum[j], p);
                if !S::PAIRS {
                    s.store(score, p);
                    continue;
                }
                let mut second = s.splat(0.0);
                if key + 1 < keys {
                    second = s.exp2(s.sub(s.load(score.add(scores.stride)), max[j]));
                    sum[j] = s.add(sum[j], second);
                }
                s.store(scores.at(key / 2, at + j * S::LANES), s.pair(p, second));
            }
        }
        for (j, sum) in sum.into_iter().enumerate() {
            let total = tile.row_sum.add(at + j * S::LANES);
            s.store(total, s.add(s.load(total), sum));
        }
    }
}

/// O divided by the row sums; 0 where a row has no keys.
#[inline(always)]
unsafe fn normalise<S: Simd>(s: S, vectors: usize, channels: usize, tile: &QueryTile) {
    for at in (0..vectors * S::LANES).step_by(S::LANES) {
        // SAFETY: the vectors are inside the tile.
        unsafe {
            let (sum, zero) = (s.load(tile.row_sum.add(at)), s.splat(0.0));
            let inverse = s.select_eq(sum, zero, zero, s.div(s.splat(1.0), sum));
            for channel in 0..channels {
                let value = tile.out.at(channel, at);
                s.store(value, s.mul(s.load(value), inverse));
            }
        }
    }
}

/// `sigmoid(x) = 1 / (1 + exp(-x))`; below -80 it is 2e-35 instead of less.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.max(s.splat(-80.0), x);
    let e = s.exp2(s.mul(x, s.splat(-LOG2_E)));
    s.div(s.splat(1.0), s.add(s.splat(1.0), e))
}

#[inline(always)]
unsafe fn gate_row<S: Simd>(s: S, channels: usize, gate: *const f32, row: *mut f32) {
    for at in (0..channels).step_by(S::LANES) {
        // SAFETY: both rows have `channels` elements, a multiple of the lanes.
        unsafe { s.store(row.add(at), s.mul(s.load(row.add(at)), sigmoid(s, s.load(gate.add(at))))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lse_keeps_what_f32_cannot() {
        // A row of 384 biases of -1e9: the sum of the parts still knows ln 384.
        let row_max = -1e9_f32 * LOG2_E;
        let (high, low) = lse_parts(row_max, 384.0);
        let exact = f64::from(row_max) * std::f64::consts::LN_2 + 384_f64.ln();
        assert!((f64::from(high) + f64::from(low) - exact).abs() < 1e-5);
        assert_eq!(lse_parts(LOWEST_MAX, 0.0), (f32::NEG_INFINITY, 0.0));
        assert!(lse_parts(f32::NAN, 1.0).0.is_nan());
        assert!(lse_parts(1.0, f32::NAN).0.is_nan());
    }

    #[test]
    fn log2_is_that_of_the_library() {
        for x in
            (0..20_000_u16).map(|i| 1.0 + f32::from(i) * 0.013).chain([f32::MIN_POSITIVE, 0.5, 0.707, 1e-7, f32::MAX])
        {
            let error = log2(x) - f64::from(x).log2();
            assert!(error.abs() < 2e-14, "{x}: {error:e}");
        }
        assert_eq!((log2(1.0), log2(8.0)), (0.0, 3.0));
    }
}

//! How a problem is cut into work items.
//!
//! Whatever changes the order of a sum depends on the problem alone, never on the number of threads: results are the same
//! bits for any number of them.

use std::ops::Range;

use tilefold_core::{AttentionProblem, AttentionSpec};

use super::forward::{Item, ItemShape};

/// Queries of a tile: whole vectors of every instruction set, and with [`tile_keys`] a tile that fits the L1 cache.
const TILE_QUERIES: usize = 48;
/// A slab's share of the cache in forward, which can cut queries freely.
const FORWARD_SLAB_BYTES: usize = 2 << 20;
/// A slab's share in backward, where a cut costs another pass over dK and dV.
const BACKWARD_SLAB_BYTES: usize = 4 << 20;
/// A slab larger than this, for one tile of queries, is not worth its memory: biases are read tile by tile.
const LARGEST_SLAB_BYTES: usize = 16 << 20;
/// Queries an item holds packed in backward when there is no slab.
const BACKWARD_QUERIES: usize = 4096;
/// Items the backward pass aims at when sums must be split for it: enough for 16 workers.
const SPLIT_ITEMS: usize = 16;
/// Most chunks of queries: each holds dK and dV of its own.
const MAX_QUERY_CHUNKS: usize = 8;

/// Keys of a tile: fewer for wide heads, so that a packed tile stays in the L1 cache.
fn tile_keys(spec: &AttentionSpec, most: usize) -> usize {
    let channels = spec.head_dim.max(spec.head_dim_v).max(8);
    (4096 / channels).clamp(16, most).next_multiple_of(16)
}

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// Key heads of an item: as many as share a cache line, so that a line is fetched once.
fn item_heads(spec: &AttentionSpec) -> usize {
    let bytes = spec.head_dim.min(spec.head_dim_v) * spec.dtype.size_bytes();
    (LINE_BYTES / bytes).clamp(1, spec.kv_heads.min(4))
}

/// Whether rows share a bias (or ALiBi) that a slab would hold.
fn shares_bias(spec: &AttentionSpec) -> bool {
    let per_row = |shape: &[usize; 5]| shape[1] != 1 && shape[3] != 1;
    let shared = |shape: &[usize; 5]| shape[1] == 1 && shape[3] != 1;
    let shapes = || spec.biases.iter().map(|bias| &bias.shape);
    shapes().any(shared) || (spec.mask.alibi_slopes.is_some() && !shapes().any(per_row))
}

/// Queries per item for a slab within `bytes`, cut evenly; `None` when a slab does not pay.
fn slab_queries(problem: &AttentionProblem, tile_k: usize, queries: usize, bytes: usize) -> Option<usize> {
    let spec = problem.spec();
    let heads = item_heads(spec) * problem.group();
    let per_query = heads * spec.seqlen_k.next_multiple_of(tile_k) * size_of::<f32>();
    let smallest = per_query.checked_mul(TILE_QUERIES)?;
    if spec.rows < 2 || !shares_bias(spec) || smallest > LARGEST_SLAB_BYTES {
        return None;
    }
    Some(even_cut(queries, (bytes / per_query).max(TILE_QUERIES)))
}

/// The length of equal parts of whole tiles, at most `most` each (or one tile).
fn even_cut(queries: usize, most: usize) -> usize {
    let tiles = queries.div_ceil(TILE_QUERIES);
    let parts = tiles.div_ceil((most / TILE_QUERIES).max(1));
    tiles.div_ceil(parts) * TILE_QUERIES
}

/// Cut of a forward pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ForwardSchedule {
    pub(crate) shape: ItemShape,
    rows: usize,
}

impl ForwardSchedule {
    pub(crate) fn new(problem: &AttentionProblem, workers: usize) -> Self {
        let spec = problem.spec();
        let tile_k = tile_keys(spec, 96);
        let slab = slab_queries(problem, tile_k, spec.seqlen_q, FORWARD_SLAB_BYTES);
        let heads = item_heads(spec);
        let outer = spec.batch * spec.kv_heads.div_ceil(heads);
        let wanted = workers * 8;
        // Without a slab a few tiles of queries are enough to pay for packing keys.
        let few = (spec.seqlen_q / (wanted / (outer * spec.rows)).max(1)).clamp(4 * TILE_QUERIES, 16 * TILE_QUERIES);
        let item_q = slab.unwrap_or_else(|| even_cut(spec.seqlen_q, few));
        let parts = outer * spec.seqlen_q.div_ceil(item_q);
        let rows = (spec.rows * parts).div_ceil(wanted).clamp(1, spec.rows);
        Self { shape: ItemShape { tile_q: TILE_QUERIES, tile_k, item_q, heads, slab: slab.is_some() }, rows }
    }

    /// All items; neighbours share a slab.
    pub(crate) fn items(&self, spec: &AttentionSpec) -> Vec<Item> {
        let mut items = Vec::new();
        for (batch, kv_heads) in head_groups(spec, self.shape.heads) {
            for queries in cuts(0..spec.seqlen_q, self.shape.item_q) {
                for rows in cuts(0..spec.rows, self.rows) {
                    items.push(Item { batch, kv_heads: kv_heads.clone(), rows, queries: queries.clone() });
                }
            }
        }
        items
    }
}

/// Cut of a backward pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BackwardSchedule {
    pub(crate) shape: ItemShape,
    /// Rows of an item.
    pub(crate) rows: usize,
    /// Queries of a chunk; every chunk has its own partial sums of dK and dV.
    pub(crate) chunk: usize,
}

impl BackwardSchedule {
    /// `bias_sum` says whether dS is summed over rows as the pass goes.
    pub(crate) fn new(problem: &AttentionProblem, workers: usize, bias_sum: bool) -> Self {
        let spec = problem.spec();
        let tile_k = tile_keys(spec, 48);
        let heads = item_heads(spec);
        let outer = spec.batch * spec.kv_heads.div_ceil(heads);
        let row_chunks = if bias_sum && spec.rows >= 8 { SPLIT_ITEMS.div_ceil(outer).min(spec.rows / 4) } else { 1 };
        let items = if bias_sum { outer * row_chunks } else { outer * spec.rows };
        let most_chunks = (spec.seqlen_q / (2 * TILE_QUERIES)).clamp(1, MAX_QUERY_CHUNKS);
        let query_chunks = SPLIT_ITEMS.div_ceil(items).min(most_chunks);
        let chunk = even_cut(spec.seqlen_q, spec.seqlen_q.div_ceil(query_chunks).next_multiple_of(TILE_QUERIES));
        let slab = slab_queries(problem, tile_k, chunk, BACKWARD_SLAB_BYTES);
        let without = if bias_sum {
            // The sum has the size of a slab, whether or not one is read.
            let per_query = heads * problem.group() * spec.seqlen_k.next_multiple_of(tile_k) * size_of::<f32>();
            BACKWARD_SLAB_BYTES / per_query
        } else {
            BACKWARD_QUERIES / problem.group()
        };
        let item_q = slab.unwrap_or_else(|| even_cut(chunk, without.max(TILE_QUERIES)));
        let rows = if bias_sum {
            spec.rows.div_ceil(row_chunks)
        } else {
            (spec.rows * outer * spec.seqlen_q.div_ceil(chunk)).div_ceil(workers * 8).clamp(1, spec.rows)
        };
        Self { shape: ItemShape { tile_q: TILE_QUERIES, tile_k, item_q, heads, slab: slab.is_some() }, rows, chunk }
    }

    /// Chunks of queries.
    pub(crate) fn chunks(&self, spec: &AttentionSpec) -> usize {
        spec.seqlen_q.div_ceil(self.chunk)
    }

    /// Chunks of rows.
    pub(crate) fn row_chunks(&self, spec: &AttentionSpec) -> usize {
        spec.rows.div_ceil(self.rows)
    }

    /// Whether dK and dV are summed from several parts.
    pub(crate) fn splits_keys(&self, spec: &AttentionSpec) -> bool {
        self.shape.item_q < spec.seqlen_q
    }

    /// All items.
    pub(crate) fn items(&self, spec: &AttentionSpec) -> Vec<Item> {
        let mut items = Vec::new();
        for (batch, kv_heads) in head_groups(spec, self.shape.heads) {
            for queries in cuts(0..spec.seqlen_q, self.chunk) {
                for rows in cuts(0..spec.rows, self.rows) {
                    items.push(Item { batch, kv_heads: kv_heads.clone(), rows, queries: queries.clone() });
                }
            }
        }
        items
    }
}

/// Every batch with every group of key heads.
fn head_groups(spec: &AttentionSpec, heads: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let kv_heads = spec.kv_heads;
    (0..spec.batch).flat_map(move |batch| cuts(0..kv_heads, heads).map(move |group| (batch, group)))
}

/// Consecutive parts of a range.
pub(crate) fn cuts(range: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(length).map(move |start| start..(start + length).min(end))
}

#[cfg(test)]
mod tests {
    use tilefold_core::{BiasSpec, DType};

    use super::*;

    fn problem(rows: usize, seqlen: usize, heads: usize) -> AttentionProblem {
        let mut spec = AttentionSpec::new(DType::F32, 1, rows, seqlen, heads, 32);
        spec.biases.push(BiasSpec { shape: [1, 1, heads, seqlen, seqlen], dtype: DType::F32 });
        AttentionProblem::new(spec.with_all_gradients()).unwrap()
    }

    #[test]
    fn items_cover_everything_once() {
        for (rows, seqlen, heads) in [(1, 1, 1), (3, 100, 2), (128, 256, 8), (5, 5000, 1), (300, 47, 3)] {
            let problem = problem(rows, seqlen, heads);
            let spec = problem.spec();
            let forward = ForwardSchedule::new(&problem, 2).items(spec);
            let backward = [true, false].map(|sum| BackwardSchedule::new(&problem, 2, sum).items(spec));
            for items in [forward].into_iter().chain(backward) {
                let cells: usize =
                    items.iter().map(|item| item.rows.len() * item.queries.len() * item.kv_heads.len()).sum();
                assert_eq!(cells, rows * seqlen * heads);
                assert!(items.iter().all(|item| item.queries.start % TILE_QUERIES == 0));
            }
        }
    }

    #[test]
    fn sums_do_not_depend_on_workers() {
        for (rows, seqlen, heads) in [(1, 1000, 1), (16, 100, 2), (128, 256, 4), (2, 5000, 1)] {
            let problem = problem(rows, seqlen, heads);
            let cut = |workers| BackwardSchedule::new(&problem, workers, true);
            let (one, many) = (cut(1), cut(64));
            assert_eq!((one.shape, one.rows, one.chunk), (many.shape, many.rows, many.chunk));
            let cut = |workers| BackwardSchedule::new(&problem, workers, false);
            assert_eq!((cut(1).shape, cut(1).chunk), (cut(64).shape, cut(64).chunk));
        }
    }
}

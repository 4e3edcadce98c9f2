//! How a problem is cut into work items.
//!
//! Whatever changes the order of a sum depends on the problem alone, never on the number of threads: results are the same
//! bits for any number of them.

use std::ops::Range;

use tilefold_core::{AttentionProblem, AttentionSpec};

use super::forward::{Item, ItemShape};

/// Queries of a tile for vectors of so many lanes: whole register blocks, and with [`tile_keys`] a tile that fits the L1
/// cache.
pub(crate) const fn tile_queries(lanes: usize) -> usize {
    if lanes == 16 { 64 } else { 48 }
}

/// A slab's share of the cache in forward, which can cut queries freely.
const FORWARD_SLAB_BYTES: usize = 2 << 20;
/// A slab's share in backward, where a cut costs another pass over dK and dV.
const BACKWARD_SLAB_BYTES: usize = 4 << 20;
/// A slab larger than this, for one tile of queries, is not worth its memory: biases are read tile by tile.
const LARGEST_SLAB_BYTES: usize = 16 << 20;
/// Queries an item holds packed in backward when there is no slab.
const BACKWARD_QUERIES: usize = 4096;
/// Items of a worker where cutting rows costs nothing, since a worker keeps its slab: the last one is short.
const WORKER_ITEMS: usize = 32;
/// Items the backward pass aims at when sums must be split for it: enough for 16 workers.
const SPLIT_ITEMS: usize = 16;
/// Most chunks of queries: each holds dK and dV of its own.
const MAX_QUERY_CHUNKS: usize = 8;

/// Keys of a tile: fewer for wide heads, so that a packed tile stays in the L1 cache.
fn tile_keys(spec: &AttentionSpec, most: usize) -> usize {
    let channels = spec.head_dim.max(spec.head_dim_v).max(8);
    (4096 / channels).clamp(16, most).next_multiple_of(16)
}

/// Bytes of one position's heads that an item takes together: neighbours in memory, in lines the processor fetches ahead.
const RUN_BYTES: usize = 256;
/// Most heads of an item.
const MAX_HEADS: usize = 4;
/// Slab of an item's heads that leaves the L2 cache some room.
const SLAB_L2_BYTES: usize = 5 << 18;

/// Key heads of an item: several, at most `most`, for long runs of memory, as far as what rows share stays in the L2 cache.
fn item_heads(problem: &AttentionProblem, tile_k: usize, bias_sum: bool, most: usize) -> usize {
    let spec = problem.spec();
    let bytes = spec.head_dim.min(spec.head_dim_v) * spec.dtype.size_bytes();
    let mut most = (RUN_BYTES / bytes).min(most).clamp(1, MAX_HEADS.min(spec.kv_heads));
    if bias_sum || (spec.rows > 1 && shares_bias(spec)) {
        let slab = slab_bytes(problem, spec.seqlen_q, tile_k);
        most = most.min((SLAB_L2_BYTES / slab).max(1));
    }
    spec.kv_heads.div_ceil(spec.kv_heads.div_ceil(most))
}

/// Bytes of a slab for so many queries (or heads) of each head of a group; saturates.
fn slab_bytes(problem: &AttentionProblem, queries: usize, tile_k: usize) -> usize {
    let keys = problem.spec().seqlen_k.next_multiple_of(tile_k);
    [problem.group(), queries, size_of::<f32>()].into_iter().fold(keys, usize::saturating_mul)
}

/// Whether rows share a bias (or ALiBi) that a slab would hold.
fn shares_bias(spec: &AttentionSpec) -> bool {
    let per_row = |shape: &[usize; 5]| shape[1] != 1 && shape[3] != 1;
    let shared = |shape: &[usize; 5]| shape[1] == 1 && shape[3] != 1;
    let shapes = || spec.biases.iter().map(|bias| &bias.shape);
    shapes().any(shared) || (spec.mask.alibi_slopes.is_some() && !shapes().any(per_row))
}

/// Queries per item for a slab within `bytes`, cut evenly; `None` when a slab does not pay.
fn slab_queries(
    problem: &AttentionProblem,
    (tile_q, tile_k): (usize, usize),
    heads: usize,
    queries: usize,
    bytes: usize,
) -> Option<usize> {
    let spec = problem.spec();
    let per_query = slab_bytes(problem, heads, tile_k);
    let smallest = per_query.checked_mul(tile_q)?;
    if spec.rows < 2 || !shares_bias(spec) || smallest > LARGEST_SLAB_BYTES {
        return None;
    }
    Some(even_cut(queries, (bytes / per_query).max(tile_q), tile_q))
}

/// The length of equal parts of whole tiles, at most `most` each (or one tile).
fn even_cut(queries: usize, most: usize, tile_q: usize) -> usize {
    let tiles = queries.div_ceil(tile_q);
    let parts = tiles.div_ceil((most / tile_q).max(1));
    tiles.div_ceil(parts) * tile_q
}

/// Cut of a forward pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ForwardSchedule {
    pub(crate) shape: ItemShape,
    rows: usize,
}

impl ForwardSchedule {
    pub(crate) fn new(problem: &AttentionProblem, lanes: usize, workers: usize) -> Self {
        let (spec, tile_q) = (problem.spec(), tile_queries(lanes));
        let tile_k = tile_keys(spec, 96);
        let heads = item_heads(problem, tile_k, false, MAX_HEADS);
        let slab = slab_queries(problem, (tile_q, tile_k), heads, spec.seqlen_q, FORWARD_SLAB_BYTES);
        let outer = spec.batch * spec.kv_heads.div_ceil(heads);
        let wanted = workers * 8;
        // Without a slab a few tiles of queries are enough to pay for packing keys.
        let few = (spec.seqlen_q / (wanted / (outer * spec.rows)).max(1)).clamp(4 * tile_q, 16 * tile_q);
        let item_q = slab.unwrap_or_else(|| even_cut(spec.seqlen_q, few, tile_q));
        let parts = outer * spec.seqlen_q.div_ceil(item_q);
        let rows = (spec.rows * parts).div_ceil(workers * WORKER_ITEMS).clamp(1, spec.rows);
        Self { shape: ItemShape { tile_q, tile_k, item_q, heads, slab: slab.is_some(), whole_keys: false }, rows }
    }

    /// All items.
    pub(crate) fn items<'s>(&self, spec: &'s AttentionSpec) -> Items<'s> {
        Items { spec, heads: self.shape.heads, queries: self.shape.item_q, rows: self.rows }
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
    pub(crate) fn new(problem: &AttentionProblem, lanes: usize, workers: usize, bias_sum: bool) -> Self {
        let (spec, tile_q) = (problem.spec(), tile_queries(lanes));
        let tile_k = tile_keys(spec, 48);
        let most_row_chunks = match (bias_sum, spec.rows) {
            (true, ..8) => 1,
            (true, rows) => rows.div_ceil(4),
            (false, rows) => rows,
        };
        // Fewer heads of an item before chunks of queries, which cost another pass over dK and dV.
        let heads = item_heads(problem, tile_k, bias_sum, spec.batch * spec.kv_heads * most_row_chunks / SPLIT_ITEMS);
        let outer = spec.batch * spec.kv_heads.div_ceil(heads);
        let item_queries = |queries: usize| {
            let slab = slab_queries(problem, (tile_q, tile_k), heads, queries, BACKWARD_SLAB_BYTES);
            let most = if bias_sum {
                // The sum has the size of a slab, whether or not one is read.
                let per_query = slab_bytes(problem, heads, tile_k);
                BACKWARD_SLAB_BYTES / per_query
            } else {
                BACKWARD_QUERIES / problem.group()
            };
            (slab.unwrap_or_else(|| even_cut(queries, most.max(tile_q), tile_q)), slab.is_some())
        };
        let most_chunks = (spec.seqlen_q / (2 * tile_q)).clamp(1, MAX_QUERY_CHUNKS);
        // Queries that are cut in any case make items of their own, as far as those are too few: chunks of rows would each
        // hold a sum of all dS, chunks of queries only dK and dV.
        let parts =
            spec.seqlen_q.div_ceil(item_queries(spec.seqlen_q).0).min(most_chunks).min(SPLIT_ITEMS.div_ceil(outer));
        let parts = if bias_sum { parts } else { 1 };
        let row_chunks = if bias_sum { SPLIT_ITEMS.div_ceil(outer * parts).min(most_row_chunks) } else { spec.rows };
        let items = outer * parts * row_chunks;
        let query_chunks = (parts * SPLIT_ITEMS.div_ceil(items)).min(most_chunks);
        let chunk = even_cut(spec.seqlen_q, spec.seqlen_q.div_ceil(query_chunks).next_multiple_of(tile_q), tile_q);
        let (item_q, slab) = item_queries(chunk);
        let rows = if bias_sum {
            spec.rows.div_ceil(row_chunks)
        } else {
            (spec.rows * outer * spec.seqlen_q.div_ceil(chunk)).div_ceil(workers * WORKER_ITEMS).clamp(1, spec.rows)
        };
        let whole_keys = !slab && !bias_sum && item_q < chunk;
        Self { shape: ItemShape { tile_q, tile_k, item_q, heads, slab, whole_keys }, rows, chunk }
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
        self.chunk < spec.seqlen_q || (self.shape.item_q < self.chunk && !self.shape.whole_keys)
    }

    /// All items.
    pub(crate) fn items<'s>(&self, spec: &'s AttentionSpec) -> Items<'s> {
        Items { spec, heads: self.shape.heads, queries: self.chunk, rows: self.rows }
    }
}

/// The items of a pass, made when their turn comes: a list of them could be larger than the operands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Items<'s> {
    spec: &'s AttentionSpec,
    /// Key heads, queries and rows of an item.
    heads: usize,
    queries: usize,
    rows: usize,
}

impl Items<'_> {
    /// Number of items.
    pub(crate) fn len(&self) -> usize {
        let [heads, queries, rows] = self.parts();
        self.spec.batch * heads * queries * rows
    }

    /// Item `index`; neighbours differ in their rows and share a slab.
    pub(crate) fn item(&self, index: usize) -> Item {
        let [heads, queries, rows] = self.parts();
        Item {
            batch: index / rows / queries / heads,
            kv_heads: part(index / rows / queries % heads, self.heads, self.spec.kv_heads),
            queries: part(index / rows % queries, self.queries, self.spec.seqlen_q),
            rows: part(index % rows, self.rows, self.spec.rows),
        }
    }

    fn parts(&self) -> [usize; 3] {
        let spec = self.spec;
        [spec.kv_heads.div_ceil(self.heads), spec.seqlen_q.div_ceil(self.queries), spec.rows.div_ceil(self.rows)]
    }
}

/// Part `index` of `0..size` in parts of `length`, the last one shorter.
pub(crate) fn part(index: usize, length: usize, size: usize) -> Range<usize> {
    index * length..((index + 1) * length).min(size)
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

    fn problem(batch: usize, rows: usize, seqlen: usize, heads: usize) -> AttentionProblem {
        let mut spec = AttentionSpec::new(DType::F32, batch, rows, seqlen, heads, 32);
        spec.biases.push(BiasSpec { shape: [1, 1, heads, seqlen, seqlen], dtype: DType::F32 });
        AttentionProblem::new(spec.with_all_gradients()).unwrap()
    }

    #[test]
    fn items_cover_everything_once() {
        for (rows, seqlen, heads) in [(1, 1, 1), (3, 100, 2), (128, 256, 8), (5, 5000, 1), (300, 47, 3)] {
            let batch = 2;
            let problem = problem(batch, rows, seqlen, heads);
            let spec = problem.spec();
            for lanes in [4, 8, 16] {
                let forward = ForwardSchedule::new(&problem, lanes, 2).items(spec);
                let backward = [true, false].map(|sum| BackwardSchedule::new(&problem, lanes, 2, sum).items(spec));
                for items in [forward].into_iter().chain(backward) {
                    let mut seen = vec![0_u8; batch * rows * seqlen * heads];
                    for item in (0..items.len()).map(|index| items.item(index)) {
                        assert_eq!(item.queries.start % tile_queries(lanes), 0);
                        for (row, head) in item.rows.flat_map(|row| item.kv_heads.clone().map(move |head| (row, head)))
                        {
                            let at = ((item.batch * rows + row) * heads + head) * seqlen;
                            seen[at..][item.queries.clone()].iter_mut().for_each(|seen| *seen += 1);
                        }
                    }
                    assert!(seen.iter().all(|&times| times == 1), "{items:?}");
                }
            }
        }
    }

    #[test]
    fn sums_do_not_depend_on_workers() {
        for (rows, seqlen, heads) in [(1, 1000, 1), (16, 100, 2), (128, 256, 4), (2, 5000, 1)] {
            let problem = problem(1, rows, seqlen, heads);
            let cut = |workers| BackwardSchedule::new(&problem, 8, workers, true);
            let (one, many) = (cut(1), cut(64));
            assert_eq!((one.shape, one.rows, one.chunk), (many.shape, many.rows, many.chunk));
            let cut = |workers| BackwardSchedule::new(&problem, 8, workers, false);
            assert_eq!((cut(1).shape, cut(1).chunk), (cut(64).shape, cut(64).chunk));
        }
    }
}

//! Which passes a problem's backward takes, how their work is cut into chunks, and the workspace this needs.

use tilefold_core::{AttentionProblem, AttentionSpec, BiasSpec, EmptyRows, MAX_BIASES};

use super::tiles::{Channels, KeyTiles, KeyWork, QueryTiles, QueryWork, padded};
use crate::vendor::Vendor;

/// Blocks that fill a device: two on each of 108 multiprocessors. One number for every device, so that sums have the same
/// order everywhere.
const BLOCKS_TO_FILL: u64 = 216;

/// Chunks a walk is cut into at most: partial sums take that many times the memory of a result in f32.
const MOST_CHUNKS: u64 = 8;

/// Tiles of keys that share the queries of one dQ at most, when bias gradients come out of the same pass.
const MOST_KEY_PARTS: u64 = 4;

/// Where the gradient of a bias comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reduction {
    /// Both axes: a block owns a tile of it and walks over the axes (batch, rows, heads) that are true.
    Pairs([bool; 3]),
    /// No query axis: sums of dS over queries, from the pass by keys.
    Queries,
    /// No key axis: sums of dS over keys, from the pass by queries.
    Keys,
}

impl Reduction {
    /// That of one bias.
    pub(crate) fn of(bias: &BiasSpec, spec: &AttentionSpec) -> Self {
        let [batch, rows, heads, queries, keys] = bias.shape;
        if keys == 1 {
            Self::Keys
        } else if queries == 1 {
            Self::Queries
        } else {
            Self::Pairs([batch < spec.batch, rows < spec.rows, heads < spec.heads])
        }
    }
}

/// A walk cut into chunks of `chunk` entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunks {
    pub(crate) count: u64,
    pub(crate) chunk: u64,
}

impl Chunks {
    /// As many chunks of `entries` as fill a device when there are `blocks` walks.
    fn new(blocks: u64, entries: u64) -> Self {
        let count = BLOCKS_TO_FILL.div_ceil(blocks.max(1)).min(MOST_CHUNKS).min(entries.max(1));
        let chunk = entries.max(1).div_ceil(count);
        Self { count: entries.max(1).div_ceil(chunk), chunk }
    }
}

/// One pass by keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct KeyPass {
    pub(crate) dk: bool,
    pub(crate) dv: bool,
    pub(crate) sums: bool,
    pub(crate) tiles: KeyTiles,
}

/// One pass by queries.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct QueryPass {
    pub(crate) dq: bool,
    pub(crate) sums: bool,
    /// Biases whose gradient it computes, which share the axes it walks over.
    pub(crate) biases: Vec<usize>,
    /// Axes it walks over: batch, rows, heads.
    pub(crate) walked: [bool; 3],
    pub(crate) terms: Chunks,
    /// Tiles of keys of a bias gradient; each leaves a partial dQ when there are several.
    pub(crate) key_parts: u64,
    /// Whether dQ is left as partial sums.
    pub(crate) dq_partials: bool,
    pub(crate) blocks: u64,
    pub(crate) tiles: QueryTiles,
}

/// Where the pieces of the workspace start, in bytes; those that are not needed take nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Workspace {
    pub(crate) statistics: u64,
    pub(crate) d_o: u64,
    pub(crate) uniform_sums: u64,
    pub(crate) key_sums: u64,
    pub(crate) query_sums: u64,
    pub(crate) dq_partials: u64,
    pub(crate) dk_partials: u64,
    pub(crate) dv_partials: u64,
    pub(crate) dbias_partials: u64,
    pub(crate) bytes: u64,
}

/// The whole backward pass.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Schedule {
    pub(crate) keys: Vec<KeyPass>,
    pub(crate) queries: Vec<QueryPass>,
    /// Of queries, shared by the passes by keys.
    pub(crate) query_chunks: Chunks,
    pub(crate) workspace: Workspace,
    /// Whether rows without keys give every dV something.
    pub(crate) uniform: bool,
}

impl Schedule {
    /// Decides from the problem alone, so that the workspace is known before a launch.
    pub(crate) fn new(vendor: Vendor, problem: &AttentionProblem) -> Self {
        let (spec, wanted) = (problem.spec(), problem.spec().gradients);
        let channels = Channels::of(spec);
        let biases = || spec.biases.iter().enumerate().filter(|(i, _)| wanted.biases[*i]);
        let any = |reduction| biases().any(|(_, bias)| Reduction::of(bias, spec) == reduction);

        let mut keys = Vec::new();
        let mut key_pass = |dk, dv, sums| {
            let intricate = is_intricate(spec);
            let tiles =
                KeyTiles::choose(vendor, channels, KeyWork { dk, dv, sums, intricate }, spec.seqlen_q, spec.seqlen_k);
            keys.push(KeyPass { dk, dv, sums, tiles });
        };
        match (wanted.k, wanted.v, any(Reduction::Queries)) {
            (false, false, false) => {}
            (true, true, sums) if !channels.keys_in_one_pass() => {
                key_pass(true, false, sums);
                key_pass(false, true, false);
            }
            (dk, dv, sums) => key_pass(dk, dv, sums),
        }
        let query_chunks = keys.first().map_or(Chunks { count: 1, chunk: 1 }, |pass: &KeyPass| {
            let owners = outer(spec) * spec.kv_heads as u64;
            let blocks = owners * tiles(spec.seqlen_k, pass.tiles.tile_k());
            Chunks::new(blocks, tiles(spec.seqlen_q, pass.tiles.tile_q))
        });
        let queries = query_passes(vendor, spec, channels, any(Reduction::Keys));
        let uniform = spec.empty_rows == EmptyRows::Uniform && wanted.v;
        let mut schedule = Self { keys, queries, query_chunks, workspace: Workspace::default(), uniform };
        schedule.workspace = schedule.workspace(spec, channels);
        schedule
    }

    /// Whether any pass runs beside the preparation.
    pub(crate) fn has_passes(&self) -> bool {
        !self.keys.is_empty() || !self.queries.is_empty() || self.uniform
    }

    fn workspace(&self, spec: &AttentionSpec, channels: Channels) -> Workspace {
        let mut next = 0_u64;
        let mut piece = |elements: &[u64], bytes: u64| {
            let start = next;
            let size = elements.iter().fold(bytes, |product, &size| product.saturating_mul(size));
            next = next.saturating_add(size).checked_next_multiple_of(256).unwrap_or(u64::MAX);
            start
        };
        let when = |wanted: bool| u64::from(wanted);
        let (outer, heads, kv_heads) = (outer(spec), spec.heads as u64, spec.kv_heads as u64);
        let (seqlen_q, seqlen_k) = (spec.seqlen_q as u64, spec.seqlen_k as u64);
        let key_chunks = self.query_chunks.count;
        let partials = |wanted: bool| when(wanted && key_chunks > 1) * key_chunks;
        let sums = |wanted: bool| when(wanted);
        let key = |f: fn(&KeyPass) -> bool| self.keys.iter().any(f);
        let dq_parts = self.queries.iter().map(|pass| when(pass.dq_partials) * pass.key_parts).max().unwrap_or(0);
        let dbias =
            self.queries.iter().map(|pass| when(pass.terms.count > 1) * pass.terms.count * owners(spec, pass)).max();
        let (dims, dims_v) = (u64::from(channels.head_dim), u64::from(channels.head_dim_v));
        let mut workspace = Workspace {
            statistics: piece(&[3, outer, heads, padded_queries(spec.seqlen_q)], 4),
            d_o: piece(
                &[when(spec.gate && self.has_passes()), outer, heads, seqlen_q, u64::from(padded(channels.head_dim_v))],
                u64::from(channels.element),
            ),
            uniform_sums: piece(&[when(self.uniform), outer, kv_heads, dims_v], 4),
            key_sums: piece(&[sums(key(|pass| pass.sums)) * key_chunks, outer, heads, seqlen_k], 4),
            query_sums: piece(&[sums(self.queries.iter().any(|pass| pass.sums)), outer, heads, seqlen_q], 4),
            dq_partials: piece(&[dq_parts, outer, heads, seqlen_q, dims], 4),
            dk_partials: piece(&[partials(key(|pass| pass.dk)), outer, kv_heads, seqlen_k, dims], 4),
            dv_partials: piece(&[partials(key(|pass| pass.dv)), outer, kv_heads, seqlen_k, dims_v], 4),
            dbias_partials: piece(&[dbias.unwrap_or(0), seqlen_q, seqlen_k], 4),
            bytes: 0,
        };
        workspace.bytes = next;
        workspace
    }
}

/// Queries of a row of statistics, whole tiles of every pass but those with more than 64 queries: lse of those that do not
/// exist is infinite.
pub(crate) fn padded_queries(seqlen_q: usize) -> u64 {
    (seqlen_q as u64).next_multiple_of(64)
}

/// Batches times rows.
fn outer(spec: &AttentionSpec) -> u64 {
    (spec.batch as u64).saturating_mul(spec.rows as u64)
}

/// Tiles of `tile` that cover `length`.
pub(crate) fn tiles(length: usize, tile: u32) -> u64 {
    (length as u64).div_ceil(u64::from(tile))
}

/// (batch, row, head) that a pass does not walk over.
pub(crate) fn owners(spec: &AttentionSpec, pass: &QueryPass) -> u64 {
    let sizes = [spec.batch, spec.rows, spec.heads];
    sizes.iter().zip(pass.walked).map(|(&size, walked)| if walked { 1 } else { size as u64 }).product()
}

/// Whether logits take registers for more than products.
fn is_intricate(spec: &AttentionSpec) -> bool {
    spec.segments || spec.biases.len() > 2
}

fn query_passes(vendor: Vendor, spec: &AttentionSpec, channels: Channels, sums: bool) -> Vec<QueryPass> {
    let wanted = spec.gradients;
    // Biases that are summed over the same axes share a pass.
    let mut groups: Vec<([bool; 3], Vec<usize>)> = Vec::new();
    for (i, bias) in spec.biases.iter().enumerate().take(MAX_BIASES).filter(|(i, _)| wanted.biases[*i]) {
        if let Reduction::Pairs(walked) = Reduction::of(bias, spec) {
            match groups.iter_mut().find(|(axes, _)| *axes == walked) {
                Some((_, members)) => members.push(i),
                None => groups.push((walked, vec![i])),
            }
        }
    }
    let pass = |work: QueryWork, (walked, biases): ([bool; 3], Vec<usize>), sums: bool| {
        let tiles_of = QueryTiles::choose(vendor, channels, work, spec.seqlen_q, is_intricate(spec))?;
        let dq = matches!(work, QueryWork::Both | QueryWork::Queries);
        let key_parts = if biases.is_empty() { 1 } else { tiles(spec.seqlen_k, tiles_of.tile_k()) };
        let mut pass = QueryPass {
            dq,
            sums,
            biases,
            walked,
            terms: Chunks { count: 1, chunk: 1 },
            key_parts,
            dq_partials: dq && key_parts > 1,
            blocks: 0,
            tiles: tiles_of,
        };
        let sizes = [spec.batch, spec.rows, spec.heads];
        let terms = sizes.iter().zip(walked).map(|(&size, walked)| if walked { size as u64 } else { 1 }).product();
        let walks = owners(spec, &pass) * tiles(spec.seqlen_q, pass.tiles.tile_q()) * key_parts;
        // A block of eight warps fills what two of four do.
        let filled = walks * u64::from(pass.tiles.warps / 4).max(1);
        pass.terms = if pass.biases.is_empty() { pass.terms } else { Chunks::new(filled, terms) };
        pass.blocks = walks * pass.terms.count;
        Some(pass)
    };
    let mut passes = Vec::new();
    let mut alone = wanted.q || sums;
    for group in groups {
        if alone && !sums {
            let both = pass(QueryWork::Both, group.clone(), false);
            if let Some(both) = both.filter(|both| both.key_parts <= MOST_KEY_PARTS) {
                passes.push(both);
                alone = false;
                continue;
            }
        }
        passes.extend(pass(QueryWork::Bias, group, false));
    }
    if alone {
        let work = if wanted.q { QueryWork::Queries } else { QueryWork::Sums };
        passes.extend(pass(work, ([false; 3], Vec::new()), sums));
    }
    passes
}

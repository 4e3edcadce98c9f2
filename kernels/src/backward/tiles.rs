//! Tile sizes of the backward kernels, chosen by element size and head dimensions, and the shared memory they take.

use tilefold_core::{AttentionSpec, DType};

use crate::vendor::Vendor;

/// Accumulated channels, dK and dV together, beyond which they are computed in two passes: of half types, of f32, whose
/// products take twice the registers.
const MOST_ACCUMULATED: [u32; 2] = [256, 128];

/// A tile in shared memory, as `Tile` of `include/fragment.cuh`.
fn tile_bytes(rows: u32, channels: u32, element: u32) -> u32 {
    let pieces = padded(channels) * element / 16;
    rows * (pieces | 1) * 16
}

/// Channels rounded up to eight.
pub(crate) fn padded(channels: u32) -> u32 {
    channels.next_multiple_of(8)
}

fn small(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

/// Whether tiles of 128 queries are no more than those of 64, to which statistics are padded.
fn fills_wide_tiles(seqlen_q: usize) -> bool {
    seqlen_q.next_multiple_of(64).is_multiple_of(128)
}

/// What tile sizes depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Channels {
    /// Bytes of an element.
    pub(crate) element: u32,
    /// Channels of q and k.
    pub(crate) head_dim: u32,
    /// Channels of v and out.
    pub(crate) head_dim_v: u32,
}

impl Channels {
    /// Those of a problem, whose head dimensions are at most 256.
    pub(crate) fn of(spec: &AttentionSpec) -> Self {
        Self {
            element: small(spec.dtype.size_bytes()),
            head_dim: small(spec.head_dim),
            head_dim_v: small(spec.head_dim_v),
        }
    }

    pub(crate) fn largest(self) -> u32 {
        padded(self.head_dim.max(self.head_dim_v))
    }

    fn is_single(self) -> bool {
        self.element == small(DType::F32.size_bytes())
    }

    /// Whether dK and dV have room in one pass.
    pub(crate) fn keys_in_one_pass(self) -> bool {
        padded(self.head_dim) + padded(self.head_dim_v) <= MOST_ACCUMULATED[usize::from(self.is_single())]
    }
}

/// What a pass by keys computes: dK, dV, sums of dS over queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeyWork {
    pub(crate) dk: bool,
    pub(crate) dv: bool,
    pub(crate) sums: bool,
    /// Whether logits take registers for more than products: segments, or more than two biases.
    pub(crate) intricate: bool,
}

/// Tiles of the pass by keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeyTiles {
    vendor: Vendor,
    pub(crate) warps: u32,
    /// Groups of a warp's keys: 16 each, 32 on AMD.
    pub(crate) row_tiles: u32,
    /// Queries of one step.
    pub(crate) tile_q: u32,
    /// Steps in shared memory at once.
    pub(crate) stages: u32,
    /// Whether a warp keeps its keys and values in registers.
    pub(crate) in_registers: bool,
    /// Blocks of a multiprocessor that registers are to leave room for.
    pub(crate) min_blocks: u32,
    pub(crate) shared_bytes: u32,
}

impl KeyTiles {
    /// Keys of a block.
    pub(crate) fn tile_k(&self) -> u32 {
        self.warps * small(self.vendor.product_rows()) * self.row_tiles
    }

    /// Threads of a block.
    pub(crate) fn threads(&self) -> u32 {
        self.warps * small(self.vendor.warp_threads())
    }

    /// The choice for a problem.
    pub(crate) fn choose(vendor: Vendor, channels: Channels, work: KeyWork, seqlen_q: usize, seqlen_k: usize) -> Self {
        match vendor {
            Vendor::Nvidia => Self::nvidia(channels, work, seqlen_q),
            Vendor::Amd => Self::amd(channels, work, small(seqlen_k)),
        }
    }

    fn nvidia(channels: Channels, work: KeyWork, seqlen_q: usize) -> Self {
        // More queries share what a step costs, unless half of them would not exist.
        let many = if fills_wide_tiles(seqlen_q) { 128 } else { 64 };
        let (warps, row_tiles, tile_q, stages, in_registers) = match (channels.is_single(), channels.largest()) {
            (false, ..=32) if work.intricate => (4, 1, 16, 2, true),
            (false, ..=32) => (4, 2, many, 2, true),
            (false, 33..=64) => (4, 1, 32, 2, true),
            (false, _) => (4, 1, 16, 2, false),
            (true, ..=32) if work.intricate => (4, 1, 16, 2, false),
            (true, ..=32) => (4, 1, 32, 2, false),
            (true, 33..=128) => (4, 1, 16, 1, false),
            (true, _) => (2, 1, 16, 1, false),
        };
        let vendor = Vendor::Nvidia;
        // Few channels leave registers for a third block.
        let min_blocks = if channels.is_single() || channels.largest() > 8 { 1 } else { 3 };
        let tiles = Self { vendor, warps, row_tiles, tile_q, stages, in_registers, min_blocks, shared_bytes: 0 };
        let rows = |rows, channels_of| tile_bytes(rows, channels_of, channels.element);
        let keys = rows(tiles.tile_k(), channels.head_dim)
            + if work.dk || work.sums { rows(tiles.tile_k(), channels.head_dim_v) } else { 0 };
        // Statistics have no bytes of their own where rows of q have an unused piece and fill the memory.
        let statistics = if !channels.is_single() && padded(channels.head_dim) == 256 { 0 } else { 3 * tile_q * 4 };
        let stage = rows(tile_q, channels.head_dim) + rows(tile_q, channels.head_dim_v) + statistics;
        // Keys pass through the memory that the steps take later.
        let shared_bytes = if in_registers { keys.max(stages * stage) } else { keys + stages * stage };
        Self { shared_bytes, ..tiles }
    }

    fn amd(channels: Channels, work: KeyWork, seqlen_k: u32) -> Self {
        // Waves of a SIMD that registers are to leave room for come last.
        let (row_tiles, stages, in_registers, waves): (u32, u32, bool, u32) =
            match (channels.is_single(), channels.largest()) {
                (_, ..=64) if work.intricate => (1, 1, true, 1),
                // More keys of a wave would save reads of queries, and spill from 16 channels on.
                (false, ..=8) => (2, 2, true, 2),
                (false, 9..=48) | (true, ..=32) => (1, 2, true, 2),
                (false, 49..=64) => (1, 1, true, 2),
                (_, ..=128) => (1, 1, true, 1),
                (..) => (1, 1, false, 1),
            };
        let vendor = Vendor::Amd;
        let keys = |warps: u32| seqlen_k.next_multiple_of(warps * row_tiles * small(vendor.product_rows()));
        let shared_bytes = stages * lds_stage_bytes(channels, work);
        // As many warps as leave the fewest keys of the last block without work; a block that has the LDS to itself takes all SIMDs.
        let alone = 2 * shared_bytes > small(Vendor::Amd.max_shared_bytes());
        let warps = [4, 3, 2, 1].into_iter().min_by_key(|&warps| if alone { 0 } else { keys(warps) }).unwrap_or(1);
        let min_blocks = (4 * waves).div_ceil(warps);
        Self { vendor, warps, row_tiles, tile_q: LDS_QUERIES, stages, in_registers, min_blocks, shared_bytes }
    }
}

/// Queries of a tile on AMD: rows of a product.
const LDS_QUERIES: u32 = 32;

/// Bytes of a tile of rows in the LDS of AMD, as `include/lds_hip.cuh` lays it out.
fn lds_rows(element: u32, rows: u32, channels: u32) -> u32 {
    let pieces = padded(channels) * element / 16;
    // Rows of 64 pieces fill the LDS and have no unused piece.
    rows * 16 * if pieces >= 64 { pieces } else { pieces | 1 }
}

/// The same transposed, which f32 has no use for.
fn lds_columns(element: u32, rows: u32, channels: u32) -> u32 {
    u32::from(element == 2) * padded(channels) * 16 * ((rows / 8) | 1)
}

/// A tile of keys in the LDS of AMD, as `include/query_products_hip.cuh` lays it out: rows of k and v, in the half types k
/// transposed for dQ, and where there is room which waves met an excluded key.
fn lds_key_bytes(channels: Channels, tile_k: u32, dq: bool) -> u32 {
    let Channels { element, head_dim, head_dim_v } = channels;
    let columns = u32::from(dq) * lds_columns(element, tile_k, head_dim);
    let tiles = lds_rows(element, tile_k, head_dim) + lds_rows(element, tile_k, head_dim_v) + columns;
    if tiles < small(Vendor::Amd.max_shared_bytes()) { tiles + 16 } else { tiles }
}

/// A tile of queries in the LDS of AMD, as `include/key_products_hip.cuh` lays it out: rows of q and dO, in the half types
/// both transposed, statistics; what the work has no use for takes no room.
fn lds_stage_bytes(channels: Channels, work: KeyWork) -> u32 {
    let Channels { element, head_dim, head_dim_v } = channels;
    let rows = |channels| lds_rows(element, LDS_QUERIES, channels);
    let columns = |channels, wanted| u32::from(wanted) * lds_columns(element, LDS_QUERIES, channels);
    let d_o = if work.dk || work.sums || element == 4 { rows(head_dim_v) } else { 0 };
    let tiles = rows(head_dim) + d_o + columns(head_dim, work.dk) + columns(head_dim_v, work.dv);
    // Where tiles fill the LDS, statistics are read from memory.
    if tiles < small(Vendor::Amd.max_shared_bytes()) { tiles + 3 * LDS_QUERIES * 4 } else { tiles }
}

/// Tiles of the passes with queries for rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueryTiles {
    vendor: Vendor,
    pub(crate) warps: u32,
    /// Groups of a warp's queries: 16 each, 32 on AMD.
    pub(crate) row_tiles: u32,
    /// Groups of eight keys of a warp that are computed at once, and how often in a tile.
    pub(crate) columns: u32,
    pub(crate) parts: u32,
    pub(crate) stages: u32,
    /// Whether a warp keeps its queries in registers.
    pub(crate) in_registers: bool,
    /// Blocks of a multiprocessor that registers are to leave room for.
    pub(crate) min_blocks: u32,
    pub(crate) shared_bytes: u32,
}

/// What a pass with queries for rows computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QueryWork {
    /// dQ and sums of dS over keys, walking over all keys.
    Queries,
    /// The sums alone.
    Sums,
    /// A bias gradient alone.
    Bias,
    /// Both, for a head dimension that leaves room.
    Both,
}

impl QueryTiles {
    /// Queries of a block.
    pub(crate) fn tile_q(&self) -> u32 {
        self.warps * small(self.vendor.product_rows()) * self.row_tiles
    }

    /// Threads of a block.
    pub(crate) fn threads(&self) -> u32 {
        self.warps * small(self.vendor.warp_threads())
    }

    /// Keys of a tile: those of a bias gradient, or of a step.
    pub(crate) fn tile_k(&self) -> u32 {
        8 * self.columns * self.parts
    }

    /// The choice for a problem; `None` where registers have no room for both kinds of work. `intricate`: logits take registers for
    /// more than products.
    pub(crate) fn choose(
        vendor: Vendor,
        channels: Channels,
        work: QueryWork,
        seqlen_q: usize,
        intricate: bool,
    ) -> Option<Self> {
        match vendor {
            Vendor::Nvidia => Self::nvidia(channels, work, seqlen_q, intricate),
            Vendor::Amd => Self::amd(channels, work, intricate),
        }
    }

    fn nvidia(channels: Channels, work: QueryWork, seqlen_q: usize, intricate: bool) -> Option<Self> {
        let bias = work == QueryWork::Bias;
        // Twice the queries save a third of the copies, unless half a block would be idle.
        let wide = if fills_wide_tiles(seqlen_q) { 8 } else { 4 };
        // Warps, row tiles; columns, parts; buffers.
        let ((warps, row_tiles), (columns, parts), stages) = match (channels.is_single(), channels.largest()) {
            _ if work == QueryWork::Both && intricate => return None,
            (false, ..=8) if work == QueryWork::Both => ((4, 1), (4, 4), 2),
            (false, 9..=16 | 32) if work == QueryWork::Both => ((wide, 1), (2, 8), 2),
            // Half steps of a product take registers.
            (false, 17..=32) if work == QueryWork::Both => ((wide, 1), (2, 4), 2),
            _ if work == QueryWork::Both => return None,
            (true, ..=32) if intricate => ((4, 1), (2, 1), 2),
            (false, ..=32) if intricate => ((4, 1), (2, 2), 2),
            (false, 17..=31) if bias => ((4, 1), (2, 8), 2),
            (false, ..=32) if bias => ((4, 2), (2, 4), 2),
            (false, ..=32) => ((4, 2), (2, 4), 2),
            (false, 33..=64) if bias => ((4, 1), (2, 4), 2),
            (false, 33..=64) => ((4, 1), (4, 2), 2),
            (false, 65..=128) if bias => ((2, 1), (2, 2), 2),
            (false, 65..=128) => ((4, 1), (4, 1), 2),
            // Two terms of each factor take registers.
            (true, ..=24) if bias => ((4, 1), (2, 4), 2),
            (true, 25..=32) => ((4, 1), (2, 2), 2),
            (true, ..=32) => ((4, 1), (4, 2), 2),
            (true, 33..=64) if bias => ((2, 1), (2, 2), 1),
            (true, 33..=64) => ((4, 1), (4, 1), 2),
            (true, 65..=128) if bias => ((2, 1), (2, 2), 1),
            (true, 65..=128) => ((4, 1), (2, 1), 1),
            (false, _) if !bias => ((2, 1), (2, 1), 2),
            (false | true, _) => ((2, 1), (2, 1), 1),
        };
        let in_registers = !channels.is_single() && channels.largest() <= if bias { 64 } else { 128 };
        let vendor = Vendor::Nvidia;
        let tiles =
            Self { vendor, warps, row_tiles, columns, parts, stages, in_registers, min_blocks: 1, shared_bytes: 0 };
        let rows = |rows, channels_of| tile_bytes(rows, channels_of, channels.element);
        let both = |count| rows(count, channels.head_dim) + rows(count, channels.head_dim_v);
        let queries = both(tiles.tile_q()) + 3 * tiles.tile_q() * 4;
        let keys = both(tiles.tile_k()) + if warps > 4 { 32 } else { 16 };
        let shared_bytes = if matches!(work, QueryWork::Queries | QueryWork::Sums) {
            queries + stages * keys
        } else {
            // And notes.
            stages * (queries + keys) + 64
        };
        Some(Self { shared_bytes, ..tiles })
    }

    fn amd(channels: Channels, work: QueryWork, intricate: bool) -> Option<Self> {
        let both = work == QueryWork::Both;
        // Products of 32 keys in a tile, buffers, whether q and dO stay in registers, waves of a SIMD.
        let (parts, stages, in_registers, waves): (u32, u32, bool, u32) =
            match (channels.is_single(), channels.largest()) {
                (false, ..=32) if !intricate => (2, 2, true, 2),
                (false, ..=32) if both => (1, 1, true, 1),
                _ if both => return None,
                (_, ..=64) if intricate => (1, 1, true, 1),
                (false, 33..=64) | (true, ..=32) => (1, 2, true, 2),
                (true, 33..=64) => (1, 1, true, 1),
                (..) => (1, 1, false, 1),
            };
        let (vendor, warps) = (Vendor::Amd, 4);
        let tile_k = parts * small(vendor.product_rows());
        let shared_bytes = stages * lds_key_bytes(channels, tile_k, both || work == QueryWork::Queries);
        Some(Self {
            vendor,
            warps,
            row_tiles: 1,
            columns: 4,
            parts,
            stages,
            in_registers,
            min_blocks: waves,
            shared_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::schedule::padded_queries;
    use super::*;

    /// Shared memory a block may have on every GPU from sm_80 on.
    const MAX_SHARED_BYTES: u32 = 101_376;

    #[test]
    fn every_head_dimension_has_tiles_that_fit() {
        for element in [2, 4] {
            for head_dim in 1..=256 {
                for head_dim_v in [1, head_dim, 256] {
                    let channels = Channels { element, head_dim, head_dim_v };
                    for (vendor, limit) in [(Vendor::Nvidia, MAX_SHARED_BYTES), (Vendor::Amd, 64 * 1024)] {
                        let both = channels.keys_in_one_pass();
                        for (dk, dv) in [(true, both), (both, true)] {
                            let work = KeyWork { dk, dv, sums: dk, intricate: false };
                            for seqlen_q in [1, 64, 65, 128, 129] {
                                let tiles = KeyTiles::choose(vendor, channels, work, seqlen_q, 4096);
                                assert!(tiles.shared_bytes <= limit, "{vendor:?} {channels:?}");
                                // Statistics of a row are whole tiles.
                                let statistics = padded_queries(seqlen_q);
                                assert!(statistics.is_multiple_of(u64::from(tiles.tile_q)), "{channels:?} {seqlen_q}");
                            }
                        }
                        for work in [QueryWork::Queries, QueryWork::Sums, QueryWork::Bias, QueryWork::Both] {
                            for seqlen_q in [64, 128] {
                                let bytes = QueryTiles::choose(vendor, channels, work, seqlen_q, false)
                                    .map(|tiles| tiles.shared_bytes);
                                assert!(bytes.is_none_or(|bytes| bytes <= limit), "{vendor:?} {channels:?} {work:?}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn amd_takes_the_warps_that_leave_the_fewest_keys_idle() {
        let channels = Channels { element: 2, head_dim: 8, head_dim_v: 8 };
        let work = KeyWork { dk: true, dv: true, sums: false, intricate: false };
        let warps = |seqlen_k| KeyTiles::choose(Vendor::Amd, channels, work, 128, seqlen_k).warps;
        assert_eq!([64, 128, 256, 384, 512].map(warps), [1, 2, 4, 3, 4]);
    }
}

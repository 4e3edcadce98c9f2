//! Tile sizes of the backward kernels, chosen by element size and head dimensions, and the shared memory they take.

use tilefold_core::{AttentionSpec, DType};

/// Accumulated channels, dK and dV together, beyond which they are computed in two passes.
const MOST_ACCUMULATED: u32 = 256;

/// A tile in shared memory, as `Tile` of `include/fragment.cuh`.
fn tile_bytes(rows: u32, channels: u32, element: u32) -> u32 {
    let pieces = padded(channels) * element / 16;
    rows * (pieces | 1) * 16
}

/// Channels rounded up to eight.
pub(crate) fn padded(channels: u32) -> u32 {
    channels.next_multiple_of(8)
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
        let small = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
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
        self.element == u32::try_from(DType::F32.size_bytes()).unwrap_or(4)
    }

    /// Whether dK and dV have room in one pass.
    pub(crate) fn keys_in_one_pass(self) -> bool {
        padded(self.head_dim) + padded(self.head_dim_v) <= MOST_ACCUMULATED
    }
}

/// Tiles of the pass by keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeyTiles {
    pub(crate) warps: u32,
    /// Groups of 16 keys of a warp.
    pub(crate) row_tiles: u32,
    /// Queries of one step.
    pub(crate) tile_q: u32,
    /// Steps in shared memory at once.
    pub(crate) stages: u32,
    /// Whether a warp keeps its keys and values in registers.
    pub(crate) in_registers: bool,
    pub(crate) shared_bytes: u32,
}

impl KeyTiles {
    /// Keys of a block.
    pub(crate) fn tile_k(&self) -> u32 {
        self.warps * 16 * self.row_tiles
    }

    /// The choice for a problem; `needs_v` says that dS is computed.
    pub(crate) fn choose(channels: Channels, needs_v: bool) -> Self {
        let (warps, row_tiles, tile_q, stages, in_registers) = match (channels.is_single(), channels.largest()) {
            (false, ..=32) => (4, 2, 32, 2, true),
            (false, 33..=64) => (4, 1, 32, 2, true),
            (false, 65..=128) => (4, 1, 32, 2, false),
            (false, _) => (2, 1, 16, 2, false),
            (true, ..=64) => (4, 1, 32, 2, false),
            (true, 65..=128) => (2, 1, 16, 2, false),
            (true, _) => (2, 1, 16, 1, false),
        };
        let tiles = Self { warps, row_tiles, tile_q, stages, in_registers, shared_bytes: 0 };
        let rows = |rows, channels_of| tile_bytes(rows, channels_of, channels.element);
        let keys = rows(tiles.tile_k(), channels.head_dim)
            + if needs_v { rows(tiles.tile_k(), channels.head_dim_v) } else { 0 };
        let stage = rows(tile_q, channels.head_dim) + rows(tile_q, channels.head_dim_v) + 3 * tile_q * 4;
        Self { shared_bytes: keys + stages * stage, ..tiles }
    }
}

/// Tiles of the passes with queries for rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueryTiles {
    pub(crate) warps: u32,
    /// Groups of 16 queries of a warp.
    pub(crate) row_tiles: u32,
    /// Groups of eight keys of a warp that are computed at once, and how often in a tile.
    pub(crate) columns: u32,
    pub(crate) parts: u32,
    pub(crate) stages: u32,
    /// Whether a warp keeps its queries in registers.
    pub(crate) in_registers: bool,
    pub(crate) shared_bytes: u32,
}

/// What a pass with queries for rows computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QueryWork {
    /// dQ and sums of dS over keys, walking over all keys.
    Queries,
    /// A bias gradient alone.
    Bias,
    /// Both, for a head dimension that leaves room.
    Both,
}

impl QueryTiles {
    /// Queries of a block.
    pub(crate) fn tile_q(&self) -> u32 {
        self.warps * 16 * self.row_tiles
    }

    /// Keys of a tile: those of a bias gradient, or of a step.
    pub(crate) fn tile_k(&self) -> u32 {
        8 * self.columns * self.parts
    }

    /// The choice for a problem; `None` where registers have no room for both kinds of work.
    pub(crate) fn choose(channels: Channels, work: QueryWork) -> Option<Self> {
        let bias = work == QueryWork::Bias;
        // Warps, row tiles; columns, parts; buffers.
        let ((warps, row_tiles), (columns, parts), stages) = match (channels.is_single(), channels.largest()) {
            (false, ..=8) if work == QueryWork::Both => ((4, 1), (4, 4), 2),
            (false, 9..=16 | 32) if work == QueryWork::Both => ((4, 1), (2, 8), 2),
            // Half steps of a product take registers.
            (false, 17..=32) if work == QueryWork::Both => ((4, 1), (2, 4), 2),
            _ if work == QueryWork::Both => return None,
            (false, 17..=31) if bias => ((4, 1), (2, 8), 2),
            (false, ..=32) if bias => ((4, 2), (2, 4), 2),
            (false, ..=32) => ((4, 2), (2, 4), 2),
            (false, 33..=64) if bias => ((4, 1), (2, 4), 2),
            (false, 33..=64) => ((4, 1), (4, 2), 2),
            (false, 65..=128) if bias => ((2, 1), (2, 2), 2),
            (false, 65..=128) => ((4, 1), (4, 1), 2),
            (true, ..=32) => ((4, 1), (4, 2), 2),
            (true, 33..=64) if bias => ((2, 1), (4, 1), 2),
            (true, 33..=64) => ((4, 1), (4, 1), 2),
            (true, 65..=128) if bias => ((2, 1), (4, 1), 1),
            (true, 65..=128) => ((2, 1), (2, 1), 2),
            (false, _) if !bias => ((2, 1), (2, 1), 2),
            (false | true, _) => ((2, 1), (2, 1), 1),
        };
        let in_registers = !channels.is_single() && channels.largest() <= if bias { 64 } else { 128 };
        let tiles = Self { warps, row_tiles, columns, parts, stages, in_registers, shared_bytes: 0 };
        let rows = |rows, channels_of| tile_bytes(rows, channels_of, channels.element);
        let both = |count| rows(count, channels.head_dim) + rows(count, channels.head_dim_v);
        let queries = both(tiles.tile_q()) + 3 * tiles.tile_q() * 4;
        let keys = both(tiles.tile_k()) + 16;
        let shared_bytes = if work == QueryWork::Queries {
            queries + stages * keys
        } else {
            // And notes.
            stages * (queries + keys) + 48
        };
        Some(Self { shared_bytes, ..tiles })
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
                    let tiles = KeyTiles::choose(channels, true);
                    assert!(tiles.shared_bytes <= MAX_SHARED_BYTES, "{channels:?}");
                    // Statistics of a row are whole tiles.
                    assert!(padded_queries(1).is_multiple_of(u64::from(tiles.tile_q)), "{channels:?}");
                    for work in [QueryWork::Queries, QueryWork::Bias, QueryWork::Both] {
                        let bytes = QueryTiles::choose(channels, work).map(|tiles| tiles.shared_bytes);
                        assert!(bytes.is_none_or(|bytes| bytes <= MAX_SHARED_BYTES), "{channels:?} {work:?} {bytes:?}");
                    }
                }
            }
        }
    }
}

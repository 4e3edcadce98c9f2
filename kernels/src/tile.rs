//! The layout of tiles in shared memory: the arithmetic of `include/tile.cuh` and `include/tile_hip.cuh`.

use tilefold_core::DType;

/// Bytes of a piece, the unit of moves.
pub const PIECE_BYTES: usize = 16;

/// Shared memory a block may have on every supported device: 99 KiB (sm_86, sm_89), of which 1 KiB is kept back.
pub const MAX_SHARED_BYTES: usize = 98 * 1024;

/// Bytes of a tile in shared memory.
#[must_use]
pub fn tile_bytes(dtype: DType, rows: usize, channels: usize) -> usize {
    let pieces = channels.next_multiple_of(8) * dtype.size_bytes() / PIECE_BYTES;
    let pitch = match pieces {
        0..=2 => pieces,
        3 | 4 => 4,
        _ => pieces.next_multiple_of(8),
    };
    rows * pitch * PIECE_BYTES
}

/// Bytes of a tile of k and one of v in the LDS of AMD: rows have an odd number of pieces, v of a half type is transposed.
#[must_use]
pub(crate) fn lds_bytes(dtype: DType, tile_k: usize, head_dim: usize, head_dim_v: usize) -> usize {
    let pieces = |elements: usize| elements.next_multiple_of(8) * dtype.size_bytes() / PIECE_BYTES;
    // Rows of 64 pieces fill the LDS and have no unused piece.
    let odd = |pieces: usize| if pieces >= 64 { pieces } else { pieces | 1 };
    let keys = tile_k * odd(pieces(head_dim));
    let values = match dtype {
        DType::F32 => tile_k * pieces(head_dim_v),
        _ => head_dim_v.next_multiple_of(8) * (pieces(tile_k) | 1),
    };
    (keys + values) * PIECE_BYTES
}

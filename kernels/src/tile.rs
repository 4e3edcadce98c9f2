//! The layout of tiles in shared memory: the arithmetic of `include/tile.cuh`.

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

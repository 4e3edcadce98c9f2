// Tiles of keys and values in LDS on AMD, and their way there through registers, with the products of products_hip.cuh in
// view: a product reads 32 rows of its left factor, lane c of each half wave row c, in pieces of 16 bytes.
//
// Rows have an odd number of pieces, the last one unused where need be, so that eight lanes read from all banks.
//
//   k                 a row for each key, in the order of products: see `row_of_key`
//   v, half types     transposed: a row for each channel, keys in their own order
//   v, f32            a row for each key, in their own order: a product reads one number of each lane's row
#pragma once

#include "mma_hip.cuh"

constexpr int LANE_KEYS = TILE_K / 2;  // neighbouring keys that one of a row's two lanes owns

// Row c of product t is row 32 t + c. A lane of half h receives of it rows c = 8 g + 4 h + i (i below 4) as number
// 4 g + i, which are to be its keys 16 t + 4 g + i.
DEVICE int row_of_key(int key) {
    const int half = key / LANE_KEYS, own = key % LANE_KEYS;
    return own / 16 * 32 + own / 4 % 4 * 8 + half * 4 + own % 4;
}
// The key of row c of product t.
DEVICE int key_of_row(int product, int c) { return c / 4 % 2 * LANE_KEYS + 16 * product + c / 8 * 4 + c % 4; }

struct KeyTileShape {
    static constexpr int pieces = pieces_of<ELEMENT>(HEAD_DIM);
    static constexpr int channels = HEAD_DIM;
    // The widest rows leave no room for an unused piece: the places of pieces are turned by the row instead.
    static constexpr bool turned = pieces >= 64;
    static constexpr int pitch = turned ? pieces : pieces | 1;
    static constexpr int size = TILE_K * pitch;  // in pieces
    static DEVICE int slot(int row, int piece) { return row * pitch + (turned ? piece ^ (row & 7) : piece); }
    // Where a key's piece lies.
    static DEVICE int place(int key, int piece) { return slot(row_of_key(key), piece); }
};

struct ValueTile {
    static constexpr int pieces = pieces_of<ELEMENT>(HEAD_DIM_V);
    static constexpr int channels = HEAD_DIM_V;
    static constexpr int padded = pieces * PIECE_ELEMENTS<ELEMENT>;
    static constexpr int pitch = HALF_TYPE ? pieces_of<ELEMENT>(TILE_K) | 1 : pieces;
    static constexpr int size = (HALF_TYPE ? padded : TILE_K) * pitch;
    static DEVICE int place(int key, int piece) { return key * pitch + piece; }
};

constexpr u64 ALL_KEYS = ~0ull >> (64 - TILE_K);

// Calls `load(true)` for a tile whose keys are all kept, without a look at any, and `load(false)` otherwise.
template <class Load> DEVICE void whole_or_part(u64 keeps, Load load) {
    if (keeps == ALL_KEYS) {
        load(true);
    } else {
        load(false);
    }
}

// Loads tiles of rows, in pieces: those whose bit in `keeps` is set; the others become 0 and are not read.
template <class Tile, bool in_pieces, int threads> struct RowLoader {
    using Part = RowPart<4, Tile::channels, in_pieces>;
    static constexpr int row_threads = threads_of_row(Tile::pieces);
    static constexpr int round_rows = threads / row_threads;
    static constexpr int rounds = (TILE_K + round_rows - 1) / round_rows;

    Rows<ELEMENT> from;
    const ELEMENT* mine;  // the thread's first piece in the first tile
    typename Part::Words arriving[rounds];

    DEVICE RowLoader(const Rows<ELEMENT>& rows)
        : from(rows), mine(rows.data + row() * rows.row_stride + piece() * PIECE_ELEMENTS<ELEMENT> * rows.channel_stride) {}

    static DEVICE int row() { return thread_index() / row_threads; }
    static DEVICE int piece() { return thread_index() % row_threads; }
    // Whether this thread has a piece in a round. Opaque: asked once for all, the answers would take scalar registers through the loop.
    static DEVICE bool takes_part(int round) {
        return (row_threads == Tile::pieces || opaque(piece()) < Tile::pieces) &&
               (TILE_K % round_rows == 0 || opaque(row()) + round * round_rows < TILE_K);
    }

    DEVICE void start(Piece*, i64 first, u64 keeps) {
        const ELEMENT* data = mine + first * from.row_stride;
        const auto load = [&](bool all) {
#pragma unroll
            for (int round = 0; round < rounds; round++) {
                if (!all) arriving[round] = 0;
                if (takes_part(round) && (all || (keeps >> (row() + round * round_rows) & 1)))
                    arriving[round] = Part::load(data + round * round_rows * from.row_stride,
                                                 piece() * PIECE_ELEMENTS<ELEMENT>, from.channel_stride);
            }
        };
        whole_or_part(keeps, load);
    }

    DEVICE void arrive(Piece* tile) const {
#pragma unroll
        for (int round = 0; round < rounds; round++)
            if (takes_part(round))
                tile[Tile::place(row() + round * round_rows, piece())] = __builtin_bit_cast(Piece, arriving[round]);
    }
};

// The same for v in a half type, which is transposed on the way: a thread takes four channels of two neighbouring keys.
template <class Tile, bool in_pieces, int threads> struct TransposingLoader {
    using Part = RowPart<2, Tile::channels, in_pieces>;
    static constexpr int parts = 2 * Tile::pieces;
    static constexpr int row_threads = threads_of_row(parts);
    static constexpr int round_pairs = threads / row_threads;
    static constexpr int rounds = (TILE_K / 2 + round_pairs - 1) / round_pairs;

    Rows<ELEMENT> from;
    const ELEMENT* mine;
    typename Part::Words arriving[rounds][2];

    DEVICE TransposingLoader(const Rows<ELEMENT>& rows)
        : from(rows), mine(rows.data + 2 * pair() * rows.row_stride + 4 * part() * rows.channel_stride) {}

    static DEVICE int pair() { return thread_index() / row_threads; }
    static DEVICE int part() { return thread_index() % row_threads; }
    static DEVICE bool takes_part(int round) {
        return (row_threads == parts || opaque(part()) < parts) &&
               (TILE_K / 2 % round_pairs == 0 || opaque(pair()) + round * round_pairs < TILE_K / 2);
    }

    DEVICE void start(Piece*, i64 first, u64 keeps) {
        const ELEMENT* data = mine + first * from.row_stride;
        const auto load = [&](bool all) {
#pragma unroll
            for (int round = 0; round < rounds; round++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int row = 2 * round * round_pairs + i;
                    if (!all) arriving[round][i] = 0;
                    if (takes_part(round) && (all || (keeps >> (2 * pair() + row) & 1)))
                        arriving[round][i] = Part::load(data + row * from.row_stride, 4 * part(), from.channel_stride);
                }
        };
        whole_or_part(keeps, load);
    }

    DEVICE void arrive(Piece* tile) const {
#pragma unroll
        for (int round = 0; round < rounds; round++) {
            if (!takes_part(round)) continue;
            u32* to = (u32*)tile + 4 * part() * (4 * Tile::pitch) + pair() + round * round_pairs;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // The same half of both keys' words.
                const u32 halves = i % 2 == 0 ? 0x05040100 : 0x07060302;
                to[i * (4 * Tile::pitch)] =
                    __builtin_amdgcn_perm(arriving[round][1][i / 2], arriving[round][0][i / 2], halves);
            }
        }
    }
};

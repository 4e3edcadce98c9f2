// Tiles in shared memory: rows of channels in pieces of 16 bytes, loaded by the block, read as fragments by warps.
//
// A row has `pieces` pieces and takes `pitch` of them. Where a piece lies is turned by bits of its row, so that the
// eight rows a matrix load reads at once lie in different banks. Which eight rows those are, the order says:
//
//   IN_ROWS        rows 8i .. 8i + 7
//   n > 0          columns of C are dealt out to lanes: each of the four lanes of a quad owns n neighbouring rows of
//                  the tile (keys), and product i reads rows n (c / 2) + 2i + c % 2, c = 0..7 (see `dealt_row`)
//
// With dealt rows a lane's columns of all products are n neighbouring keys: what belongs to them (a row of a bias) is
// contiguous in memory, and its own.
#pragma once

#include "gpu.h"
#include "mma.cuh"
#include "rows.cuh"

constexpr int IN_ROWS = 0;

// Pieces from row to row.
DEVICE constexpr int pitch_of(int pieces) { return pieces <= 2 ? pieces : pieces <= 4 ? 4 : (pieces + 7) / 8 * 8; }

// Row of the tile that column `column` of product `product` stands for.
template <int lane_rows> DEVICE int dealt_row(int product, int column) {
    return lane_rows * (column / 2) + 2 * product + column % 2;
}

// A tile of `rows` rows with `channels` channels of type T.
template <class Element, int rows_, int channels_, int order> struct Tile {
    using T = Element;
    static constexpr int rows = rows_;
    static constexpr int channels = channels_;
    static constexpr int pieces = pieces_of<T>(channels);
    static constexpr int pitch = pitch_of(pieces);
    static constexpr int steps = pieces / 2;             // steps of k along the channels
    static constexpr bool half_step = pieces % 2 == 1;   // and half a step more
    static constexpr int size = rows * pitch;            // in pieces

    // Where a piece lies, in pieces from the tile's start.
    static DEVICE int slot(int row, int piece) {
        const int at = row * pitch + piece;
        if constexpr (order == IN_ROWS) {
            return at ^ (pitch == 1 ? 0 : pitch == 2 ? row >> 2 & 1 : pitch == 4 ? row >> 1 & 3 : row & 7);
        } else {
            const int owner = row / order;
            return at ^ (pitch == 1 ? 2 * owner : pitch == 2 ? (owner & 1) | (owner & 2) << 1 : pitch == 4 ? owner : 2 * owner + (row & 1));
        }
    }

    static DEVICE const T* element(const Piece* tile, int row, int channel) {
        return (const T*)(tile + slot(row, channel / PIECE_ELEMENTS<T>)) + channel % PIECE_ELEMENTS<T>;
    }
};

// Loads tiles of one operand, one after another: all threads of the block. Row i is loaded where `keeps(i)`; the other
// rows and channels that do not exist become 0 and are not read. In pieces where `in_pieces`: rows start at multiples of 16
// bytes, with neighbouring channels, a multiple of 8 of them. Complete for the block after `copy_async_commit`,
// `copy_async_wait` and a barrier.
template <class Tile, bool in_pieces, int threads> struct TileLoader {
    using T = typename Tile::T;
    // A thread keeps its piece, and its row grows by the same number from round to round; where a row has 3, 6, ... pieces,
    // some threads have none.
    static constexpr int row_threads = threads_of_row(Tile::pieces);
    static constexpr int round_rows = threads / row_threads;
    static_assert(round_rows > 0, "a row is loaded at once");

    Rows<T> from;
    const char* mine;  // the thread's first piece in the first tile

    DEVICE TileLoader(const Rows<T>& rows)
        : from(rows),
          mine((const char*)opaque((i64)(rows.data + row() * rows.row_stride + piece() * PIECE_ELEMENTS<T>))) {}

    // Where a thread has many pieces it computes where they go when it loads them: kept, they would take registers through the
    // loop, and tiles that large leave none.
    static constexpr bool many = Tile::rows / round_rows >= 8;
    static DEVICE int row(int thread = thread_index()) { return thread / row_threads; }
    static DEVICE int piece(int thread = thread_index()) { return thread % row_threads; }

    // The tile whose first row is `first`.
    template <class Keeps> DEVICE void load(Piece* tile, i64 first, Keeps keeps) const {
        if constexpr (in_pieces) {
            static_assert(Tile::channels % 8 == 0, "pieces of a row");
            const int thread = many ? thread_index_again() : thread_index(), row = TileLoader::row(thread), piece = TileLoader::piece(thread);
            if (row_threads != Tile::pieces && piece >= Tile::pieces) return;
            const i64 row_bytes = from.row_stride * (i64)sizeof(T);
            const char* data = mine + first * row_bytes;
            const u32 to = shared_address(tile);
#pragma unroll
            for (int start = 0; start < Tile::rows; start += round_rows) {
                if (Tile::rows % round_rows == 0 || row + start < Tile::rows)
                    copy_async(to + 16 * Tile::slot(row + start, piece), data, keeps(row + start) ? 16 : 0);
                data += round_rows * row_bytes;
            }
        } else {
            constexpr int padded = Tile::pieces * PIECE_ELEMENTS<T>;
            for (int index = thread_index(); index < Tile::rows * padded; index += threads) {
                const int row = index / padded, channel = index % padded;
                const bool exists = channel < Tile::channels && keeps(row);
                const T* data = from.data + (first + row) * from.row_stride + channel * from.channel_stride;
                *(T*)Tile::element(tile, row, channel) = exists ? *data : from_f32<T>(0.0f);
            }
        }
    }
};

// A of one step: 16 rows from `row`, which is in rows order. `step` counts steps; a half step comes last.
template <class Tile> DEVICE void load_left(u32 (&a)[4], const Piece* tile, int row, int step) {
    const int lane = lane_index();
    const int piece = 2 * step + lane / 16;
    load_matrices(a, shared_address(tile + Tile::slot(row + lane % 16, piece < Tile::pieces ? piece : 2 * step)));
}

// Products whose B one load fetches: four matrices are one step of two products, or half a step of four, where rows are
// short; otherwise two steps of one product.
template <class Tile> constexpr int products_of_load = Tile::pieces == 1 ? 4 : Tile::pieces == 2 ? 2 : 1;

// Where a dealt row's piece lies, for `product` and `piece` that all lanes share, and what differs by lane (a small product
// and piece, whose bits those do not have). Products `product` take 8 pieces, or a multiple, from one to the next: they are
// added to an address, and pieces flip bits of it, since a tile starts at a multiple of 8 pieces. What the lane gives is
// computed once for all.
template <class Tile, int lane_rows>
DEVICE u32 dealt_address(const Piece* tile, int lane_product, int lane_piece, int product, int piece) {
    const u32 lane = shared_address(tile) + 16 * Tile::slot(dealt_row<lane_rows>(lane_product, lane_index() % 8), lane_piece);
    return (lane ^ 16 * (piece & 7)) + 16 * ((piece & ~7) + 2 * product * Tile::pitch);
}

// B for `products_of_load` products from `product` on, columns of B being rows of the tile: word w of product p is
// b[p * (4 / products_of_load) + w], steps one after another; `step` is even. Words of pieces that do not exist are other
// words of the row (the last piece's).
template <class Tile, int lane_rows> DEVICE void load_right(u32 (&b)[4], const Piece* tile, int product, int step) {
    constexpr int matrices = 4 / products_of_load<Tile>;  // of one product
    const int last = Tile::pieces - 1 - 2 * step;
    const int matrix = lane_index() / 8, piece = matrix % matrices;
    load_matrices(b, dealt_address<Tile, lane_rows>(tile, matrix / matrices, piece < last ? piece : last, product, 2 * step));
}

// B whose k runs along the rows of a tile, half types. Pieces are columns of 8 channels. Words 0, 1: products `product`
// (even) and the next, in piece `piece` (even); words 2, 3: the same in the next piece.
template <class Tile, int lane_rows>
DEVICE void load_right_transposed(u32 (&b)[4], const Piece* tile, int product, int piece) {
    static_assert(sizeof(typename Tile::T) == 2, "transposed loads move halves");
    const int matrix = lane_index() / 8;
    load_matrices_transposed(b, dealt_address<Tile, lane_rows>(tile, matrix % 2, matrix / 2, product, piece));
}

// As above, for one piece and four products from `product` (a multiple of 4) on.
template <class Tile, int lane_rows>
DEVICE void load_right_transposed_column(u32 (&b)[4], const Piece* tile, int product, int piece) {
    static_assert(sizeof(typename Tile::T) == 2, "transposed loads move halves");
    load_matrices_transposed(b, dealt_address<Tile, lane_rows>(tile, lane_index() / 8, 0, product, piece));
}

// The same for f32, one step: the eight rows of one product, channels 8 `column` on. k = t and k = t + 4 stand for the
// columns 2t and 2t + 1 that lane t of a quad holds of C, so that C is A of the next product as it lies.
template <class Tile, int lane_rows>
DEVICE void load_right_columns(u32 (&b)[2], const Piece* tile, int product, int column) {
    static_assert(sizeof(typename Tile::T) == 4, "words");
    const int group = lane_index() / 4, lane = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 2; i++)
        b[i] = bits_of(*Tile::element(tile, dealt_row<lane_rows>(product, 2 * lane + i), 8 * column + group));
}

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

constexpr int IN_ROWS = 0;

template <class T> constexpr int PIECE_ELEMENTS = 16 / (int)sizeof(T);

// Pieces of a row of channels: whole steps of f32, half steps of the half types.
template <class T> DEVICE constexpr int pieces_of(int channels) { return (channels + 7) / 8 * 8 / PIECE_ELEMENTS<T>; }

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

// A strided matrix in global memory: address of its first element, strides in elements.
template <class T> struct Rows {
    const T* data;
    i64 row_stride;
    i64 channel_stride;
    // From another row on.
    DEVICE Rows from(i64 row) const { return {data + row * row_stride, row_stride, channel_stride}; }
};

// Starts loading a tile: all threads of the block, row i where `keeps(i)`; the other rows and channels that do not exist
// become 0 and are not read. In pieces where `in_pieces`: rows start at multiples of 16 bytes, with neighbouring channels,
// a multiple of 8 of them. Complete for the block after `copy_async_commit`, `copy_async_wait` and a barrier.
template <class Tile, bool in_pieces, int threads, class Keeps>
DEVICE void load_tile(Piece* tile, const Rows<typename Tile::T>& from, Keeps keeps) {
    using T = typename Tile::T;
    if constexpr (in_pieces) {
        static_assert(Tile::channels % 8 == 0, "pieces of a row");
        const u32 to = shared_address(tile);
#pragma unroll
        for (int first = 0; first < Tile::rows * Tile::pieces; first += threads) {
            const int index = first + thread_index();
            if (Tile::rows * Tile::pieces % threads != 0 && index >= Tile::rows * Tile::pieces) break;
            const int row = index / Tile::pieces, piece = index % Tile::pieces;
            copy_async(to + 16 * Tile::slot(row, piece), from.data + row * from.row_stride + piece * PIECE_ELEMENTS<T>, keeps(row) ? 16 : 0);
        }
    } else {
        constexpr int padded = Tile::pieces * PIECE_ELEMENTS<T>;
        for (int index = thread_index(); index < Tile::rows * padded; index += threads) {
            const int row = index / padded, channel = index % padded;
            const bool exists = channel < Tile::channels && keeps(row);
            const T value = exists ? from.data[row * from.row_stride + channel * from.channel_stride] : from_f32<T>(0.0f);
            *(T*)Tile::element(tile, row, channel) = value;
        }
    }
}

// A of one step: 16 rows from `row`, which is in rows order. `step` counts steps; a half step comes last.
template <class Tile> DEVICE void load_left(u32 (&a)[4], const Piece* tile, int row, int step) {
    const int lane = lane_index();
    const int piece = 2 * step + lane / 16;
    load_matrices(a, shared_address(tile + Tile::slot(row + lane % 16, piece < Tile::pieces ? piece : 2 * step)));
}

// Products whose B one load fetches: four matrices are one step of two products, or half a step of four, where rows are
// short; otherwise two steps of one product.
template <class Tile> constexpr int products_of_load = Tile::pieces == 1 ? 4 : Tile::pieces == 2 ? 2 : 1;

// B for `products_of_load` products from `product` on, columns of B being rows of the tile: word w of product p is
// b[p * (4 / products_of_load) + w], steps one after another. Words of pieces that do not exist repeat another piece.
template <class Tile, int lane_rows> DEVICE void load_right(u32 (&b)[4], const Piece* tile, int product, int step) {
    constexpr int matrices = 4 / products_of_load<Tile>;  // of one product
    const int matrix = lane_index() / 8;
    const int piece = 2 * step + matrix % matrices;
    const int row = dealt_row<lane_rows>(product + matrix / matrices, lane_index() % 8);
    load_matrices(b, shared_address(tile + Tile::slot(row, piece < Tile::pieces ? piece : Tile::pieces - 1)));
}

// B whose k runs along the rows of a tile, half types: four matrices, each of the eight rows of a product and of the piece
// `column`, as the eight lanes that give its addresses (lanes 8i .. 8i + 7 for matrix i) name them.
template <class Tile, int lane_rows>
DEVICE void load_right_transposed(u32 (&b)[4], const Piece* tile, int product, int column) {
    static_assert(sizeof(typename Tile::T) == 2, "transposed loads move halves");
    const int row = dealt_row<lane_rows>(product, lane_index() % 8);
    load_matrices_transposed(b, shared_address(tile + Tile::slot(row, column)));
}

// The same for f32, one step (eight rows, of one product). k = t and k = t + 4 stand for the columns 2t and 2t + 1 that
// lane t of a quad holds of C, so that C is A of the next product as it lies.
template <class Tile, int lane_rows>
DEVICE void load_right_columns(u32 (&b)[2], const Piece* tile, int product, int column) {
    static_assert(sizeof(typename Tile::T) == 4, "words");
    const int group = lane_index() / 4, lane = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 2; i++)
        b[i] = bits_of(*Tile::element(tile, dealt_row<lane_rows>(product, 2 * lane + i), 8 * column + group));
}

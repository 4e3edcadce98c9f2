// Tiles of the backward passes in the LDS of AMD, and their way there through registers, with the products of mma_hip.cuh in
// view.
//
// A tile of rows is the left factor of a product over channels, and in f32 of one over rows; in the half types the latter reads
// the same transposed. Rows of both have an odd number of pieces, the last one unused where need be, so that eight lanes read
// from all banks.
#pragma once

#include "mma_hip.cuh"

// Column of a product, and half of the wave.
DEVICE int lane_column() { return lane_index() % 32; }
DEVICE int lane_half() { return lane_index() / 32; }

// Rows of one product, a multiple of which a tile has: those of a half of the wave are neighbours, its numbers in their order.
constexpr int PRODUCT_ROWS = 32;
constexpr int HALF_ROWS = PRODUCT_ROWS / 2;
// The row of its product that row `row` of the operand becomes.
DEVICE constexpr int product_row(int row) { return row / 32 * 32 + row % 16 / 4 * 8 + row % 32 / 16 * 4 + row % 4; }

// Rows of channels, in the order of products.
template <int rows, int channels> struct RowTile {
    static constexpr int pieces = pieces_of<ELEMENT>(channels);
    // The widest rows leave no room for an unused piece: the places of pieces are turned by the row instead.
    static constexpr bool turned = pieces >= 64;
    static constexpr int pitch = turned ? pieces : pieces | 1;
    static constexpr int bytes = rows * pitch * 16;
    static DEVICE int place(int row, int piece) { return (row * pitch + (turned ? piece ^ (row & 7) : piece)) * 16; }
};
// The same transposed, half types: a row for each channel, rows of the operand in their own order.
template <int rows, int channels> struct ColumnTile {
    static constexpr int padded = (channels + 7) / 8 * 8;
    static constexpr int pitch = (pieces_of<ELEMENT>(rows) | 1) * 16;
    static constexpr int bytes = padded * pitch;
};

// c += rows of the tile, the first of which is `first`, times a column.
template <int rows, int channels, bool in_pieces, bool in_registers>
DEVICE void multiply_rows(Product& c, u32 tile, int first, const Column<channels, in_pieces, in_registers>& right) {
    using Tile = RowTile<rows, channels>;
    using Right = Column<channels, in_pieces, in_registers>;
#pragma unroll
    for (int p = 0; p < Right::pairs; p++)
        multiply_add_pieces(c, load_shared<FourWords>(tile + Tile::place(first + lane_column(), 2 * p + lane_half())), right.pair(p, lane_half()));
    if constexpr (Right::odd)
        multiply_add(c, load_shared<FourHalves>(tile + Tile::place(first + lane_column(), 2 * Right::pairs) + 8 * lane_half()), right.last, Half());
}

// A lane's numbers of a product as a right factor: halves by four, or f32.
struct RightFactor {
    FourHalves halves[HALF_TYPE ? HALF_ROWS / 4 : 1];
    float numbers[HALF_TYPE ? 1 : HALF_ROWS];
    DEVICE void take(const Product& c) {
#pragma unroll
        for (int j = 0; j < HALF_ROWS; j++) {
            if constexpr (!HALF_TYPE) {
                numbers[j] = c.each[j];
            } else if (j % 2 == 0) {
                halves[j / 4][j / 2 % 2] = pack_rounded(Pair{c.each[j], c.each[j + 1]}, Half());
            }
        }
    }
};

// Sums over rows are transposed: rows of products are channels.
template <int channels> constexpr int CHANNEL_TILES = (channels + 31) / 32;
template <int channels> constexpr int LANE_CHANNELS = (channels + 7) / 8 * 4;
DEVICE int channel_of_lane(int i) { return i / 4 * 8 + 4 * lane_half() + i % 4; }

// sums[m] += (rows of the tile, from `first` on)^T right[m]
template <int rows, int channels, int m>
DEVICE void add_products(Product (&sums)[m][CHANNEL_TILES<channels>], const RightFactor (&right)[m], u32 tile, u32 columns, int first) {
    using Columns = ColumnTile<rows, channels>;
#pragma unroll
    for (int b = 0; b < CHANNEL_TILES<channels>; b++) {
        const int row = 32 * b + lane_column();
        // Rows that no channel has repeat others; what comes of them is not read.
        const int channel = row < Columns::padded ? row : row % 8;
        if constexpr (HALF_TYPE) {
#pragma unroll
            for (int i = 0; i < HALF_ROWS / 8; i++) {
                const FourWords left = load_shared<FourWords>(columns + channel * Columns::pitch + 2 * (first + lane_half() * HALF_ROWS) + 16 * i);
#pragma unroll
                for (int x = 0; x < m; x++) {
                    multiply_add(sums[x][b], left.xy, right[x].halves[2 * i], Half());
                    multiply_add(sums[x][b], left.zw, right[x].halves[2 * i + 1], Half());
                }
            }
        } else {
#pragma unroll
            for (int j = 0; j < HALF_ROWS; j++) {
                const int row_of_tile = first + product_row(lane_half() * HALF_ROWS + j);
                const float left = load_shared<float>(tile + RowTile<rows, channels>::place(row_of_tile, channel / 4) + channel % 4 * 4);
#pragma unroll
                for (int x = 0; x < m; x++) multiply_add(sums[x][b], left, right[x].numbers[j]);
            }
        }
    }
}

// An offset of 32 bits where it fits.
template <bool narrow> struct Offset {
    using T = i64;
};
template <> struct Offset<true> {
    using T = u32;
};

// Rows of one operand on their way, tile by tile: a thread takes four channels of two neighbouring rows.
template <int rows, int channels, bool in_pieces, bool to_rows, bool to_columns> struct LdsLoader {
    static constexpr int part_bytes = 4 * (int)sizeof(ELEMENT);
    using Part = RowPart<part_bytes / 4, channels, in_pieces>;
    static constexpr int parts = (channels + 7) / 8 * 2;
    static constexpr int row_threads = threads_of_row(parts);
    static constexpr int round_pairs = THREADS / row_threads;
    static constexpr int rounds = (rows / 2 + round_pairs - 1) / round_pairs;
    // Whether every thread's rows lie alike from round to round.
    static constexpr bool even = rounds == 1 || round_pairs * rounds == rows / 2;

    using Bytes = typename Offset<in_pieces>::T;
    const char* tile;  // the first row of the tile that is fetched next, the same in all lanes
    i64 channel_stride;
    // From row to row, and from the tile's first row to the thread's first part; of rows in pieces the plan keeps them in 32 bits.
    Bytes row_bytes, mine;
    typename Part::Words arriving[rounds][2];

    // A thread that has nothing of a tile loads what others do, and does not store it.
    static DEVICE int pair(int thread) { return thread / row_threads; }
    static DEVICE int part(int thread = thread_index()) { return row_threads == parts ? thread % row_threads : least_int(thread % row_threads, parts - 1); }
    // The row of the tile that row `i` of a round is.
    static DEVICE int row(int round, int i, int thread = thread_index()) {
        const int row = 2 * (pair(thread) + round * round_pairs) + i;
        return rounds > 1 && even ? row : least_int(row, rows - 2 + i);
    }
    static DEVICE bool takes_part(int round) {
        return (row_threads == parts || thread_index() % row_threads < parts) &&
               (rows / 2 % round_pairs == 0 || pair(thread_index()) + round * round_pairs < rows / 2);
    }

    // From row `first` on.
    DEVICE void start(const Rows<ELEMENT>& of, i64 first) {
        tile = (const char*)(of.data + first * of.row_stride);
        channel_stride = of.channel_stride;
        row_bytes = (Bytes)(of.row_stride * (i64)sizeof(ELEMENT));
        // Read again: what is computed of it would take registers from head to head.
        const int thread = thread_index_again();
        mine = (Bytes)row(0, 0, thread) * row_bytes + (Bytes)(4 * part(thread) * channel_stride * (i64)sizeof(ELEMENT));
    }
    DEVICE void shift(i64 elements) { tile += elements * (i64)sizeof(ELEMENT); }
    // To the rows after the tile.
    DEVICE void next_tile() { tile += rows * row_bytes; }
    // Loads the tile, of which `there` rows exist; the others become 0.
    DEVICE void load(int there) {
        const auto load = [&](const char* from, Bytes further) { return Part::load((const ELEMENT*)(from + further), 4 * part(), channel_stride); };
        if constexpr (in_pieces) mine = opaque_offset(mine);
        if (there == rows) {
#pragma unroll
            for (int round = 0; round < rounds; round++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    // Where rows lie alike, the distance is the same in all lanes.
                    const int distance = 2 * round * round_pairs + i;
                    arriving[round][i] = even ? load(tile + (Bytes)distance * row_bytes, mine) : load(tile, mine + (Bytes)(row(round, i) - row(0, 0)) * row_bytes);
                }
            keep_apart();
        } else {
            // Computed here, and not for all tiles.
            const int thread = thread_index_again();
#pragma unroll
            for (int round = 0; round < rounds; round++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int row = opaque(LdsLoader::row(round, i, thread));
                    arriving[round][i] = load(tile, mine + (Bytes)(least_int(row, there - 1) - LdsLoader::row(0, 0, thread)) * row_bytes);
                    if (row >= there) arriving[round][i] = 0;
                }
        }
    }
    // Makes rows 0 that `kept(round, i)` does not keep.
    template <class Kept> DEVICE void clear(Kept kept) {
#pragma unroll
        for (int round = 0; round < rounds; round++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (!kept(round, i)) arriving[round][i] = 0;
    }
    // Stores what was loaded.
    DEVICE void arrive(u32 tile, u32 columns) const {
#pragma unroll
        for (int round = 0; round < rounds; round++) {
            if (!takes_part(round)) continue;
            const int first = row(round, 0), at = part() * part_bytes;
            if constexpr (to_rows) {
#pragma unroll
                for (int i = 0; i < 2; i++)
                    store_shared(tile + RowTile<rows, channels>::place(product_row(first) + i, at / 16) + at % 16, arriving[round][i]);
            }
            if constexpr (to_columns) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    // The same half of both rows' words.
                    const u32 halves = i % 2 == 0 ? 0x05040100 : 0x07060302;
                    store_shared(columns + (4 * part() + i) * ColumnTile<rows, channels>::pitch + 2 * first,
                                 __builtin_amdgcn_perm(arriving[round][1][i / 2], arriving[round][0][i / 2], halves));
                }
            }
        }
    }
};

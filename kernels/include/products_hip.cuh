// Matrix products of the forward pass on AMD's matrix cores: which of a tile's numbers a lane holds, S = q k, O += P v.
//
// Products are those of mma_hip.cuh. S is kept transposed, S^T = k q^T: a column is a query, which two lanes share, 32
// queries a wave. Keys are dealt to rows (tile_hip.cuh) so that a lane's keys are neighbours. P^T is the right factor of
// O^T = v^T P^T as it lies.
#pragma once

#include "mma_hip.cuh"
#include "tile_hip.cuh"

constexpr int WARP_QUERIES = 32 * QUERY_TILES;
constexpr int LANE_ROWS = QUERY_TILES;
constexpr int KEY_TILES = TILE_K / 32;
// A product's keys are a group.
constexpr int KEY_GROUPS = KEY_TILES;
constexpr int GROUP_KEYS = LANE_KEYS / KEY_GROUPS;
constexpr int CHANNEL_TILES = (HEAD_DIM_V + 31) / 32;
constexpr int LANE_CHANNELS = (HEAD_DIM_V + 7) / 8 * 4;

// Queries go from memory to registers.
struct QueryTile {
    static constexpr int size = 0;
};

// Where a lane stands in the block's tile.
struct Lane {
    int column;  // of a product
    int half;    // of the wave
    int query;   // first query of the wave, in the tile
    DEVICE Lane() : column(lane_index() % 32), half(lane_index() / 32), query(warp_index() * WARP_QUERIES) {}
    // Query, in the tile, of the lane's row `r`.
    DEVICE int row(int r) const { return query + 32 * r + column; }
    // First of the lane's neighbouring keys, in the tile.
    DEVICE int first_key() const { return half * LANE_KEYS; }
    // The lane's channel `i`, 4 i .. 4 i + 3 being neighbours, and how far it is from the lane's first.
    DEVICE int channel(int i) const { return 4 * half + step(i); }
    static DEVICE constexpr int step(int i) { return i / 4 * 8 + i % 4; }
    // One lane of those that share a row.
    DEVICE bool leads() const { return half == 0; }
};

// Logits of the wave's queries and one tile of keys, transposed.
using Scores = Product[QUERY_TILES][KEY_TILES];
DEVICE float& score(Scores& s, int row, int key) { return s[row][key / 16].each[key % 16]; }
// What the wave has of the output, transposed.
using Output = Product[QUERY_TILES][CHANNEL_TILES];
DEVICE float& value(Output& out, int row, int channel) { return out[row][channel / 16].each[channel % 16]; }
DEVICE float value(const Output& out, int row, int channel) { return out[row][channel / 16].each[channel % 16]; }

// Over the lanes that share a row.
DEVICE float row_maximum(float x) { return maximum(x, shuffle_xor(x, 32)); }
DEVICE float row_sum(float x) { return x + shuffle_xor(x, 32); }

// A tile's loads go to registers, whatever its buffer is used for meanwhile.
constexpr bool LOADS_AHEAD = true;
// The paths through a tile end together: of two ends the compiler would move the numbers of one to the other's registers.
constexpr bool ONE_TAIL = true;
// Scalar registers are too few to keep the block's work for the general path, where that is rare.
constexpr bool WORK_AGAIN = true;
DEVICE void copies_started() {}
DEVICE void copies_arrived() {}
using KeyLoader = RowLoader<KeyTileShape, K_PIECES, WARPS * WARP_THREADS>;
template <bool half_type> struct ValueLoaderOf {
    using Type = TransposingLoader<ValueTile, V_PIECES, WARPS * WARP_THREADS>;
};
template <> struct ValueLoaderOf<false> {
    using Type = RowLoader<ValueTile, V_PIECES, WARPS * WARP_THREADS>;
};
using ValueLoader = ValueLoaderOf<HALF_TYPE>::Type;

// The keys of a tile that key mask and lengths exclude. They are by a product: of a column of -inf and a row of ones.
struct Excluded {
    u64 keeps;
    const Lane& lane;
    DEVICE Excluded(u64 keeps, const Lane& lane) : keeps(keeps), lane(lane) {}
    // What a logit of the lane's key `j` starts at beside its biases.
    DEVICE float start(int) const { return 0.0f; }
    // Excludes those of a group that have not started so.
    DEVICE void apply(Scores& s, int group) const {
        if (keeps == ALL_KEYS) return;
        const bool excluded = (keeps >> key_of_row(group, lane.column) & 1) == 0;
        const u32 infinite = excluded && lane.half == 0 ? 0xff80 : 0, one = lane.half == 0 ? 0x3f80 : 0;
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++) multiply_add(s[m][group], FourHalves{infinite, 0}, FourHalves{one, 0}, bf16());
    }
};

// q^T, in registers, or read once more for each tile of keys.
struct Queries {
    using QueryColumn = Column<HEAD_DIM, Q_PIECES, QUERIES_IN_REGISTERS>;
    static constexpr int pairs = QueryColumn::pairs;
    int column;
    int half;
    QueryColumn columns[QUERY_TILES];

    // Starts loading the block's `count` queries from `first` on.
    DEVICE void start(const Rows<ELEMENT>& rows, i64 first, int count, Piece*, const Lane& lane) {
        column = lane.column;
        half = lane.half;
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++) {
            // Queries that do not exist read the last one that does.
            const int row = lane.row(m) < count ? lane.row(m) : count - 1;
            columns[m].start(rows.data + (first + row) * rows.row_stride, rows.channel_stride, half);
        }
    }
    DEVICE void load() {}
};

// S += q k, for one group of keys.
DEVICE void add_logits(Scores& s, const Queries& queries, const Piece* keys, int group) {
    // Opaque where rows are wide: addresses of all pieces would take registers through the loop.
    const int row = 32 * group + (QUERIES_IN_REGISTERS ? queries.column : opaque(queries.column));
    const int half = QUERIES_IN_REGISTERS ? queries.half : opaque(queries.half);
#pragma unroll
    for (int p = 0; p < Queries::pairs; p++) {
        const FourWords left = *(const FourWords*)&keys[KeyTileShape::slot(row, 2 * p + half)];
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++) multiply_add_pieces(s[m][group], left, queries.columns[m].pair(p, half));
    }
    if constexpr (Queries::QueryColumn::odd) {
        const FourHalves left = ((const FourHalves*)&keys[KeyTileShape::slot(row, 2 * Queries::pairs)])[queries.half];
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++) multiply_add(s[m][group], left, queries.columns[m].last, Half());
    }
}

// P as the right factor, of the lane's keys: halves by four, or f32.
struct Weights {
    FourHalves halves[QUERY_TILES][HALF_TYPE ? LANE_KEYS / 4 : 1];
    float numbers[QUERY_TILES][HALF_TYPE ? 1 : LANE_KEYS];
};
// Those of one group of keys.
DEVICE void weights_of(Weights& w, const Scores& p, int group) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
        for (int i = 0; i < GROUP_KEYS; i++) {
            if constexpr (!HALF_TYPE) {
                w.numbers[m][GROUP_KEYS * group + i] = p[m][group].each[i];
            } else if (i % 2 == 0) {
                const Pair pair = {p[m][group].each[i], p[m][group].each[i + 1]};
                w.halves[m][GROUP_KEYS / 4 * group + i / 4][i / 2 % 2] = pack_rounded(pair, Half());
            }
        }
}

// O += P v.
DEVICE void add_values(Output& out, const Weights& p, const Piece* values, const Lane& lane) {
#pragma unroll
    for (int t = 0; t < KEY_TILES; t++) {
        if constexpr (HALF_TYPE) {
#pragma unroll
            for (int b = 0; b < CHANNEL_TILES; b++) {
                // Rows that no channel has repeat others; what comes of them is not read.
                const int row = 32 * b + lane.column;
                const Piece* from = values + (row < ValueTile::padded ? row : row % 8) * ValueTile::pitch + lane.first_key() / 8 + 2 * t;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const FourWords left = *(const FourWords*)&from[i];
#pragma unroll
                    for (int m = 0; m < QUERY_TILES; m++) {
                        multiply_add(out[m][b], left.xy, p.halves[m][4 * t + 2 * i], Half());
                        multiply_add(out[m][b], left.zw, p.halves[m][4 * t + 2 * i + 1], Half());
                    }
                }
            }
        } else {
#pragma unroll
            for (int b = 0; b < CHANNEL_TILES; b++) {
                const int row = 32 * b + lane.column;
                const float* from = (const float*)(values + (lane.first_key() + 16 * t) * ValueTile::pitch) +
                                    (row < ValueTile::padded ? row : row % 8);
#pragma unroll
                for (int i = 0; i < 16; i++)
#pragma unroll
                    for (int m = 0; m < QUERY_TILES; m++)
                        multiply_add(out[m][b], from[i * (4 * ValueTile::pitch)], p.numbers[m][16 * t + i]);
            }
        }
    }
}

// Matrix products of the forward pass on AMD's matrix cores: which of a tile's numbers a lane holds, S = q k, O += P v.
//
// Products are `v_mfma` of 32 rows, 32 columns: C[32][32] += A[32][k] B[k][32]. Lane l with c = l % 32 and h = l / 32 holds
//
//   A   row c; of a step of 8 (half types) numbers 4 h .. 4 h + 3, of a step of 2 (f32) number h
//   B   column c, the same numbers
//   C   column c, rows 8 g + 4 h + i as number 4 g + i (g, i below 4)
//
// S is kept transposed, S^T = k q^T: a column is a query, which two lanes share, 32 queries a wave. Keys are dealt to rows
// (tile_hip.cuh) so that a lane's keys are neighbours. P^T is the right factor of O^T = v^T P^T as it lies.
#pragma once

#include "gpu.h"
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
    // The lane's channel `i`: 4 i .. 4 i + 3 are neighbours.
    DEVICE int channel(int i) const { return i / 4 * 8 + 4 * half + i % 4; }
    // One lane of those that share a row.
    DEVICE bool leads() const { return half == 0; }
};

typedef float ProductVector __attribute__((ext_vector_type(16)));
// C of one product: a lane's numbers together, and one by one.
union Product {
    ProductVector all;
    float each[16];
};

// Logits of the wave's queries and one tile of keys, transposed.
using Scores = Product[QUERY_TILES][KEY_TILES];
DEVICE float& score(Scores& s, int row, int key) { return s[row][key / 16].each[key % 16]; }
// What the wave has of the output, transposed.
using Output = Product[QUERY_TILES][CHANNEL_TILES];
DEVICE float& value(Output& out, int row, int channel) { return out[row][channel / 16].each[channel % 16]; }
DEVICE float value(const Output& out, int row, int channel) { return out[row][channel / 16].each[channel % 16]; }

// Two words: four halves of one row.
typedef u32 FourHalves __attribute__((ext_vector_type(2)));
typedef short Bf16Factor __attribute__((ext_vector_type(4)));
typedef _Float16 F16Factor __attribute__((ext_vector_type(4)));

// The half type; where there is none, one that branches for halves compile with.
template <class T> struct HalfOf {
    using Type = T;
};
template <> struct HalfOf<float> {
    using Type = bf16;
};
using Half = HalfOf<ELEMENT>::Type;

// C += A B, a step of 8.
DEVICE void multiply_add(Product& c, FourHalves a, FourHalves b, bf16) {
    c.all = __builtin_amdgcn_mfma_f32_32x32x8bf16_1k(__builtin_bit_cast(Bf16Factor, a), __builtin_bit_cast(Bf16Factor, b), c.all, 0, 0, 0);
}
DEVICE void multiply_add(Product& c, FourHalves a, FourHalves b, f16) {
    c.all = __builtin_amdgcn_mfma_f32_32x32x8f16(__builtin_bit_cast(F16Factor, a), __builtin_bit_cast(F16Factor, b), c.all, 0, 0, 0);
}
// C += A B, a step of 2.
DEVICE void multiply_add(Product& c, float a, float b) {
    c.all = __builtin_amdgcn_mfma_f32_32x32x2f32(a, b, c.all, 0, 0, 0);
}
// The numbers of one piece: two steps of halves, four of f32.
DEVICE void multiply_add_pieces(Product& c, const FourWords& a, const FourWords& b) {
    if constexpr (HALF_TYPE) {
        multiply_add(c, a.xy, b.xy, Half());
        multiply_add(c, a.zw, b.zw, Half());
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) multiply_add(c, float_of(a[i]), float_of(b[i]));
    }
}

// Over the lanes that share a row.
DEVICE float row_maximum(float x) { return maximum(x, shuffle_xor(x, 32)); }
DEVICE float row_sum(float x) { return x + shuffle_xor(x, 32); }

// A tile's loads go to registers, whatever its buffer is used for meanwhile.
constexpr bool LOADS_AHEAD = true;
// The paths through a tile end together: of two ends the compiler would move the numbers of one to the other's registers.
constexpr bool ONE_TAIL = true;
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

// q^T, in registers: of each pair of pieces of a query one for each of its two lanes; of an odd piece half.
struct Queries {
    static constexpr int pieces = KeyTileShape::pieces, pairs = pieces / 2;
    static constexpr bool odd = pieces % 2 == 1;
    int column;
    int half;
    FourWords words[QUERY_TILES][pairs > 0 ? pairs : 1];
    FourHalves last[QUERY_TILES];

    // Starts loading the block's `count` queries from `first` on.
    DEVICE void start(const Rows<ELEMENT>& rows, i64 first, int count, Piece*, const Lane& lane) {
        column = lane.column;
        half = lane.half;
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++) {
            // Queries that do not exist read the last one that does.
            const int row = lane.row(m) < count ? lane.row(m) : count - 1;
            const ELEMENT* data = rows.data + (first + row) * rows.row_stride;
#pragma unroll
            for (int p = 0; p < pairs; p++) {
                const int channel = (2 * p + half) * PIECE_ELEMENTS<ELEMENT>;
                words[m][p] = RowPart<4, HEAD_DIM, Q_PIECES>::load(data + channel * rows.channel_stride, channel, rows.channel_stride);
            }
            if constexpr (odd) {
                const int channel = 2 * pairs * PIECE_ELEMENTS<ELEMENT> + 4 * half;
                last[m] = RowPart<2, HEAD_DIM, Q_PIECES>::load(data + channel * rows.channel_stride, channel, rows.channel_stride);
            }
        }
    }
    DEVICE void load() {}
};

// S += q k, for one group of keys.
DEVICE void add_logits(Scores& s, const Queries& queries, const Piece* keys, int group) {
    const int row = 32 * group + queries.column;
#pragma unroll
    for (int p = 0; p < Queries::pairs; p++) {
        const FourWords left = *(const FourWords*)&keys[KeyTileShape::slot(row, 2 * p + queries.half)];
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++) multiply_add_pieces(s[m][group], left, queries.words[m][p]);
    }
    if constexpr (Queries::odd) {
        const FourHalves left = ((const FourHalves*)&keys[KeyTileShape::slot(row, 2 * Queries::pairs)])[queries.half];
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++) multiply_add(s[m][group], left, queries.last[m], Half());
    }
}

// Two P, rounded to nearest (ties away from 0). NaN may get lost: the row's sum is NaN then.
DEVICE u32 pack_rounded(Pair p, bf16) {
#if defined(__gfx942__)
    // One addition for both: that of the low number carries nothing over, as it is positive.
    const u64 added = __builtin_bit_cast(u64, p) + 0x0000800000008000;
    return __builtin_amdgcn_perm((u32)(added >> 32), (u32)added, 0x07060302);
#else
    return __builtin_amdgcn_perm(bits_of(p.y) + 0x8000, bits_of(p.x) + 0x8000, 0x07060302);
#endif
}
DEVICE u32 pack_rounded(Pair p, f16) {
    // The conversion cuts off what is added half of.
    const u32 low = bits_of(p.x) + 0x1000, high = bits_of(p.y) + 0x1000;
    return __builtin_bit_cast(u32, __builtin_amdgcn_cvt_pkrtz(float_of(low), float_of(high)));
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

// Matrix products of the forward pass on NVIDIA's tensor cores: which of a tile's numbers a lane holds, S = q k, O += P v.
//
// Products are those of mma.cuh: a lane holds two neighbouring columns of two rows. Keys are dealt (tile.cuh), so that a
// lane's keys are neighbours; P is the left factor of the second product as it lies.
#pragma once

#include "gpu.h"
#include "mma.cuh"
#include "tile.cuh"

constexpr int WARP_QUERIES = 16 * QUERY_TILES;
constexpr int LANE_ROWS = 2 * QUERY_TILES;
constexpr int LANE_KEYS = TILE_K / 4;
constexpr int KEY_COLUMNS = TILE_K / 8;  // products of 8 keys
constexpr int OUT_COLUMNS = (HEAD_DIM_V + 7) / 8;
constexpr int LANE_CHANNELS = 2 * OUT_COLUMNS;

using QueryTile = Tile<ELEMENT, WARPS * WARP_QUERIES, HEAD_DIM, IN_ROWS>;
using KeyTileShape = Tile<ELEMENT, TILE_K, HEAD_DIM, LANE_KEYS>;
using ValueTile = Tile<ELEMENT, TILE_K, HEAD_DIM_V, LANE_KEYS>;
// Keys are taken in groups of as many products as one load fetches, at least two; all at once where queries would be loaded
// or split once more for each group.
constexpr bool ONE_GROUP = SPLIT<ELEMENT> || !QUERIES_IN_REGISTERS;
constexpr int GROUP_PRODUCTS = ONE_GROUP ? KEY_COLUMNS : products_of_load<KeyTileShape> > 2 ? products_of_load<KeyTileShape> : 2;
constexpr int KEY_GROUPS = KEY_COLUMNS / GROUP_PRODUCTS;
constexpr int GROUP_KEYS = LANE_KEYS / KEY_GROUPS;
static_assert(KEY_COLUMNS % GROUP_PRODUCTS == 0, "whole groups");
// Whether a step of a product waits for the one before. The compiler would begin with the loads of all, for which registers
// have no room beside the two terms of f32, or the sums of many channels.
constexpr bool STEP_BY_STEP = sizeof(ELEMENT) == 4 || HEAD_DIM_V > 128;
constexpr int QUERY_STEPS = QueryTile::steps + QueryTile::half_step;

// Where a lane stands in the block's tile.
struct Lane {
    int group;  // row of a product, 0..7
    int quad;   // lane of the four that share a row
    int query;  // first query of the warp, in the tile
    DEVICE Lane() : group(lane_index() / 4), quad(lane_index() % 4), query(warp_index() * WARP_QUERIES) {}
    // Query, in the tile, of the lane's row `r`.
    DEVICE int row(int r) const { return query + 8 * r + group; }
    // First of the lane's neighbouring keys, in the tile.
    DEVICE int first_key() const { return quad * LANE_KEYS; }
    // The lane's channel `i`, 2 i and 2 i + 1 being neighbours, and how far it is from the lane's first.
    DEVICE int channel(int i) const { return 2 * quad + step(i); }
    static DEVICE constexpr int step(int i) { return 8 * (i / 2) + i % 2; }
    // One lane of those that share a row.
    DEVICE bool leads() const { return quad == 0; }
};

// Logits of the warp's queries and one tile of keys: C of the products q k.
using Scores = float[QUERY_TILES][KEY_COLUMNS][4];
DEVICE float& score(Scores& s, int row, int key) { return s[row / 2][key / 2][2 * (row % 2) + key % 2]; }
// What the warp has of the output: C of the products P v.
using Output = float[QUERY_TILES][OUT_COLUMNS][4];
DEVICE float& value(Output& out, int row, int channel) { return out[row / 2][channel / 2][2 * (row % 2) + channel % 2]; }
DEVICE float value(const Output& out, int row, int channel) { return out[row / 2][channel / 2][2 * (row % 2) + channel % 2]; }

// The keys of a tile that key mask and lengths exclude.
struct Excluded {
    u32 kept;
    DEVICE Excluded(u64 keeps, const Lane& lane) : kept((u32)(keeps >> lane.first_key())) {}
    // What a logit of the lane's key `j` starts at beside its biases.
    DEVICE float start(int j) const { return kept >> j & 1 ? 0.0f : -INFINITE; }
    // Excludes those of a group that have not started so.
    DEVICE void apply(Scores&, int) const {}
};

// Over the lanes that share a row.
DEVICE float row_maximum(float x) { return quad_maximum(x); }
DEVICE float row_sum(float x) { return quad_sum(x); }

// A tile's copy goes straight to its buffer, once that is free.
constexpr bool LOADS_AHEAD = STAGES == 2;
// Each path through a tile ends by itself: the next tile's biases are loaded between the products of this one's groups. Not beside
// the widest O of f32, which two ends would have in different registers.
constexpr bool ONE_TAIL = sizeof(ELEMENT) == 4 && HEAD_DIM_V > 128;
// Whether registers are too dear to keep the block's work for the general path, where that is rare.
constexpr bool WORK_AGAIN = HEAD_DIM_V > 128 || SEGMENTS;
DEVICE void copies_started() { copy_async_commit(); }
DEVICE void copies_arrived() { copy_async_wait<0>(); }

// Tiles of k and v on their way.
template <class Tile, bool in_pieces> struct Loader {
    TileLoader<Tile, in_pieces, WARPS * WARP_THREADS> loader;
    DEVICE Loader(const Rows<ELEMENT>& rows) : loader(rows) {}
    // Starts loading rows `first` .. of which bit i of `keeps` says whether row i is read.
    DEVICE void start(Piece* tile, i64 first, u64 keeps) const {
        loader.load(tile, first, [&](int row) { return (keeps >> row & 1) != 0; });
    }
    // Puts what arrived into the tile, where it is.
    DEVICE void arrive(Piece*) const {}
};
using KeyLoader = Loader<KeyTileShape, K_PIECES>;
using ValueLoader = Loader<ValueTile, V_PIECES>;

// A of q, in registers or loaded for every tile of keys. Numbers that are split are kept whole, to take half the registers;
// others as the matrix unit takes them.
struct Queries {
    u32 words[QUERIES_IN_REGISTERS ? QUERY_TILES : 1][QUERIES_IN_REGISTERS ? QUERY_STEPS : 1][4];
    const Piece* tile;
    int query;

    // Starts loading the block's `count` queries from `first` on.
    DEVICE void start(const Rows<ELEMENT>& rows, i64 first, int count, Piece* shared, const Lane& lane) {
        tile = shared;
        query = lane.query;
        const TileLoader<QueryTile, Q_PIECES, WARPS * WARP_THREADS> loader(rows);
        loader.load(shared, first, [&](int row) { return row < count; });
    }
    // Takes what arrived; again, to have its registers between for something else.
    DEVICE void load() {
        if constexpr (QUERIES_IN_REGISTERS) {
#pragma unroll
            for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
                for (int step = 0; step < QUERY_STEPS; step++) {
                    u32 raw[4];
                    load_left<QueryTile>(raw, tile, query + 16 * m, step);
                    const Factor<ELEMENT, 4> taken = factor<ELEMENT>(raw);
#pragma unroll
                    for (int i = 0; i < 4; i++) words[m][step][i] = SPLIT<ELEMENT> ? raw[i] : taken.high[i];
                }
        }
    }
    DEVICE Factor<ELEMENT, 4> left(int m, int step) const {
        if constexpr (QUERIES_IN_REGISTERS && !SPLIT<ELEMENT>) {
            Factor<ELEMENT, 4> taken;
#pragma unroll
            for (int i = 0; i < 4; i++) taken.high[i] = words[m][step][i];
            return taken;
        } else {
            u32 raw[4];
            if constexpr (QUERIES_IN_REGISTERS) {
#pragma unroll
                for (int i = 0; i < 4; i++) raw[i] = words[m][step][i];
            } else {
                // Opaque: addresses of all steps would take registers through the loop.
                load_left<QueryTile>(raw, tile, opaque(query) + 16 * m, step);
            }
            return factor<ELEMENT>(raw);
        }
    }
};

// Some terms of S += q k, for one group of keys.
template <int terms> DEVICE void add_logit_terms(Scores& s, const Queries& queries, const Piece* keys, int group) {
    constexpr int products = products_of_load<KeyTileShape>, words = 4 / products;
#pragma unroll
    for (int step = 0; step < QUERY_STEPS; step += 2) {
        if constexpr (STEP_BY_STEP) one_by_one();
        Factor<ELEMENT, 4> a[QUERY_TILES][2];
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
            for (int i = 0; i < 2 && step + i < QUERY_STEPS; i++) a[m][i] = queries.left(m, step + i);
#pragma unroll
        for (int n = group * GROUP_PRODUCTS; n < (group + 1) * GROUP_PRODUCTS; n += products) {
            u32 b[4];
            load_right<KeyTileShape, LANE_KEYS>(b, keys, n, step);
#pragma unroll
            for (int p = 0; p < products; p++)
#pragma unroll
                for (int i = 0; i < 2 && step + i < QUERY_STEPS; i++) {
                    const bool half = KeyTileShape::half_step && step + i == KeyTileShape::steps;
                    const int at = p * words + 2 * i;
                    const u32 pair[2] = {b[at], b[half ? at : at + 1]};
                    const Factor<ELEMENT, 2> right = factor<ELEMENT>(pair);
#pragma unroll
                    for (int m = 0; m < QUERY_TILES; m++) {
                        if constexpr (KeyTileShape::half_step) {
                            if (half) {
                                mma_step<terms>(s[m][n + p], half_of(a[m][i]), half_of(right));
                                continue;
                            }
                        }
                        mma_step<terms>(s[m][n + p], a[m][i], right);
                    }
                }
        }
    }
}

// S += q k, for one group of keys.
template <class T = ELEMENT> DEVICE void add_logits(Scores& s, const Queries& queries, const Piece* keys, int group) {
    if constexpr (SPLIT<T>) add_logit_terms<SMALL_TERMS>(s, queries, keys, group);
    add_logit_terms<LARGE_TERMS>(s, queries, keys, group);
}

// P as the left factor of the second product: C of the first one as it lies, rounded to the element type. A step is 16
// keys, 8 of f32.
constexpr int WEIGHT_STEPS = sizeof(ELEMENT) == 4 ? KEY_COLUMNS : KEY_COLUMNS / 2;
using Weights = u32[QUERY_TILES][WEIGHT_STEPS][4];

// Those of one group of keys.
template <class T = ELEMENT> DEVICE void weights_of(Weights& w, const Scores& p, int group) {
    constexpr int steps = WEIGHT_STEPS / KEY_GROUPS;
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
        for (int k = group * steps; k < (group + 1) * steps; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if constexpr (sizeof(T) == 4) {
                    w[m][k][i] = bits_of(p[m][k][2 * (i % 2) + i / 2]);
                } else {
                    const float* c = p[m][2 * k + i / 2];
                    w[m][k][i] = pack<T>(c[2 * (i % 2)], c[2 * (i % 2) + 1]);
                }
            }
}

// Some terms of P v for one tile of keys and 8 channels, f32.
template <int terms, class T>
DEVICE void add_share_terms(float (&share)[QUERY_TILES][4], const Factor<T, 4> (&p)[QUERY_TILES][WEIGHT_STEPS],
                            const Piece* values, int column) {
#pragma unroll
    for (int n = 0; n < WEIGHT_STEPS; n++) {
        u32 b[2];
        load_right_columns<ValueTile, LANE_KEYS>(b, values, n, column);
        const Factor<T, 2> right = factor<T>(b);
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++) mma_step<terms>(share[m], p[m][n], right);
    }
}

// O += P v.
template <class T = ELEMENT> DEVICE void add_values(Output& out, const Weights& p, const Piece* values, const Lane&) {
    if constexpr (sizeof(T) == 4) {
        Factor<T, 4> a[QUERY_TILES][WEIGHT_STEPS];
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
            for (int n = 0; n < WEIGHT_STEPS; n++) a[m][n] = factor<T>(p[m][n]);
#pragma unroll
        for (int c = 0; c < OUT_COLUMNS; c++) {
            // The tile's share: what the matrix unit cuts off is then small, and O is added in f32. Small terms first.
            if constexpr (STEP_BY_STEP) one_by_one();
            float share[QUERY_TILES][4] = {};
            if constexpr (SPLIT<T>) add_share_terms<SMALL_TERMS, T>(share, a, values, c);
            add_share_terms<LARGE_TERMS, T>(share, a, values, c);
#pragma unroll
            for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) out[m][c][i] += share[m][i];
        }
    } else {
#pragma unroll
        for (int k = 0; k < WEIGHT_STEPS; k++)
#pragma unroll
            for (int c = 0; c + 1 < OUT_COLUMNS; c += 2) {
                if constexpr (STEP_BY_STEP) one_by_one();
                u32 b[4];
                load_right_transposed<ValueTile, LANE_KEYS>(b, values, 2 * k, c);
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int m = 0; m < QUERY_TILES; m++) mma(out[m][c + i], p[m][k], {b[2 * i], b[2 * i + 1]}, T());
            }
        if constexpr (OUT_COLUMNS % 2 == 1) {
            constexpr int c = OUT_COLUMNS - 1;
#pragma unroll
            for (int k = 0; k < WEIGHT_STEPS; k += 2) {
                u32 b[4];
                load_right_transposed_column<ValueTile, LANE_KEYS>(b, values, 2 * k, c);
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int m = 0; m < QUERY_TILES; m++) mma(out[m][c], p[m][k + i], {b[2 * i], b[2 * i + 1]}, T());
            }
        }
    }
}

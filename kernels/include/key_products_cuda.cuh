// Products and tiles of the backward pass by keys on NVIDIA's tensor cores: rows of the products of fragment.cuh are keys.
#pragma once

#include "stage.cuh"

constexpr int M = ROW_TILES;
constexpr int N = TILE_Q / 8;
constexpr int WARP_KEYS = 16 * M;
constexpr int TILE_K = WARPS * WARP_KEYS;
constexpr int LANE_KEYS = 2 * M;

using QTile = Tile<ELEMENT, HEAD_DIM>;
using VTile = Tile<ELEMENT, HEAD_DIM_V>;

// Neighbouring keys belong to one lane: a lane's rows of the accumulators are 2 M keys in a run, so that it reads a bias
// in words. In the tile they stand in the order of the fragments' rows.
struct KeyOrder {
    DEVICE int operator()(int row) const {
        const int warp = row / (16 * M), i = row / 16 % M, half = row / 8 % 2, lane = row % 8;
        return warp * 16 * M + (lane * M + i) * 2 + half;
    }
};
DEVICE int first_key_of_lane() { return warp_index() * 16 * M + lane_index() / 4 * M * 2; }

// Of a part of the queries neighbours belong to one lane too. A part has as many as one step of the half types sums, or as one load
// of half a step gives.
constexpr int PART_N = sizeof(ELEMENT) == 4 ? N : QTile::half_step || VTile::half_step ? (N < 4 ? N : 4) : 2;
constexpr int QUERY_PARTS = N / PART_N;
constexpr int PART_ROWS = 8 * PART_N;
constexpr int PART_QUERIES = 2 * PART_N;
struct QueryOrder {
    DEVICE int operator()(int row) const { return row / PART_ROWS * PART_ROWS + row % 8 / 2 * PART_QUERIES + row % PART_ROWS / 8 * 2 + row % 2; }
};
DEVICE int first_query_of_lane() { return lane_index() % 4 * PART_QUERIES; }

using StageK = Stage<ELEMENT, HEAD_DIM, TILE_K, THREADS, K_PIECES>;
using StageV = Stage<ELEMENT, HEAD_DIM_V, TILE_K, THREADS, V_PIECES>;
using StageQ = Stage<ELEMENT, HEAD_DIM, TILE_Q, THREADS, Q_PIECES>;
using StageDO = Stage<ELEMENT, HEAD_DIM_V, TILE_Q, THREADS, DO_PIECES>;

// Where things lie in shared memory.
constexpr int V_AT = QTile::bytes(TILE_K);
constexpr int KEY_BYTES = V_AT + (NEEDS_DS ? VTile::bytes(TILE_K) : 0);
// Keys that stay in registers pass through the memory that the stages take later.
constexpr int STAGES_AT = K_IN_REGISTERS ? 0 : KEY_BYTES;
constexpr int DO_AT = QTile::bytes(TILE_Q);
// Statistics follow; of the widest half types, which fill the shared memory, four numbers each are in the unused piece that ends a
// row of q.
constexpr bool STATISTICS_IN_GAPS = sizeof(ELEMENT) == 2 && QTile::pieces == 32;
constexpr int STATISTICS_AT = STATISTICS_IN_GAPS ? QTile::pieces * 16 : DO_AT + VTile::bytes(TILE_Q);
constexpr int STATISTICS_PITCH = STATISTICS_IN_GAPS ? QTile::pitch : 16;
constexpr int STAGE_BYTES = DO_AT + VTile::bytes(TILE_Q) + (STATISTICS_IN_GAPS ? 0 : 3 * TILE_Q * 4);
constexpr int MEMORY_BYTES = STAGES_AT + STAGES * STAGE_BYTES < KEY_BYTES ? KEY_BYTES : STAGES_AT + STAGES * STAGE_BYTES;

// Rows are keys; all at once.
constexpr int KEY_PARTS = 1;
constexpr int PART_KEYS = LANE_KEYS;
using Scores = Accumulator[M][PART_N];
DEVICE float& score(Scores& s, int key, int query) { return s[key / 2][query / 2][2 * (key % 2) + query % 2]; }

// A row of products is a group.
constexpr int PART_GROUPS = M;
template <class Action> DEVICE void for_pairs(int group, Action action) {
#pragma unroll
    for (int j = 0; j < PART_N; j++) {
#pragma unroll
        for (int half = 0; half < 2; half++) action(2 * group + half, 2 * j);
    }
}

DEVICE float sum_of_key(float x) { return quad_sum(x); }
DEVICE bool leads_key() { return lane_index() % 4 == 0; }

// Not of the widest f32, whose sums two pieces of code would have in different registers.
constexpr bool TWO_PIECES = sizeof(ELEMENT) == 2 || (HEAD_DIM <= 128 && HEAD_DIM_V <= 128);
constexpr bool LOADS_AHEAD = STAGES == 2;

// The warp's keys and values, in registers or loaded once more for every tile of queries.
struct Keys {
    FragmentA k[K_IN_REGISTERS ? QTile::steps : 1][M], v[K_IN_REGISTERS ? VTile::steps : 1][M];
    u32 shared;

    // Those of the block, from `first` on, of which those from `end` on do not exist.
    DEVICE void start(u32 memory, const Rows<ELEMENT>& of_k, const Rows<ELEMENT>& of_v, i64 first, i64 end) {
        shared = memory;
        StageWalk<StageK, ELEMENT, HEAD_DIM, TILE_K, THREADS, K_PIECES, KeyOrder> k_walk;
        StageWalk<StageV, ELEMENT, HEAD_DIM_V, TILE_K, THREADS, V_PIECES, KeyOrder> v_walk;
        k_walk.start(of_k, first);
        k_walk.fetch(shared, end - first);
        if (NEEDS_DS) {
            v_walk.start(of_v, first);
            v_walk.fetch(shared + V_AT, end - first);
        }
        copy_async_commit();
        copy_async_wait<0>();
        block_barrier();
        if (K_IN_REGISTERS) {
#pragma unroll
            for (int i = 0; i < M; i++) {
                const int first_row = (warp_index() * M + i) * 16;
#pragma unroll
                for (int s = 0; s < QTile::steps; s++) k[s][i] = load_a<ELEMENT, HEAD_DIM>(shared, first_row, s);
#pragma unroll
                for (int s = 0; s < VTile::steps; s++) {
                    if (NEEDS_DS) v[s][i] = load_a<ELEMENT, HEAD_DIM_V>(shared + V_AT, first_row, s);
                }
            }
        }
    }

    // s = K q^T
    DEVICE void logits(Scores& s, int, int query, u32 tile) {
        const auto zero = [](int, int, int) { return 0.0f; };
#pragma unroll
        for (int pass = 0; pass < PASSES<ELEMENT>; pass++) {
#pragma unroll
            for (int x = 0; x < QTile::steps; x++) {
                if (!K_IN_REGISTERS) {
#pragma unroll
                    for (int i = 0; i < M; i++) k[0][i] = load_a<ELEMENT, HEAD_DIM>(shared, (warp_index() * M + i) * 16, x);
                }
                multiply_rows<ELEMENT, HEAD_DIM>(s, k[K_IN_REGISTERS ? x : 0], tile, query, pass, x, zero);
            }
        }
    }
    // dp = V dO^T - delta
    template <class Queries> DEVICE void gradients(Scores& dp, int, int query, u32 tile, const Queries& queries) {
        // Loaded as products take them: two numbers that four registers start from would be copied for every product, which costs
        // more than the loads where there are several.
        Accumulator minus[PART_N];
        if constexpr (M > 1) {
#pragma unroll
            for (int j = 0; j < PART_N; j++) queries.pair_twice(tile, MINUS_DELTA, query + 2 * j, minus[j]);
        } else {
            float once[PART_QUERIES];
            queries.statistics(tile, MINUS_DELTA, query, once);
#pragma unroll
            for (int j = 0; j < PART_N; j++)
#pragma unroll
                for (int y = 0; y < 4; y++) minus[j][y] = once[2 * j + y % 2];
        }
        const auto minus_delta = [&](int, int j, int y) { return minus[j][y]; };
        const auto start = [&](int i, int j, int y) { return STARTS_FROM_DELTA ? minus_delta(i, j, y) : 0.0f; };
#pragma unroll
        for (int pass = 0; pass < PASSES<ELEMENT>; pass++) {
#pragma unroll
            for (int x = 0; x < VTile::steps; x++) {
                if (!K_IN_REGISTERS) {
#pragma unroll
                    for (int i = 0; i < M; i++) v[0][i] = load_a<ELEMENT, HEAD_DIM_V>(shared + V_AT, (warp_index() * M + i) * 16, x);
                }
                multiply_rows<ELEMENT, HEAD_DIM_V>(dp, v[K_IN_REGISTERS ? x : 0], tile + DO_AT, query, pass, x, start);
            }
        }
        if (!STARTS_FROM_DELTA) add_to_all(dp, minus_delta);
    }
};

// The tile of queries that is fetched next.
struct Queries {
    StageWalk<StageQ, ELEMENT, HEAD_DIM, TILE_Q, THREADS, Q_PIECES, QueryOrder> q;
    StageWalk<StageDO, ELEMENT, HEAD_DIM_V, TILE_Q, THREADS, DO_PIECES, QueryOrder> d_o;
    StatisticsWalk<TILE_Q, THREADS> of_queries;

    DEVICE void start_head(const BackwardParams& params, const Position& at, i64 first) {
        q.start(rows_of(params.inputs.q, at, at.head), first);
        d_o.start(rows_of(params.d_o, at, at.head), first);
        of_queries.start(params, at, first);
    }
    // From the tile's first query on `left` are left; with none, nothing is read.
    DEVICE void fetch(u32 to, int left) {
        q.next(to, left);
        d_o.next(to + DO_AT, left);
        of_queries.next(to + STATISTICS_AT, left > 0 ? TILE_Q : 0, STATISTICS_PITCH);
        copy_async_commit();
    }
    // Before a head starts: no copy to its buffers is under way.
    DEVICE void settle() const { copy_async_wait<0>(); }
    // What was fetched is in its tile.
    DEVICE void arrive(u32) const { copy_async_wait<0>(); }

    // Where a number of the lane's first query is, or of a query of a later piece of four.
    static DEVICE u32 statistics_at(u32 tile, int kind, int query) {
        if constexpr (STATISTICS_IN_GAPS) return tile + STATISTICS_AT + (kind * TILE_Q + first_query_of_lane() + query) / 4 * STATISTICS_PITCH;
        return tile + STATISTICS_AT + kind * TILE_Q * 4 + first_query_of_lane() * 4 + query * 4;
    }
    DEVICE void statistics(u32 tile, int kind, int query, float (&to)[PART_QUERIES]) const { load_shared_run(to, statistics_at(tile, kind, query)); }
    // Of queries `query` and `query + 1` of the lane, as the two rows of an accumulator.
    DEVICE void pair_twice(u32 tile, int kind, int query, Accumulator& to) const {
        const u32 at = statistics_at(tile, kind, query / 4 * 4) + query % 4 * 4;
        load_shared_pair_again(to[0], to[1], at);
        load_shared_pair_again(to[2], to[3], at);
    }
};

// A bias of a lane's keys and queries, read in runs of keys, one tile of queries at a time.
template <class T> struct BiasRuns {
    const char* data;
    int stride;  // from query to query, in bytes
    int first;   // the lane's first query
    Run<T, LANE_KEYS> runs[PART_QUERIES];

    // From query `first_query` on, of keys from `key` on.
    DEVICE void start(const T* start, i64 query_stride, i64 key, i64 first_query) {
        first = opaque(first_query_of_lane());
        stride = opaque((int)(query_stride * (i64)sizeof(T)));
        data = (const char*)opaque((i64)(start + key + first_query * query_stride));
    }
    // Reads what a part needs that begins with the lane's query `query`, where `left` are left from the tile's first on. A lane
    // reads others instead of those that do not exist; where none is left, of the tile before.
    DEVICE void fetch(int query, int left) {
        if constexpr (QUERY_EIGHTS) {
            // A lane's queries exist all or none.
            const char* const from = data + (i64)least_int(first + query, left - PART_QUERIES) * stride;
#pragma unroll
            for (int x = 0; x < PART_QUERIES; x++) load_words(runs[x].words, from + (i64)x * stride);
        } else {
#pragma unroll
            for (int x = 0; x < PART_QUERIES; x++) load_words(runs[x].words, data + (i64)least_int(first + query + x, left - 1) * stride);
        }
    }
    // To the next tile.
    DEVICE void advance() { data = (const char*)opaque((i64)(data + (i64)TILE_Q * stride)); }
    DEVICE float operator()(int key, int query) const { return runs[query][key]; }
};

// P or dS as the left factor of a product over queries.
struct Weights {
    static constexpr int steps = PART_ROWS / row_step<ELEMENT>;
    FragmentA factors[M][steps];
    DEVICE void take(const Scores& s, int, int group) {
#pragma unroll
        for (int x = 0; x < steps; x++) {
            const int j = x * row_step<ELEMENT> / 8, other = j + (row_step<ELEMENT> == 16 ? 1 : 0);
            factors[group][x] = as_factor<ELEMENT>(s[group][j], s[group][other]);
        }
    }
};

template <int channels> using Gradient = Accumulator[M][Tile<ELEMENT, channels>::columns];
template <int channels> constexpr int LANE_CHANNELS = 2 * Tile<ELEMENT, channels>::columns;
DEVICE int channel_of_lane(int i) { return 8 * (i / 2) + 2 * (lane_index() % 4) + i % 2; }
template <int columns> DEVICE float gradient_of(const Accumulator (&gradient)[M][columns], int key, int i) {
    return gradient[key / 2][i / 2][2 * (key % 2) + i % 2];
}

// dV += P^T dO
DEVICE void add_to_dv(Gradient<HEAD_DIM_V>& dv, const Weights& p, int query, u32 tile) {
    ProductOverRows<ELEMENT, HEAD_DIM_V, M, Weights::steps>::run(dv, p.factors, tile + DO_AT, query);
}
// dK += dS^T q
DEVICE void add_to_dk(Gradient<HEAD_DIM>& dk, const Weights& ds, int query, u32 tile) {
    ProductOverRows<ELEMENT, HEAD_DIM, M, Weights::steps>::run(dk, ds.factors, tile, query);
}

// Products and tiles of the backward pass by keys on AMD's matrix cores: columns of the products of mma_hip.cuh are keys.
//
// S = q K^T and dP = dO V^T have queries for rows. A lane has 16 queries of one key of each product, and shares the key with one
// other lane; P and dS are the right factors of dV^T = dO^T P and dK^T = q^T dS as they lie. k and v are right factors too, and
// go from memory to registers.
#pragma once

#include "lds_hip.cuh"

constexpr int M = ROW_TILES;
constexpr int WARP_KEYS = 32 * M;
constexpr int TILE_K = WARPS * WARP_KEYS;
constexpr int LANE_KEYS = M;
constexpr int LANE_QUERIES = HALF_ROWS;
static_assert(TILE_Q == PRODUCT_ROWS, "rows of a product");

// Computed once more where it is used, rather than kept in registers.
DEVICE int first_key_of_lane() {
    const int thread = thread_index_again();
    return thread / WARP_THREADS * WARP_KEYS + thread % 32 * M;
}
DEVICE int first_query_of_lane() { return lane_half() * LANE_QUERIES; }

// Rows are queries; the keys of one product at a time.
constexpr int KEY_PARTS = M;
constexpr int PART_KEYS = 1;
constexpr int QUERY_PARTS = 1;
constexpr int PART_ROWS = TILE_Q;
constexpr int PART_QUERIES = LANE_QUERIES;
using Scores = Product;
DEVICE float& score(Scores& s, int, int query) { return s.each[query]; }

constexpr int PART_GROUPS = 1;
template <class Action> DEVICE void for_pairs(int, Action action) {
#pragma unroll
    for (int query = 0; query < LANE_QUERIES; query += 2) action(0, query);
}

DEVICE float sum_of_key(float x) { return x + shuffle_xor(x, 32); }
DEVICE bool leads_key() { return lane_half() == 0; }

// Of two ends the compiler would move the numbers of one to the other's registers.
constexpr bool TWO_PIECES = false;
// Loads go to registers, whatever the buffer is used for meanwhile.
constexpr bool LOADS_AHEAD = true;

// Where things lie in shared memory: what a kernel has no use for takes no room.
constexpr int STAGES_AT = 0;
constexpr bool DO_ROWS = NEEDS_DS || !HALF_TYPE;
constexpr bool Q_COLUMNS = WANT_DK && HALF_TYPE;
constexpr bool DO_COLUMNS = WANT_DV && HALF_TYPE;
constexpr int DO_AT = RowTile<TILE_Q, HEAD_DIM>::bytes;
constexpr int Q_COLUMNS_AT = DO_AT + (DO_ROWS ? RowTile<TILE_Q, HEAD_DIM_V>::bytes : 0);
constexpr int DO_COLUMNS_AT = Q_COLUMNS_AT + (Q_COLUMNS ? ColumnTile<TILE_Q, HEAD_DIM>::bytes : 0);
constexpr int STATISTICS_AT = DO_COLUMNS_AT + (DO_COLUMNS ? ColumnTile<TILE_Q, HEAD_DIM_V>::bytes : 0);
// Where rows fill the LDS, statistics are read from memory.
constexpr bool STATISTICS_IN_LDS = STATISTICS_AT < 65536;
constexpr int STAGE_BYTES = STATISTICS_AT + (STATISTICS_IN_LDS ? 3 * TILE_Q * 4 : 0);
constexpr int MEMORY_BYTES = STAGES * STAGE_BYTES;

// The warp's keys and values.
struct Keys {
    Column<HEAD_DIM, K_PIECES, K_IN_REGISTERS> k[M];
    Column<HEAD_DIM_V, V_PIECES, K_IN_REGISTERS> v[M];

    // Those of the block, from `first` on; in place of those from `end` on, which do not exist, the last one that does.
    DEVICE void start(u32, const Rows<ELEMENT>& of_k, const Rows<ELEMENT>& of_v, i64 first, i64 end) {
#pragma unroll
        for (int i = 0; i < M; i++) {
            const i64 key = least(first + first_key_of_lane() + i, end - 1);
            k[i].start(of_k.data + key * of_k.row_stride, of_k.channel_stride, lane_half());
            if (NEEDS_DS) v[i].start(of_v.data + key * of_v.row_stride, of_v.channel_stride, lane_half());
        }
    }

    // s = q K^T
    DEVICE void logits(Scores& s, int part, int, u32 tile) const {
        s.all = 0.0f;
        multiply_rows<TILE_Q>(s, tile, 0, k[part]);
    }
    // dp = dO V^T - delta
    template <class Queries> DEVICE void gradients(Scores& dp, int part, int, u32 tile, const Queries& queries) const {
        float minus_delta[LANE_QUERIES];
        queries.statistics(tile, MINUS_DELTA, 0, minus_delta);
#pragma unroll
        for (int j = 0; j < LANE_QUERIES; j++) dp.each[j] = STARTS_FROM_DELTA ? minus_delta[j] : 0.0f;
        multiply_rows<TILE_Q>(dp, tile + DO_AT, 0, v[part]);
        if (!STARTS_FROM_DELTA) {
#pragma unroll
            for (int j = 0; j < LANE_QUERIES; j++) dp.each[j] += minus_delta[j];
        }
    }
};

// Rows of q or dO on their way; queries that do not exist are 0.
template <int channels, bool in_pieces, bool to_rows, bool to_columns>
struct QueryLoader : LdsLoader<TILE_Q, channels, in_pieces, to_rows, to_columns> {
    // Loads the tile, of which `there` rows exist, and goes on to the next.
    DEVICE void next(int there) {
        this->load(there);
        this->next_tile();
    }
};

// The tile of queries that is fetched next.
struct Queries {
    QueryLoader<HEAD_DIM, Q_PIECES, true, Q_COLUMNS> q;
    QueryLoader<HEAD_DIM_V, DO_PIECES, DO_ROWS, DO_COLUMNS> d_o;
    static constexpr int rounds = STATISTICS_IN_LDS ? (3 * TILE_Q + THREADS - 1) / THREADS : 0;
    const float* of_queries;                // lse of the tile that is fetched next
    i64 plane;                              // from one kind of statistics to the next
    const float* mine[rounds > 0 ? rounds : 1];  // the thread's numbers of the tile that is fetched next
    float arriving[rounds > 0 ? rounds : 1];

    // The thread's number of a round; of those that have none, the last one.
    static DEVICE int number(int round, int thread = thread_index()) { return least_int(thread + round * THREADS, 3 * TILE_Q - 1); }

    DEVICE void start_head(const BackwardParams& params, const Position& at, i64 first) {
        q.start(rows_of(params.inputs.q, at, at.head), first);
        d_o.start(rows_of(params.d_o, at, at.head), first);
        plane = params.inputs.batch * params.inputs.rows * params.inputs.heads * params.padded_queries;
        of_queries = (const float*)params.statistics + statistics_row(params, at) + first;
#pragma unroll
        for (int round = 0; round < rounds; round++) {
            const int own = number(round, thread_index_again());
            mine[round] = of_queries + own / TILE_Q * plane + own % TILE_Q;
        }
    }
    // From the tile's first query on `left` are left; with none, nothing is read.
    DEVICE void fetch(u32, int left) {
        if (left > 0) {
            const int there = least_int(left, TILE_Q);
            q.next(there);
            d_o.next(there);
#pragma unroll
            for (int round = 0; round < rounds; round++) {
                arriving[round] = load_global<float>(mine[round]);
                mine[round] += TILE_Q;
            }
        }
        of_queries += TILE_Q;
    }
    // Before a head starts.
    DEVICE void settle() const {}
    // Puts what was fetched into its tile.
    DEVICE void arrive(u32 tile) const {
        q.arrive(tile, tile + Q_COLUMNS_AT);
        d_o.arrive(tile + DO_AT, tile + DO_COLUMNS_AT);
        // Threads that have none store what another does.
#pragma unroll
        for (int round = 0; round < rounds; round++) store_shared(tile + STATISTICS_AT + 4 * number(round), arriving[round]);
    }

    // Of the tile before the one that was fetched last.
    DEVICE void statistics(u32 tile, int kind, int, float (&to)[LANE_QUERIES]) const {
        if constexpr (STATISTICS_IN_LDS) {
            // Opaque: read once more for each part rather than kept in registers.
            load_shared_run(to, (KEY_PARTS == 1 ? (int)tile : opaque((int)tile)) + STATISTICS_AT + (kind * TILE_Q + first_query_of_lane()) * 4);
        } else {
            const float* const from = of_queries - 2 * TILE_Q + kind * plane + first_query_of_lane();
#pragma unroll
            for (int j = 0; j < LANE_QUERIES; j++) to[j] = load_global<float>(from + j);
        }
    }
};

// A bias of a lane's keys and queries, read in runs of keys, one tile of queries at a time.
template <class T> struct BiasRuns {
    static constexpr int bytes = LANE_KEYS * (int)sizeof(T);
    static constexpr int words = (bytes + 3) / 4;
    typedef u32 Words __attribute__((ext_vector_type(words)));
    const char* data;  // the tile's first query, the same in all lanes
    i64 stride;        // from query to query, in bytes
    u32 offset;        // of the lane's first key and query; the plan keeps it in 32 bits
    Words runs[LANE_QUERIES];

    // From query `first_query` on, of keys from `key` on.
    DEVICE void start(const T* start, i64 query_stride, i64 key, i64 first_query) {
        data = (const char*)(start + first_query * query_stride);
        stride = query_stride * (i64)sizeof(T);
        offset = (u32)(key * (i64)sizeof(T) + thread_index_again() % 64 / 32 * LANE_QUERIES * stride);
    }
    static DEVICE Words load(const char* from) {
        if constexpr (bytes == 2) return (u32)load_global<u16>(from);
        return load_global<Words>(from);
    }
    // Reads what the tile of queries needs, from whose first on `left` are left; others instead of those that do not exist.
    DEVICE void fetch(int, int left) {
        offset = opaque_offset(offset);
        if (left >= TILE_Q) {
#pragma unroll
            for (int x = 0; x < LANE_QUERIES; x++) runs[x] = load(data + x * stride + offset);
            keep_apart();
        } else if (left > 0) {
            const int first = opaque(first_query_of_lane());
#pragma unroll
            for (int x = 0; x < LANE_QUERIES; x++) runs[x] = load(data + (offset + (u32)(least_int(first + x, left - 1) - first) * (u32)stride));
        }
    }
    // To the next tile.
    DEVICE void advance() { data += TILE_Q * stride; }
    DEVICE float operator()(int key, int query) const {
        if constexpr (sizeof(T) == 4) {
            return float_of(runs[query][key]);
        } else {
            const u32 word = runs[query][key / 2];
            return key % 2 == 0 ? unpack_low<T>(word) : unpack_high<T>(word);
        }
    }
};

// P or dS as the right factor of a product over queries.
struct Weights {
    RightFactor factors[M];
    DEVICE void take(const Scores& s, int part, int) { factors[part].take(s); }
};

template <int channels> using Gradient = Product[M][CHANNEL_TILES<channels>];
template <int tiles> DEVICE float gradient_of(const Product (&gradient)[M][tiles], int key, int i) { return gradient[key][i / 16].each[i % 16]; }

// The gradients of v and k, transposed, += (dO or q)^T (P or dS).
DEVICE void add_to_dv(Gradient<HEAD_DIM_V>& dv, const Weights& p, int, u32 tile) {
    add_products<TILE_Q, HEAD_DIM_V>(dv, p.factors, tile + DO_AT, tile + DO_COLUMNS_AT, 0);
}
DEVICE void add_to_dk(Gradient<HEAD_DIM>& dk, const Weights& ds, int, u32 tile) {
    add_products<TILE_Q, HEAD_DIM>(dk, ds.factors, tile, tile + Q_COLUMNS_AT, 0);
}

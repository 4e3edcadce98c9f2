// Products and tiles of the backward pass by keys on AMD's matrix cores: columns of the products of mma_hip.cuh are keys.
//
// S = q K^T and dP = dO V^T have queries for rows. A lane has 16 queries of one key of each product, and shares the key with one
// other lane; P and dS are the right factors of dV^T = dO^T P and dK^T = q^T dS as they lie. k and v are right factors too, and
// go from memory to registers.
//
// Queries go to LDS through registers: rows of q and dO, and in the half types the same transposed. Rows of both have an odd
// number of pieces, the last one unused where need be, so that eight lanes read from all banks.
#pragma once

#include "mma_hip.cuh"

constexpr int M = ROW_TILES;
constexpr int WARP_KEYS = 32 * M;
constexpr int TILE_K = WARPS * WARP_KEYS;
constexpr int LANE_KEYS = M;
constexpr int LANE_QUERIES = TILE_Q / 2;
static_assert(TILE_Q == 32, "rows of a product");

// Column of a product, and half of the wave.
DEVICE int lane_column() { return lane_index() % 32; }
DEVICE int lane_half() { return lane_index() / 32; }

// Opaque: computed once more where it is used, rather than kept in registers.
DEVICE int first_key_of_lane() { return opaque(warp_index() * WARP_KEYS + lane_column() * M); }
DEVICE int first_query_of_lane() { return lane_half() * LANE_QUERIES; }
// The row of the products that is to be a query.
DEVICE int row_of_query(int query) { return query % 16 / 4 * 8 + query / 16 * 4 + query % 4; }

// Rows are queries; the keys of one product at a time.
constexpr int KEY_PARTS = M;
constexpr int PART_KEYS = 1;
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

// Rows of queries in LDS, in the order of products.
template <int channels> struct QueryRows {
    static constexpr int pieces = pieces_of<ELEMENT>(channels);
    // The widest rows leave no room for an unused piece: the places of pieces are turned by the row instead.
    static constexpr bool turned = pieces >= 64;
    static constexpr int pitch = turned ? pieces : pieces | 1;
    static constexpr int bytes = TILE_Q * pitch * 16;
    static DEVICE int place(int row, int piece) { return (row * pitch + (turned ? piece ^ (row & 7) : piece)) * 16; }
};
// The same transposed, half types: a row for each channel, queries in their own order.
template <int channels> struct QueryColumns {
    static constexpr int padded = (channels + 7) / 8 * 8;
    static constexpr int pitch = (pieces_of<ELEMENT>(TILE_Q) | 1) * 16;
    static constexpr int bytes = padded * pitch;
};

// Where things lie in shared memory: what a kernel has no use for takes no room.
constexpr int STAGES_AT = 0;
constexpr bool DO_ROWS = NEEDS_DS || !HALF_TYPE;
constexpr bool Q_COLUMNS = WANT_DK && HALF_TYPE;
constexpr bool DO_COLUMNS = WANT_DV && HALF_TYPE;
constexpr int DO_AT = QueryRows<HEAD_DIM>::bytes;
constexpr int Q_COLUMNS_AT = DO_AT + (DO_ROWS ? QueryRows<HEAD_DIM_V>::bytes : 0);
constexpr int DO_COLUMNS_AT = Q_COLUMNS_AT + (Q_COLUMNS ? QueryColumns<HEAD_DIM>::bytes : 0);
constexpr int STATISTICS_AT = DO_COLUMNS_AT + (DO_COLUMNS ? QueryColumns<HEAD_DIM_V>::bytes : 0);
// Where rows fill the LDS, statistics are read from memory.
constexpr bool STATISTICS_IN_LDS = STATISTICS_AT < 65536;
constexpr int STAGE_BYTES = STATISTICS_AT + (STATISTICS_IN_LDS ? 3 * TILE_Q * 4 : 0);

// c += rows of queries times a column.
template <int channels, bool in_pieces>
DEVICE void multiply_rows(Product& c, u32 rows, const Column<channels, in_pieces, K_IN_REGISTERS>& right) {
    using Tile = QueryRows<channels>;
    using Right = Column<channels, in_pieces, K_IN_REGISTERS>;
#pragma unroll
    for (int p = 0; p < Right::pairs; p++)
        multiply_add_pieces(c, load_shared<FourWords>(rows + Tile::place(lane_column(), 2 * p + lane_half())), right.pair(p, lane_half()));
    if constexpr (Right::odd)
        multiply_add(c, load_shared<FourHalves>(rows + Tile::place(lane_column(), 2 * Right::pairs) + 8 * lane_half()), right.last, Half());
}

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
    DEVICE void logits(Scores& s, int part, u32 tile) const {
        s.all = 0.0f;
        multiply_rows(s, tile, k[part]);
    }
    // dp = dO V^T - delta
    DEVICE void gradients(Scores& dp, int part, u32 tile, const float (&minus_delta)[LANE_QUERIES]) const {
#pragma unroll
        for (int j = 0; j < LANE_QUERIES; j++) dp.each[j] = STARTS_FROM_DELTA ? minus_delta[j] : 0.0f;
        multiply_rows(dp, tile + DO_AT, v[part]);
        if (!STARTS_FROM_DELTA) {
#pragma unroll
            for (int j = 0; j < LANE_QUERIES; j++) dp.each[j] += minus_delta[j];
        }
    }
};

// Rows of q or dO on their way, tile by tile: a thread takes four channels of two neighbouring queries.
template <int channels, bool in_pieces, bool to_rows, bool to_columns> struct QueryLoader {
    static constexpr int part_bytes = 4 * (int)sizeof(ELEMENT);
    using Part = RowPart<part_bytes / 4, channels, in_pieces>;
    static constexpr int parts = (channels + 7) / 8 * 2;
    static constexpr int row_threads = threads_of_row(parts);
    static constexpr int round_pairs = THREADS / row_threads;
    static constexpr int rounds = (TILE_Q / 2 + round_pairs - 1) / round_pairs;
    // Whether every thread's rows lie alike from round to round.
    static constexpr bool even = rounds == 1 || round_pairs * rounds == TILE_Q / 2;

    const ELEMENT* mine;  // the thread's first part in the tile that is fetched next
    i64 row_stride, channel_stride;
    typename Part::Words arriving[rounds][2];

    // A thread that has nothing of a tile loads what others do, and does not store it.
    static DEVICE int pair() { return thread_index() / row_threads; }
    static DEVICE int part() { return row_threads == parts ? thread_index() % row_threads : least_int(thread_index() % row_threads, parts - 1); }
    // The query of the tile that row `i` of a round is.
    static DEVICE int query(int round, int i) {
        const int query = 2 * (pair() + round * round_pairs) + i;
        return rounds > 1 && even ? query : least_int(query, TILE_Q - 2 + i);
    }
    static DEVICE bool takes_part(int round) {
        return (row_threads == parts || thread_index() % row_threads < parts) &&
               (TILE_Q / 2 % round_pairs == 0 || pair() + round * round_pairs < TILE_Q / 2);
    }

    DEVICE void start(const Operand& from, const Position& at, i64 first) {
        row_stride = from.strides[2];
        channel_stride = from.strides[4];
        // Opaque: what is computed of them would take registers from head to head.
        const int row = opaque(query(0, 0)), channel = opaque(4 * part());
        mine = (const ELEMENT*)from.data + offset_of(from, at, first, at.head) + row * row_stride + channel * channel_stride;
    }
    // Loads the tile, of which `there` rows exist; the others become 0. To the next tile.
    DEVICE void next(int there) {
        const auto load = [&](int row) { return Part::load(mine + row * row_stride, 4 * part(), channel_stride); };
        if (there == TILE_Q) {
#pragma unroll
            for (int round = 0; round < rounds; round++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    arriving[round][i] = load(even ? 2 * round * round_pairs + i : query(round, i) - query(0, 0));
            keep_apart();
        } else {
#pragma unroll
            for (int round = 0; round < rounds; round++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int row = opaque(query(round, i));
                    arriving[round][i] = load(least_int(row, there - 1) - query(0, 0));
                    if (row >= there) arriving[round][i] = 0;
                }
        }
        mine += TILE_Q * row_stride;
    }
    // Stores what was loaded.
    DEVICE void arrive(u32 rows, u32 columns) const {
#pragma unroll
        for (int round = 0; round < rounds; round++) {
            if (!takes_part(round)) continue;
            const int query = QueryLoader::query(round, 0), at = part() * part_bytes;
            if constexpr (to_rows) {
#pragma unroll
                for (int i = 0; i < 2; i++)
                    store_shared(rows + QueryRows<channels>::place(row_of_query(query) + i, at / 16) + at % 16, arriving[round][i]);
            }
            if constexpr (to_columns) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    // The same half of both queries' words.
                    const u32 halves = i % 2 == 0 ? 0x05040100 : 0x07060302;
                    store_shared(columns + (4 * part() + i) * QueryColumns<channels>::pitch + 2 * query,
                                 __builtin_amdgcn_perm(arriving[round][1][i / 2], arriving[round][0][i / 2], halves));
                }
            }
        }
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
    static DEVICE int number(int round) { return least_int(thread_index() + round * THREADS, 3 * TILE_Q - 1); }

    DEVICE void start_head(const BackwardParams& params, const Position& at, i64 first) {
        q.start(params.inputs.q, at, first);
        d_o.start(params.d_o, at, first);
        plane = params.inputs.batch * params.inputs.rows * params.inputs.heads * params.padded_queries;
        of_queries = (const float*)params.statistics + statistics_row(params, at) + first;
#pragma unroll
        for (int round = 0; round < rounds; round++) {
            const int own = opaque(number(round));
            mine[round] = of_queries + own / TILE_Q * plane + own % TILE_Q;
        }
    }
    // Of the tile `there` queries exist; with none, nothing is read.
    DEVICE void fetch(u32, int there) {
        if (there > 0) {
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
    DEVICE void statistics(u32 tile, int kind, float (&to)[LANE_QUERIES]) const {
        if constexpr (STATISTICS_IN_LDS) {
            // Opaque: read once more for each part rather than kept in registers.
            load_shared_run(to, opaque((int)tile) + STATISTICS_AT + (kind * TILE_Q + first_query_of_lane()) * 4);
        } else {
            const float* const from = of_queries - 2 * TILE_Q + kind * plane + first_query_of_lane();
#pragma unroll
            for (int j = 0; j < LANE_QUERIES; j++) to[j] = load_global<float>(from + j);
        }
    }
    // Whether the plain way may be taken for the tile.
    DEVICE bool plain(u32 tile) const {
        if constexpr (!HALF_TYPE) return false;
        return warp_all(allows_plain(load_shared<float>(tile + STATISTICS_AT + lane_index() % TILE_Q * 4)));
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
        offset = (u32)(key * (i64)sizeof(T) + opaque(first_query_of_lane()) * stride);
    }
    static DEVICE Words load(const char* from) {
        if constexpr (bytes == 2) return (u32)load_global<u16>(from);
        return load_global<Words>(from);
    }
    // Reads what the tile of queries needs, of which those to `last` exist; a lane reads others' instead of those that do not.
    DEVICE void fetch(int last) {
        // Opaque: as an offset of 32 bits it is added by the load itself.
        const u32 own = (u32)opaque((int)offset);
        if (last == TILE_Q - 1) {
#pragma unroll
            for (int x = 0; x < LANE_QUERIES; x++) runs[x] = load(data + x * stride + own);
            keep_apart();
        } else {
            const int first = opaque(first_query_of_lane());
#pragma unroll
            for (int x = 0; x < LANE_QUERIES; x++) runs[x] = load(data + (own + (u32)(least_int(first + x, last) - first) * (u32)stride));
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

// P or dS as the right factor of a product over queries: halves by four, or f32.
struct Weights {
    FourHalves halves[M][HALF_TYPE ? LANE_QUERIES / 4 : 1];
    float numbers[M][HALF_TYPE ? 1 : LANE_QUERIES];
    DEVICE void take(const Scores& s, int part, int) {
#pragma unroll
        for (int j = 0; j < LANE_QUERIES; j++) {
            if constexpr (!HALF_TYPE) {
                numbers[part][j] = s.each[j];
            } else if (j % 2 == 0) {
                halves[part][j / 4][j / 2 % 2] = pack_rounded(Pair{s.each[j], s.each[j + 1]}, Half());
            }
        }
    }
};

// Transposed: rows are channels.
template <int channels> constexpr int CHANNEL_TILES = (channels + 31) / 32;
template <int channels> using Gradient = Product[M][CHANNEL_TILES<channels>];
template <int channels> constexpr int LANE_CHANNELS = (channels + 7) / 8 * 4;
DEVICE int channel_of_lane(int i) { return i / 4 * 8 + 4 * lane_half() + i % 4; }
template <int tiles> DEVICE float gradient_of(const Product (&gradient)[M][tiles], int key, int i) { return gradient[key][i / 16].each[i % 16]; }

// The gradient of k or v, transposed, += (q or dO)^T (dS or P).
template <int channels> DEVICE void add_products(Gradient<channels>& gradient, const Weights& weights, u32 rows, u32 columns) {
#pragma unroll
    for (int b = 0; b < CHANNEL_TILES<channels>; b++) {
        const int row = 32 * b + lane_column();
        // Rows that no channel has repeat others; what comes of them is not read.
        const int channel = row < QueryColumns<channels>::padded ? row : row % 8;
        if constexpr (HALF_TYPE) {
#pragma unroll
            for (int i = 0; i < LANE_QUERIES / 8; i++) {
                const FourWords left = load_shared<FourWords>(columns + channel * QueryColumns<channels>::pitch + 2 * first_query_of_lane() + 16 * i);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    multiply_add(gradient[m][b], left.xy, weights.halves[m][2 * i], Half());
                    multiply_add(gradient[m][b], left.zw, weights.halves[m][2 * i + 1], Half());
                }
            }
        } else {
#pragma unroll
            for (int j = 0; j < LANE_QUERIES; j++) {
                const int place = QueryRows<channels>::place(row_of_query(first_query_of_lane() + j), channel / 4) + channel % 4 * 4;
                const float left = load_shared<float>(rows + place);
#pragma unroll
                for (int m = 0; m < M; m++) multiply_add(gradient[m][b], left, weights.numbers[m][j]);
            }
        }
    }
}
DEVICE void add_to_dv(Gradient<HEAD_DIM_V>& dv, const Weights& p, u32 tile) { add_products<HEAD_DIM_V>(dv, p, tile + DO_AT, tile + DO_COLUMNS_AT); }
DEVICE void add_to_dk(Gradient<HEAD_DIM>& dk, const Weights& ds, u32 tile) { add_products<HEAD_DIM>(dk, ds, tile, tile + Q_COLUMNS_AT); }

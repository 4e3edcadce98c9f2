// Products and tiles of the passes with queries for rows on NVIDIA's tensor cores: rows of the products of fragment.cuh are
// queries. A warp owns 16 M of them, and takes a tile of keys in PARTS parts of 8 N neighbours.
#pragma once

#include "stage.cuh"

constexpr int M = ROW_TILES;
constexpr int N = COLUMNS;
constexpr int TILE_Q = WARPS * 16 * M;
constexpr int PART_KEYS = 8 * N;
constexpr int TILE_K = PARTS * PART_KEYS;
constexpr int LANE_QUERIES = 2 * M;
constexpr int LANE_KEYS = 2 * N;
constexpr int RUN_KEYS = LANE_KEYS;
constexpr int LANE_RUNS = 1;

using Scores = Accumulator[M][N];
DEVICE float& score(Scores& s, int query, int key) { return s[query / 2][key / 2][2 * (query % 2) + key % 2]; }
// In the order in which products come.
template <class Action> DEVICE void for_pairs(Action action) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) action(2 * i + half, 2 * j);
}

DEVICE float sum_of_query(float x) { return quad_sum(x); }
DEVICE bool leads_query() { return lane_index() % 4 == 0; }

// A tile's copy goes straight to its buffer, once that is free.
constexpr bool LOADS_AHEAD = STAGES == 2;
DEVICE void copies_started() { copy_async_commit(); }
DEVICE void copies_arrived() { copy_async_wait<0>(); }

using QTile = Tile<ELEMENT, HEAD_DIM>;
using VTile = Tile<ELEMENT, HEAD_DIM_V>;

// Neighbouring keys belong to one lane: a lane's columns of a part are 2 N keys in a run, so that it reads a bias in words.
// In the tile they stand in the order of the columns.
struct KeyOrder {
    DEVICE int operator()(int row) const {
        const int part = row / (8 * N), j = row / 8 % N, column = row % 8;
        return part * 8 * N + column / 2 * 2 * N + 2 * j + column % 2;
    }
};

// Queries in shared memory: q, dO, statistics.
constexpr int DO_AT = QTile::bytes(TILE_Q);
constexpr int STATISTICS_AT = DO_AT + VTile::bytes(TILE_Q);
constexpr int QUERY_BYTES = STATISTICS_AT + 3 * TILE_Q * 4;
// Keys: k, v, and for each warp whether a row that it copied is one that mask or length exclude.
constexpr int V_AT = QTile::bytes(TILE_K);
constexpr int EXCLUDED_AT = V_AT + VTile::bytes(TILE_K);
constexpr int KEY_BYTES = EXCLUDED_AT + (WARPS > 4 ? 32 : 16);
static_assert(WARPS <= 8, "a word for each warp");

// Numbers that a block needs seldom, the same in all threads: in shared memory, where they take no registers.
template <int count> struct Notes {
    static constexpr int bytes = 8 * count;
    u32 address;
    DEVICE void write(const i64 (&numbers)[count]) {
        if (thread_index() != 0) return;
#pragma unroll
        for (int i = 0; i < count; i++) store_shared_i64(address + 8 * i, numbers[i]);
    }
    DEVICE i64 operator[](int i) const { return load_shared_i64(address + 8 * i); }
};

// Whether the statistics of queries that do not exist are there, with an infinite lse.
constexpr bool ROWS_ARE_PADDED = TILE_Q <= 64;

// Whether a part's factors are loaded only when some number of the part before is known. ptxas would begin with the loads of
// many parts, which leaves gradients no registers where two tiles of 32 channels are multiplied.
constexpr bool PARTS_IN_TURN = Q_IN_REGISTERS && QTile::columns == 4 && VTile::columns == 4;

// Where a lane stands: which rows and keys of the block's tiles are its own.
struct Lane {
    int first_row;  // of the tile of queries, the warp's first
    int query;      // the lane's first row of the tile
    LaneOffsets<ELEMENT, HEAD_DIM> channels;
    LaneOffsets<ELEMENT, HEAD_DIM_V> channels_v;
    DEVICE Lane() {
        first_row = warp_index() * 16 * M;
        query = first_row + lane_index() / 4;
    }
    // The same place, where factors are loaded once `known` is.
    DEVICE Lane after(float known) const {
        Lane later = *this;
        if (PARTS_IN_TURN) {
            later.channels.eights = ::after(channels.eights, known);
            later.channels.sixteen = ::after(channels.sixteen, known);
            later.channels_v.eights = ::after(channels_v.eights, known);
        }
        return later;
    }
    // From the lane's first query to its query `i`.
    static DEVICE constexpr int further_query(int i) { return 16 * (i / 2) + 8 * (i % 2); }
    // The first of a lane's run of keys in the first part of a tile.
    static DEVICE int key_of(int thread) { return thread % 4 * LANE_KEYS; }
};

// What a lane needs of its queries.
struct QueryRows {
    FragmentA q[QTile::steps][M], d_o[VTile::steps][M];
    float lse[LANE_QUERIES];
    float delta[M][4];  // as an accumulator starts
    u32 tile;           // in shared memory

    // What has arrived, of which `there` queries exist.
    DEVICE void load(const Lane& lane, int there) {
        load_statistics(lane, there);
        if (Q_IN_REGISTERS) load_factors(lane);
    }
    // The factors, where they stay in registers.
    DEVICE void load_factors(const Lane& lane) {
#pragma unroll
        for (int i = 0; i < M; i++) {
            const int row = lane.first_row + 16 * i;
#pragma unroll
            for (int x = 0; x < QTile::steps; x++) q[x][i] = load_a<ELEMENT, HEAD_DIM>(tile, row, x, lane.channels);
#pragma unroll
            for (int x = 0; x < VTile::steps; x++) d_o[x][i] = load_a<ELEMENT, HEAD_DIM_V>(tile + DO_AT, row, x, lane.channels_v);
        }
    }
    // Queries that do not exist have an infinite lse: what is computed of them is 0.
    DEVICE void load_statistics(const Lane& lane, int there) {
#pragma unroll
        for (int i = 0; i < M; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int query = lane.query + 16 * i + 8 * half;
                const u32 from = tile + STATISTICS_AT + query * 4;
                lse[2 * i + half] = ROWS_ARE_PADDED || query < there ? float_of(load_shared(from)) : INFINITE;
                // Each number is loaded by itself: copies of one would be copied again for every product.
#pragma unroll
                for (int e = 0; e < 2; e++) delta[i][2 * half + e] = load_shared_again(from + 2 * TILE_Q * 4);
            }
        }
    }
    // Whether the plain way holds for the warp's query of this lane; several lanes look at one where there are fewer.
    DEVICE bool allows_plain_of_lane(int there) const {
        if (!MAY_BE_PLAIN) return false;
        const int query = warp_index() * 16 * M + lane_index() % (16 * M);
        const bool allows = allows_plain(float_of(load_shared(tile + STATISTICS_AT + query * 4)));
        return ROWS_ARE_PADDED ? allows : (int)allows | (int)(query >= there);
    }
    // The low parts of lse.
    DEVICE void load_low(float (&low)[LANE_QUERIES], const Lane& lane) const {
#pragma unroll
        for (int i = 0; i < LANE_QUERIES; i++)
            low[i] = float_of(load_shared(tile + STATISTICS_AT + (TILE_Q + opaque(lane.query) + Lane::further_query(i)) * 4));
    }

    // s = q k, dp = dO v - delta, of one part of the keys; factors are in registers, or loaded for this part.
    DEVICE void multiply(Scores& s, Scores& dp, u32 keys, int part, const Lane& lane) {
        const auto zero = [](int, int, int) { return 0.0f; };
        const auto start = [&](int i, int, int x) { return STARTS_FROM_DELTA ? delta[i][x] : 0.0f; };
#pragma unroll
        for (int pass = 0; pass < PASSES<ELEMENT>; pass++) {
#pragma unroll
            for (int x = 0; x < QTile::steps; x++) {
                if (!Q_IN_REGISTERS) {
#pragma unroll
                    for (int i = 0; i < M; i++) q[x][i] = load_a<ELEMENT, HEAD_DIM>(tile, lane.first_row + 16 * i, x, lane.channels);
                }
                multiply_rows<ELEMENT, HEAD_DIM>(s, q[x], keys, part * PART_KEYS, pass, x, zero, lane.channels);
            }
#pragma unroll
            for (int x = 0; x < VTile::steps; x++) {
                if (!Q_IN_REGISTERS) {
#pragma unroll
                    for (int i = 0; i < M; i++) d_o[x][i] = load_a<ELEMENT, HEAD_DIM_V>(tile + DO_AT, lane.first_row + 16 * i, x, lane.channels_v);
                }
                multiply_rows<ELEMENT, HEAD_DIM_V>(dp, d_o[x], keys + V_AT, part * PART_KEYS, pass, x, start, lane.channels_v);
            }
        }
        if (!STARTS_FROM_DELTA) add_to_all(dp, [&](int i, int, int x) { return delta[i][x]; });
    }
};

// A walk over a tile of queries at one place of neighbouring rows of the batch.
struct QueriesWalk {
    template <int channels, bool pieces> using Walk =
        StageWalk<Stage<ELEMENT, channels, TILE_Q, THREADS, pieces>, ELEMENT, channels, TILE_Q, THREADS, pieces>;
    Walk<HEAD_DIM, Q_PIECES> q;
    Walk<HEAD_DIM_V, DO_PIECES> d_o;
    StatisticsWalk<TILE_Q, THREADS> statistics;

    // From query `first` on, of which `there` exist in the tile.
    DEVICE void start(const BackwardParams& params, const Position& at, i64 first, int) {
        q.start(rows_of(params.inputs.q, at, at.head), first);
        d_o.start(rows_of(params.d_o, at, at.head), first);
        statistics.start(params, at, first);
    }
    // Starts the copy of the tile, of which `there` queries exist, and statistics of `padded`.
    DEVICE void fetch(u32 to, int there, int padded) {
        q.fetch(to, there);
        d_o.fetch(to + DO_AT, there);
        statistics.fetch(to + STATISTICS_AT, padded);
    }
    // What was fetched is in its tile, once that of the keys is.
    DEVICE void arrive(QueryRows& queries, u32 tile) const { queries.tile = tile; }
    DEVICE void next_row(const BackwardParams& params) {
        q.shift(params.inputs.q.strides[1]);
        d_o.shift(params.d_o.strides[1]);
        statistics.shift(params.row_statistics);
    }
};

// What key mask and length say of the keys whose rows a thread copies: read one tile ahead, so that nothing waits for it.
template <class Walk> struct KeptKeys {
    using Stage = typename Walk::Stage;
    u32 kept[Stage::turns];
    const u8* at;

    // From the key at `mask` on.
    DEVICE void start(const u8* mask, i64 stride) {
        // What has no row excludes none.
#pragma unroll
        for (int turn = 0; turn < Stage::turns; turn++) kept[turn] = 1;
        at = mask;
        if (Walk::even) at += KeyOrder()(thread_index() / Stage::Layout::pieces) * stride;
    }
    DEVICE void shift(i64 bytes) { at = (const u8*)opaque((i64)(at + bytes)); }
    // Of a tile of keys, `left` of which are within the length.
    DEVICE void read(i64 stride, int left) {
        if constexpr (Walk::even) {
            const int first = KeyOrder()(thread_index() / Stage::Layout::pieces);
            const u8* of_turn = at;
#pragma unroll
            for (int turn = 0; turn < Stage::turns; turn++) {
                const int further = KeyOrder()(turn * Walk::turn_rows);
                if (turn > 0) of_turn = (const u8*)opaque((i64)(of_turn + (further - KeyOrder()((turn - 1) * Walk::turn_rows)) * stride));
                if (Stage::count % THREADS != 0 && thread_index() + turn * THREADS >= Stage::count) continue;
                kept[turn] = KEY_MASK ? load_byte_or_zero(of_turn, first + further < left) : (u32)(first + further < left);
            }
        } else {
            Stage::each([&](int turn, int row, int) {
                const int key = KeyOrder()(row);
                kept[turn] = KEY_MASK ? load_byte_or_zero(at + key * stride, key < left) : (u32)(key < left);
            });
        }
    }
    // Whether some row of the thread's is excluded.
    DEVICE bool excludes() const {
        bool some = false;
        Stage::each([&](int turn, int, int) { some = some || kept[turn] == 0; });
        return some;
    }
};

// A walk over tiles of keys, or over tiles at one place of neighbouring rows of the batch.
struct KeysWalk {
    using StageK = Stage<ELEMENT, HEAD_DIM, TILE_K, THREADS, K_PIECES>;
    using StageV = Stage<ELEMENT, HEAD_DIM_V, TILE_K, THREADS, V_PIECES>;
    static constexpr bool alike = StageK::turns == StageV::turns && QTile::pieces == VTile::pieces;
    using WalkK = StageWalk<StageK, ELEMENT, HEAD_DIM, TILE_K, THREADS, K_PIECES, KeyOrder>;
    using WalkV = StageWalk<StageV, ELEMENT, HEAD_DIM_V, TILE_K, THREADS, V_PIECES, KeyOrder>;
    WalkK k;
    WalkV v;
    KeptKeys<WalkK> of_k;
    KeptKeys<WalkV> of_v;
    i64 mask_stride;

    DEVICE void start(const AttentionInputs& in, const Position& at, i64 head, i64 first_key) {
        k.start(rows_of(in.k, at, head), first_key);
        v.start(rows_of(in.v, at, head), first_key);
        mask_stride = KEY_MASK ? in.key_mask.strides[2] : 0;
        const u8* mask = (const u8*)in.key_mask.data + at.batch * in.key_mask.strides[0] + at.row * in.key_mask.strides[1] + first_key * mask_stride;
        of_k.start(mask, mask_stride);
        of_v.start(mask, mask_stride);
    }
    // Reads what is known of the keys of the tile after the one that is fetched next; `left` of them are within the length.
    DEVICE void look(int left) {
        of_k.read(mask_stride, left);
        if (!alike) of_v.read(mask_stride, left);
    }
    // To the row after this one, or to the tile after this one.
    DEVICE void shift_mask(i64 bytes) {
        if (KEY_MASK) of_k.shift(bytes);
        if (KEY_MASK && !alike) of_v.shift(bytes);
    }
    DEVICE void shift(i64 of_k, i64 of_v) {
        k.shift(of_k);
        v.shift(of_v);
    }
    // What was fetched is in its tile.
    DEVICE void arrive(u32) const { copies_arrived(); }
    // Starts the copy of the tile that was looked at; excluded keys become zeros, since NaN times P = 0 is NaN.
    DEVICE void fetch(u32 to) const {
        k.fetch_kept(to, [&](int turn, int) { return of_k.kept[turn] != 0; });
        v.fetch_kept(to + V_AT, [&](int turn, int) { return alike ? of_k.kept[turn] != 0 : of_v.kept[turn] != 0; });
        if (CAN_EXCLUDE) {
            const bool some = warp_any(of_k.excludes());
            if (lane_index() == 0) store_shared(to + EXCLUDED_AT + warp_index() * 4, some ? 1u : 0u);
        }
    }
};

// Whether mask and length keep every key that some warp has copied of a tile that has arrived: one warp for a lane.
DEVICE bool keeps_all_of_lane(u32 keys) {
    return !CAN_EXCLUDE || load_shared(keys + EXCLUDED_AT + lane_index() % (THREADS / WARP_THREADS) * 4) == 0;
}

// dQ += dS K, or = where it starts.
using QuerySums = Accumulator[M][QTile::columns];
DEVICE void clear(QuerySums& dq) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int c = 0; c < QTile::columns; c++)
#pragma unroll
            for (int x = 0; x < 4; x++) dq[i][c][x] = 0.0f;
}
DEVICE void add_keys(QuerySums& dq, const Scores& ds, u32 keys, int part, const Lane& lane, bool starts) {
    constexpr int steps = PART_KEYS / row_step<ELEMENT>;
    FragmentA factors[M][steps];
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int x = 0; x < steps; x++) {
            const int j = x * row_step<ELEMENT> / 8, other = j + (row_step<ELEMENT> == 16 ? 1 : 0);
            factors[i][x] = as_factor<ELEMENT>(ds[i][j], ds[i][other]);
        }
    ProductOverRows<ELEMENT, HEAD_DIM, M, steps>::run(dq, factors, keys, part * PART_KEYS, starts, lane.channels);
}

// Two neighbouring elements that are aligned as one.
template <class T> DEVICE void store_pair(T* to, float x, float y) {
    if constexpr (sizeof(T) == 4) {
        *(u64*)to = (u64)bits_of(y) << 32 | bits_of(x);
    } else {
        *(u32*)to = pack<T>(x, y);
    }
}

// Where a lane's rows of dQ go. `pairs`: its two channels are neighbours, aligned.
template <class T, bool pairs> struct QueryGradient {
    T* data;  // of the lane's first row, and its first channel
    i64 row_stride, channel_stride;

    DEVICE void start(T* first, i64 stride_of_rows, i64 stride_of_channels, const Lane& lane) {
        row_stride = stride_of_rows;
        channel_stride = pairs ? 1 : stride_of_channels;
        data = (T*)opaque((i64)(first + lane.query * row_stride + 2 * (lane_index() % 4) * channel_stride));
    }
    // To other rows of the batch.
    DEVICE void shift(i64 elements) { data = (T*)opaque((i64)(data + elements)); }
    // The lane's rows, the first of which is `first`, of a tile of which `there` exist.
    DEVICE void store(const QuerySums& sums, int first, int there, float scale) const {
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (first + 16 * i + 8 * half >= there) continue;
                T* to = data + (16 * i + 8 * half) * row_stride;
#pragma unroll
                for (int c = 0; c < QTile::columns; c++) {
                    const float x = sums[i][c][2 * half] * scale, y = sums[i][c][2 * half + 1] * scale;
                    if constexpr (pairs) {
                        store_pair(to + 8 * c, x, y);
                    } else {
                        const int channel = 8 * c + 2 * (lane_index() % 4);
                        if (channel < HEAD_DIM) to[8 * c * channel_stride] = from_f32<T>(x);
                        if (channel + 1 < HEAD_DIM) to[(8 * c + 1) * channel_stride] = from_f32<T>(y);
                    }
                }
            }
    }
};

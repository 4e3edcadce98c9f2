// Products and tiles of the passes with queries for rows of S on AMD's matrix cores: columns of the products of mma_hip.cuh are
// queries.
//
// S^T = k q^T and dP^T = v dO^T have keys for rows. A lane has 16 keys of one query of each product, and shares the query with
// one other lane; dS is the right factor of dQ^T = k^T dS^T as it lies. q and dO are right factors too, and go from memory to
// registers.
#pragma once

#include "lds_hip.cuh"

static_assert(ROW_TILES == 1, "the columns of a product");
constexpr int TILE_Q = WARPS * 32;
constexpr int PART_KEYS = PRODUCT_ROWS;
constexpr int TILE_K = PARTS * PART_KEYS;
constexpr int LANE_QUERIES = 1;
constexpr int LANE_KEYS = HALF_ROWS;
constexpr int RUN_KEYS = 8;
constexpr int LANE_RUNS = LANE_KEYS / RUN_KEYS;

using Scores = Product;
DEVICE float& score(Scores& s, int, int key) { return s.each[key]; }
template <class Action> DEVICE void for_pairs(Action action) {
#pragma unroll
    for (int key = 0; key < LANE_KEYS; key += 2) action(0, key);
}

DEVICE float sum_of_query(float x) { return x + shuffle_xor(x, 32); }
DEVICE bool leads_query() { return lane_half() == 0; }

// Loads go to registers, whatever the buffer is used for meanwhile.
constexpr bool LOADS_AHEAD = true;
DEVICE void copies_started() {}

// Queries take no shared memory. Keys: rows of k and v, in the half types k transposed where dQ is wanted; and for each wave
// whether a row that it copied is one that mask or length exclude, where there is room.
constexpr int QUERY_BYTES = 0;
constexpr bool K_COLUMNS = WANT_DQ && HALF_TYPE;
constexpr int V_AT = RowTile<TILE_K, HEAD_DIM>::bytes;
constexpr int K_COLUMNS_AT = V_AT + RowTile<TILE_K, HEAD_DIM_V>::bytes;
constexpr int EXCLUDED_AT = K_COLUMNS_AT + (K_COLUMNS ? ColumnTile<TILE_K, HEAD_DIM>::bytes : 0);
constexpr bool EXCLUDED_IN_LDS = EXCLUDED_AT < 65536;
constexpr int KEY_BYTES = EXCLUDED_AT + (EXCLUDED_IN_LDS ? 16 : 0);

// Numbers that a block needs seldom, the same in all threads: scalar registers have room for them.
template <int count> struct Notes {
    static constexpr int bytes = 0;
    u32 address;
    i64 numbers[count];
    DEVICE void write(const i64 (&from)[count]) {
#pragma unroll
        for (int i = 0; i < count; i++) numbers[i] = same_in_warp(from[i]);
    }
    DEVICE i64 operator[](int i) const { return numbers[i]; }
};

// Where a lane stands: which query and keys of the block's tiles are its own.
struct Lane {
    int query;
    DEVICE Lane() { query = warp_index() * 32 + lane_column(); }
    DEVICE Lane after(float) const { return *this; }
    static DEVICE constexpr int further_query(int) { return 0; }
    // The first of a lane's keys in the first part of a tile.
    static DEVICE int key_of(int thread) { return thread / 32 % 2 * LANE_KEYS; }
};

// What a lane needs of its query.
struct QueryRows {
    Column<HEAD_DIM, Q_PIECES, Q_IN_REGISTERS> q;
    Column<HEAD_DIM_V, DO_PIECES, Q_IN_REGISTERS> d_o;
    float lse[1], low, minus_delta;

    // A query that does not exist has an infinite lse: what is computed of it is 0.
    DEVICE void load(const Lane& lane, int there) {
        if (lane.query >= there) lse[0] = INFINITE;
    }
    DEVICE void load_low(float (&to)[1], const Lane&) const { to[0] = low; }
    // Whether the plain way holds for the lane's query.
    DEVICE bool allows_plain_of_lane(int) const { return allows_plain(lse[0]); }

    // s = q k, dp = dO v - delta, of one part of the keys.
    DEVICE void multiply(Scores& s, Scores& dp, u32 keys, int part, const Lane&) const {
        s.all = 0.0f;
        dp.all = STARTS_FROM_DELTA ? minus_delta : 0.0f;
        multiply_rows<TILE_K>(s, keys, part * PART_KEYS, q);
        multiply_rows<TILE_K>(dp, keys + V_AT, part * PART_KEYS, d_o);
        if (!STARTS_FROM_DELTA) dp.all += minus_delta;
    }
};

// A walk over a tile of queries at one place of neighbouring rows of the batch: a lane reads its own.
struct QueriesWalk {
    const ELEMENT *q, *d_o;
    const float* statistics;
    i64 plane;  // from one kind of statistics to the next
    i64 q_channels, d_o_channels;
    QueryRows arriving;

    // From query `first` on, of which `there` exist in the tile; in place of one that does not, the last one that does.
    DEVICE void start(const BackwardParams& params, const Position& at, i64 first, int there) {
        const Operand &of_q = params.inputs.q, &of_d_o = params.d_o;
        const i64 query = first + least_int(Lane().query, there - 1);
        q = (const ELEMENT*)of_q.data + offset_of(of_q, at, query, at.head);
        d_o = (const ELEMENT*)of_d_o.data + offset_of(of_d_o, at, query, at.head);
        q_channels = of_q.strides[4];
        d_o_channels = of_d_o.strides[4];
        plane = params.inputs.batch * params.inputs.rows * params.inputs.heads * params.padded_queries;
        statistics = (const float*)params.statistics + statistics_row(params, at) + query;
    }
    DEVICE void fetch(u32, int, int) {
        arriving.q.start(q, q_channels, lane_half());
        arriving.d_o.start(d_o, d_o_channels, lane_half());
        arriving.lse[0] = load_global<float>(statistics);
        arriving.low = load_global<float>(statistics + plane);
        arriving.minus_delta = load_global<float>(statistics + 2 * plane);
    }
    DEVICE void arrive(QueryRows& queries, u32) const { queries = arriving; }
    DEVICE void next_row(const BackwardParams& params) {
        q += params.inputs.q.strides[1];
        d_o += params.d_o.strides[1];
        statistics += params.row_statistics;
    }
};

// What the key mask says of the keys whose rows a thread copies.
template <class Loader> struct KeptKeys {
    u32 kept[Loader::rounds][2];

    // Of a tile of keys, whose mask begins at `mask`, `left` of which are within the length.
    DEVICE void read(const u8* mask, i64 stride, int left) {
#pragma unroll
        for (int round = 0; round < Loader::rounds; round++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int key = opaque(Loader::row(round, i));
                kept[round][i] = key < left ? load_global<u8>(mask + key * stride) : 0;
            }
    }
};

// A walk over tiles of keys, or over tiles at one place of neighbouring rows of the batch.
struct KeysWalk {
    using LoaderK = LdsLoader<TILE_K, HEAD_DIM, K_PIECES, true, K_COLUMNS>;
    using LoaderV = LdsLoader<TILE_K, HEAD_DIM_V, V_PIECES, true, false>;
    static constexpr bool alike = LoaderK::parts == LoaderV::parts;
    LoaderK k;
    LoaderV v;
    KeptKeys<LoaderK> of_k;
    KeptKeys<LoaderV> of_v;
    const u8 *mask, *mask_of_next;
    i64 mask_stride;
    int left_of_next, left;  // keys within the length, of the tile that was looked at, and of the one that is on its way

    DEVICE void start(const AttentionInputs& in, const Position& at, i64 head, i64 first_key) {
        k.start(rows_of(in.k, at, head), first_key);
        v.start(rows_of(in.v, at, head), first_key);
        mask_stride = KEY_MASK ? in.key_mask.strides[2] : 0;
        mask = (const u8*)in.key_mask.data + at.batch * in.key_mask.strides[0] + at.row * in.key_mask.strides[1] + first_key * mask_stride;
    }
    // The tile that is fetched next; `within` of its keys are within the length.
    DEVICE void look(int within) {
        left_of_next = within;
        mask_of_next = mask;
    }
    // To the row after this one, or to the tile after this one.
    DEVICE void shift_mask(i64 bytes) { mask += bytes; }
    DEVICE void shift(i64 of_k, i64 of_v) {
        k.shift(of_k);
        v.shift(of_v);
    }
    // Loads the tile that was looked at.
    DEVICE void fetch(u32) {
        left = left_of_next;
        if (KEY_MASK) of_k.read(mask_of_next, mask_stride, left);
        if (KEY_MASK && !alike) of_v.read(mask_of_next, mask_stride, left);
        k.load(greatest_int(left, 1));
        v.load(greatest_int(left, 1));
    }
    // Puts it into its place; excluded keys become 0, since NaN times P = 0 is NaN.
    DEVICE void arrive(u32 keys) {
        bool some = left < TILE_K;
        if (KEY_MASK) {
#pragma unroll
            for (int round = 0; round < LoaderK::rounds; round++) some = some || of_k.kept[round][0] == 0 || of_k.kept[round][1] == 0;
            some = warp_any(some);
        }
        if (CAN_EXCLUDE && some) {
            k.clear([&](int round, int i) { return KEY_MASK ? of_k.kept[round][i] != 0 : LoaderK::row(round, i) < left; });
            v.clear([&](int round, int i) { return KEY_MASK ? (alike ? of_k.kept[round][i] : of_v.kept[round][i]) != 0 : LoaderV::row(round, i) < left; });
        }
        k.arrive(keys, keys + K_COLUMNS_AT);
        v.arrive(keys + V_AT, 0);
        if (CAN_EXCLUDE && EXCLUDED_IN_LDS && lane_index() == 0) store_shared(keys + EXCLUDED_AT + warp_index() * 4, some ? 1u : 0u);
    }
};

// Whether mask and length keep every key that some wave has copied of a tile that has arrived: one wave for a lane.
DEVICE bool keeps_all_of_lane(u32 keys) {
    return !CAN_EXCLUDE || (EXCLUDED_IN_LDS && load_shared(keys + EXCLUDED_AT + lane_index() % WARPS * 4) == 0);
}

// dQ^T += K^T dS^T, or = where it starts.
using QuerySums = Product[1][CHANNEL_TILES<HEAD_DIM>];
DEVICE void clear(QuerySums& dq) {
#pragma unroll
    for (int b = 0; b < CHANNEL_TILES<HEAD_DIM>; b++) dq[0][b].all = 0.0f;
}
DEVICE void add_keys(QuerySums& dq, const Scores& ds, u32 keys, int part, const Lane&, bool starts) {
    if (starts) clear(dq);
    RightFactor factors[1];
    factors[0].take(ds);
    add_products<TILE_K, HEAD_DIM>(dq, factors, keys, keys + K_COLUMNS_AT, part * PART_KEYS);
}

// Where a lane's row of dQ goes. `fours`: its channels by four are neighbours, aligned.
template <class T, bool fours> struct QueryGradient {
    T* data;  // the row's first channel of the lane
    i64 channel_stride;

    DEVICE void start(T* first, i64 stride_of_rows, i64 stride_of_channels, const Lane& lane) {
        channel_stride = fours ? 1 : stride_of_channels;
        data = first + lane.query * stride_of_rows + 4 * lane_half() * channel_stride;
    }
    // To other rows of the batch.
    DEVICE void shift(i64 elements) { data += elements; }
    // The row, `query` of a tile of which `there` exist.
    DEVICE void store(const QuerySums& sums, int query, int there, float scale) const {
        if (query >= there) return;
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS<HEAD_DIM>; i += 4) {
            float x[4];
#pragma unroll
            for (int e = 0; e < 4; e++) x[e] = sums[0][i / 16].each[i % 16 + e] * scale;
            T* const to = data + 2 * i * channel_stride;
            if constexpr (fours && sizeof(T) == 4) {
                store_global(to, FourWords{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])});
            } else if constexpr (fours) {
                store_global(to, FourHalves{pack<T>(x[0], x[1]), pack<T>(x[2], x[3])});
            } else {
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (channel_of_lane(i + e) < HEAD_DIM) to[e * channel_stride] = from_f32<T>(x[e]);
            }
        }
    }
};

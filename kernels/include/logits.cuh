// Logits of the passes with queries for rows from products of q and k, lse subtracted, and what masks exclude.
//
// A lane owns runs of 2 n keys, columns of n accumulators. Biases whose rows move in pieces are read by such runs, where RUNS
// says that no run crosses the end of the keys.
//
// Two ways, both in base 2: those of key_logits.cuh.
#pragma once

#include "backward.cuh"
#include "stage.cuh"

// A walk over lse, its low part and -delta of the queries of a row, tile by tile; those beyond the padded end are 0.
template <int queries, int threads> struct StatisticsWalk {
    static_assert(3 * queries / 4 <= threads, "a piece for each thread at most");
    const float* source;

    DEVICE void start(const BackwardParams& params, const Position& at, i64 first) {
        const i64 plane = params.inputs.batch * params.inputs.rows * params.inputs.heads * params.padded_queries;
        const int kind = thread_index() / (queries / 4), piece = thread_index() % (queries / 4);
        source = (const float*)params.statistics + kind * plane + statistics_row(params, at) + first + 4 * piece;
    }
    DEVICE void shift(i64 elements) { source += elements; }
    // Starts the copy of the tile, before the padded end of which there are `left` queries.
    DEVICE void fetch(u32 to, i64 left) {
        if (thread_index() >= 3 * queries / 4) return;
        copy_async(to + thread_index() * 16, source, 4 * (thread_index() % (queries / 4)) < left ? 16 : 0);
    }
    // The same, and on to the next tile.
    DEVICE void next(u32 to, i64 left) {
        fetch(to, left);
        shift(queries);
    }
};

template <int m, int n, class Term> DEVICE void add_to_all(Accumulator (&acc)[m][n], Term term) {
#pragma unroll
    for (int i = 0; i < m; i++)
#pragma unroll
        for (int j = 0; j < n; j++)
#pragma unroll
            for (int x = 0; x < 4; x++) acc[i][j][x] += term(i, j, x);
}

// A lane's columns of n accumulators stand for 2 n neighbours, of which this is the first: column 2 i + e of accumulator j
// is number 2 j + e of lane i's.
template <int n> DEVICE int first_of_lane() { return lane_index() % 4 * 2 * n; }

// A bias of a lane's queries (rows of the accumulators) and keys (columns), one part of 8 n keys at a time; or, where it stays
// in registers from term to term, all `parts` of a tile.
template <int index, int m, int n, int parts, bool may_stay> struct QueryBias {
    using T = typename Bias<index>::T;
    static constexpr int kind = Bias<index>::kind;
    static constexpr bool ahead = kind >= PIECES && RUNS;
    static constexpr bool by_query = kind == PIECES;
    static constexpr bool stays = may_stay && ahead && by_query && sizeof(T) == 2;
    const T* data;
    const char* rows[ahead && by_query ? m : 1][ahead && by_query ? 2 : 1];  // at the lane's first key
    Run<T, 2 * n> runs[stays ? parts : 1][ahead && by_query ? m : 1][ahead && by_query ? 2 : 1];

    // From the lane's first key on. Queries that do not exist read the last one that does.
    DEVICE void start(const AttentionInputs& in, const Position& at, i64 query, i64 key) {
        if constexpr (kind == ABSENT) return;
        data = bias_data<index>(in, at);
        if constexpr (ahead) {
#pragma unroll
            for (int i = 0; i < (by_query ? m : 1); i++) {
#pragma unroll
                for (int half = 0; half < (by_query ? 2 : 1); half++) {
                    const i64 row = by_query ? least(query + 16 * i + 8 * half, in.seqlen_q - 1) * in.biases[index].strides[3] : 0;
                    rows[i][half] = (const char*)opaque((i64)(data + row + key));
                }
            }
        }
    }
    // To other rows of the batch, and to other keys.
    DEVICE void shift(i64 of_rows, i64 keys) {
        if constexpr (kind == ABSENT || stays) return;
        data += of_rows;
        if constexpr (ahead) {
#pragma unroll
            for (int i = 0; i < (by_query ? m : 1); i++) {
#pragma unroll
                for (int half = 0; half < (by_query ? 2 : 1); half++) {
                    rows[i][half] = (const char*)opaque((i64)(rows[i][half] + (of_rows + keys) * (i64)sizeof(T)));
                }
            }
        }
    }
    // To the next row of the batch, or to none.
    DEVICE void next_row(const AttentionInputs& in, bool more) {
        if constexpr (kind != ABSENT) shift(more ? in.biases[index].strides[1] : 0, 0);
    }
    DEVICE void load(int part, int keys) {
#pragma unroll
        for (int i = 0; i < (by_query ? m : 1); i++) {
#pragma unroll
            for (int half = 0; half < (by_query ? 2 : 1); half++) load_words(runs[stays ? part : 0][i][half].words, rows[i][half] + keys * (int)sizeof(T));
        }
    }
    // Reads what stays of a part whose run of keys begins `keys` after the lane's first.
    DEVICE void fetch_once(int part, int keys) {
        if constexpr (stays) load(part, keys);
    }
    // Hides from the compiler what stays: nothing is computed from it ahead of time.
    DEVICE void hide() {
        if constexpr (stays) {
#pragma unroll
            for (int part = 0; part < parts; part++)
#pragma unroll
                for (int i = 0; i < m; i++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
#pragma unroll
                        for (u32& word : runs[part][i][half].words) word = (u32)opaque((int)word);
        }
    }
    // Reads what does not.
    DEVICE void fetch(int keys) {
        if constexpr (ahead && !stays) load(0, keys);
    }
    template <bool plain> DEVICE float add(float sum, const AttentionInputs& in, i64 query, i64 key, int part, int i, int half, int j, int e) const {
        if constexpr (kind == ABSENT) return sum;
        if constexpr (ahead) return with_bias<plain>(sum, runs[stays ? part : 0][by_query ? i : 0][by_query ? half : 0][2 * j + e]);
        const Operand& bias = in.biases[index];
        const i64 row = least(query, in.seqlen_q - 1), column = least(key + 2 * j + e, in.seqlen_k - 1);
        return with_bias<plain>(sum, to_f32(data[row * bias.strides[3] + column * bias.strides[4]]));
    }
};

// Every bias of a lane's tile with queries for rows.
template <int m, int n, int parts, bool may_stay> struct QueryBiases {
    QueryBias<0, m, n, parts, may_stay> bias0;
    QueryBias<1, m, n, parts, may_stay> bias1;
    QueryBias<2, m, n, parts, may_stay> bias2;
    QueryBias<3, m, n, parts, may_stay> bias3;
    i64 query;
    float slope;

    DEVICE void start(const AttentionInputs& in, const Position& at, i64 first_query, i64 key) {
        query = first_query;
        if (ALIBI) slope = ((const float*)in.alibi_slopes)[at.head];
        bias0.start(in, at, query, key);
        bias1.start(in, at, query, key);
        bias2.start(in, at, query, key);
        bias3.start(in, at, query, key);
    }
    DEVICE void next_row(const AttentionInputs& in, bool more) {
        bias0.next_row(in, more);
        bias1.next_row(in, more);
        bias2.next_row(in, more);
        bias3.next_row(in, more);
    }
    DEVICE void next_keys(int keys) {
        bias0.shift(0, keys);
        bias1.shift(0, keys);
        bias2.shift(0, keys);
        bias3.shift(0, keys);
    }
    DEVICE void fetch_once(int part, int keys) {
        bias0.fetch_once(part, keys);
        bias1.fetch_once(part, keys);
        bias2.fetch_once(part, keys);
        bias3.fetch_once(part, keys);
    }
    DEVICE void hide() {
        bias0.hide();
        bias1.hide();
        bias2.hide();
        bias3.hide();
    }
    DEVICE void fetch(int keys) {
        bias0.fetch(keys);
        bias1.fetch(keys);
        bias2.fetch(keys);
        bias3.fetch(keys);
    }
    // s = scale s + biases - lse, of the lane's keys of a part, from `key` on.
    template <bool plain>
    DEVICE void take(Accumulator (&s)[m][n], const AttentionInputs& in, i64 key, int part, const float (&lse)[m][2], const float (&low)[m][2]) const {
#pragma unroll
        for (int i = 0; i < m; i++) {
#pragma unroll
            for (int j = 0; j < n; j++) {
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const int half = x / 2, e = x % 2;
                    const i64 row = query + 16 * i + 8 * half;
                    float sum = plain ? NOTHING : 0.0f;
                    sum = bias0.template add<plain>(sum, in, row, key, part, i, half, j, e);
                    sum = bias1.template add<plain>(sum, in, row, key, part, i, half, j, e);
                    sum = bias2.template add<plain>(sum, in, row, key, part, i, half, j, e);
                    sum = bias3.template add<plain>(sum, in, row, key, part, i, half, j, e);
                    const float alibi = ALIBI ? alibi_base2(slope, distance(in, row, key + 2 * j + e)) : 0.0f;
                    s[i][j][x] = logit_of<plain>(s[i][j][x], in.scale_base2, sum, alibi, lse[i][half], low[i][half]);
                }
            }
        }
    }
};

// P = 0 and dS = 0 for pairs that segments or positions exclude, queries for rows, the lane's from `row` of the tile on; bit 2 j + e of `kept` says whether mask and length keep
// the key of that column, the lane's from `column` of the tile on.
template <int m, int n>
DEVICE void exclude_by_query(Accumulator (&s)[m][n], Accumulator (&dp)[m][n], const AttentionInputs& in, const Position& at,
                             i64 first_query, int row, int tile_q, i64 first_key, int column, int tile_k, u32 kept) {
    const Band bounds = POSITIONS ? band(in, first_query, first_key) : Band{0, 0};
    const bool cut = POSITIONS && cuts(bounds, tile_q, tile_k);
    const u32 all = (u32)((1ull << 2 * n) - 1);
    if (!SEGMENTS && !cut && warp_all(kept == all)) return;
#pragma unroll
    for (int j = 0; j < n; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int offset = column + 2 * j + e;
            const i32 of_key = SEGMENTS ? segment(in.k_segments, at, least(first_key + offset, in.seqlen_k - 1)) : 0;
#pragma unroll
            for (int i = 0; i < m; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int query = row + 16 * i + 8 * half, distance = offset - query;
                    bool keep = (kept >> (2 * j + e) & 1) != 0 && (!cut || (distance >= bounds.low && distance <= bounds.high));
                    if (SEGMENTS) keep = keep && segment(in.q_segments, at, least(first_query + query, in.seqlen_q - 1)) == of_key;
                    s[i][j][2 * half + e] = keep ? s[i][j][2 * half + e] : -INFINITE;
                    dp[i][j][2 * half + e] = keep ? dp[i][j][2 * half + e] : 0.0f;
                }
            }
        }
    }
}

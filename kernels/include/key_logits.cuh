// Logits of the backward pass by keys: biases, ALiBi, lse, and what segments and positions exclude.
//
// A lane owns neighbouring keys and neighbouring queries. Biases whose rows move in pieces are read by runs of its keys, one tile
// of queries ahead, where RUNS says that no run crosses the end of the keys.
//
// Two ways, both in base 2. The plain one, (scale (q k) - lse) + log2(e) (sum of biases), holds while lse is small; biases are
// added to each other first, so that large ones that cancel leave what forward had. The other does what forward's general
// path does, with biases rounded and saturated one by one, and subtracts both parts of lse (9).
#pragma once

#include "key_products.cuh"

// One bias of a lane's keys and queries.
template <int index> struct KeyBias {
    using T = typename Bias<index>::T;
    static constexpr int kind = Bias<index>::kind;
    static constexpr bool ahead = kind == PIECES && RUNS;
    const T* data;
    BiasRuns<T> runs;
    float of_keys[LANE_KEYS];

    // A head, from `first_query` on; `key` is the lane's first.
    DEVICE void start_head(const AttentionInputs& in, const Position& at, i64 key, i64 first_query) {
        if constexpr (kind == ABSENT) return;
        data = bias_data<index>(in, at);
        if constexpr (kind == KEYS) {
#pragma unroll
            for (int i = 0; i < LANE_KEYS; i++) of_keys[i] = to_f32(data[least(key + i, in.seqlen_k - 1)]);
        } else if constexpr (ahead) {
            runs.start(data, in.biases[index].strides[3], least(key, in.seqlen_k - LANE_KEYS), first_query);
        }
    }
    DEVICE void fetch(int query, int left) {
        if constexpr (ahead) runs.fetch(query, left);
    }
    DEVICE void advance() {
        if constexpr (ahead) runs.advance();
    }
    // Of the lane's keys `key`, and of the part's query `query`, the lane's first of which is `first_query`.
    template <bool plain> DEVICE float add(float sum, const AttentionInputs& in, i64 first_key, i64 first_query, int key, int query) const {
        if constexpr (kind == ABSENT) return sum;
        if constexpr (ahead) return with_bias<plain>(sum, runs(key, query));
        if constexpr (kind == KEYS) return with_bias<plain>(sum, of_keys[key]);
        const Operand& bias = in.biases[index];
        // Opaque in one piece of code: rows of all queries at once would take registers.
        const i64 row = least((TWO_PIECES ? first_query : opaque(first_query)) + query, in.seqlen_q - 1);
        return with_bias<plain>(sum, to_f32(data[row * bias.strides[3] + least(first_key + key, in.seqlen_k - 1) * bias.strides[4]]));
    }
};

// Every bias of a lane's keys and queries.
struct KeyBiases {
    KeyBias<0> bias0;
    KeyBias<1> bias1;
    KeyBias<2> bias2;
    KeyBias<3> bias3;
    i64 key;  // the lane's first
    float slope;

    DEVICE void start_head(const AttentionInputs& in, const Position& at, i64 first_key, i64 first_query) {
        key = first_key;
        if (ALIBI) slope = ((const float*)in.alibi_slopes)[at.head];
        bias0.start_head(in, at, key, first_query);
        bias1.start_head(in, at, key, first_query);
        bias2.start_head(in, at, key, first_query);
        bias3.start_head(in, at, key, first_query);
    }
    // Reads what a part needs that begins with the lane's query `query`; `left` are left from the tile's first on.
    DEVICE void fetch(int query, int left) {
        bias0.fetch(query, left);
        bias1.fetch(query, left);
        bias2.fetch(query, left);
        bias3.fetch(query, left);
    }
    // To the next tile.
    DEVICE void advance() {
        bias0.advance();
        bias1.advance();
        bias2.advance();
        bias3.advance();
    }
    // s = scale s + biases - lse of a part, whose queries begin with `first`.
    template <bool plain>
    DEVICE void take(Scores& s, int part, const AttentionInputs& in, i64 first, const float (&lse)[PART_QUERIES], const float (&low)[PART_QUERIES]) const {
        // Opaque: rows of other parts would take registers.
        const i64 own_first = SCATTERED ? opaque(first + first_query_of_lane()) : 0;
#pragma unroll
        for (int group = 0; group < PART_GROUPS; group++) {
            for_pairs(group, [&](int i, int j) {
                const int own = part * PART_KEYS + i;
                const auto biases = [&](int query) {
                    float sum = plain ? NOTHING : 0.0f;
                    sum = bias0.template add<plain>(sum, in, key, own_first, own, query);
                    sum = bias1.template add<plain>(sum, in, key, own_first, own, query);
                    sum = bias2.template add<plain>(sum, in, key, own_first, own, query);
                    return bias3.template add<plain>(sum, in, key, own_first, own, query);
                };
                const auto alibi = [&](int query) {
                    return ALIBI ? alibi_base2(slope, distance(in, first + first_query_of_lane() + query, key + own)) : 0.0f;
                };
                const Pair sums = {biases(j), biases(j + 1)}, alibis = {alibi(j), alibi(j + 1)};
                const Pair products = {score(s, i, j), score(s, i, j + 1)};
                const Pair of_queries = {lse[j], lse[j + 1]}, lows = {low[j], low[j + 1]};
                const Pair logits = logits_of<plain>(products, in.scale_base2, sums, alibis, of_queries, lows);
                score(s, i, j) = logits.x;
                score(s, i, j + 1) = logits.y;
                if (!plain && !TWO_PIECES) one_by_one();
            });
        }
    }
};

// P = 0 and dS = 0 for pairs of a part that segments or positions exclude; its queries begin with `first_query`, the lane's keys
// with `key`, the block's with `first_key`.
DEVICE void exclude(Scores& s, Scores& dp, int part, const AttentionInputs& in, const Position& at, i64 key, i64 first_query, i64 first_key) {
    const Band bounds = POSITIONS ? band(in, first_query, first_key) : Band{0, 0};
    const bool cut = POSITIONS && cuts(bounds, PART_ROWS, TILE_K);
    if (!SEGMENTS && !cut) return;
    const int first_offset = (int)(key - first_key) + part * PART_KEYS;
#pragma unroll
    for (int j = 0; j < PART_QUERIES; j++) {
        const int query = first_query_of_lane() + j;
        const i32 of_query = SEGMENTS ? segment(in.q_segments, at, least(first_query + query, in.seqlen_q - 1)) : 0;
#pragma unroll
        for (int i = 0; i < PART_KEYS; i++) {
            const int offset = first_offset + i, distance = offset - query;
            bool keep = !cut || (distance >= bounds.low && distance <= bounds.high);
            if (SEGMENTS) keep = keep && segment(in.k_segments, at, least(first_key + offset, in.seqlen_k - 1)) == of_query;
            score(s, i, j) = keep ? score(s, i, j) : -INFINITE;
            score(dp, i, j) = keep ? score(dp, i, j) : 0.0f;
        }
    }
}

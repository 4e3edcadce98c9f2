// Logits of the passes with queries for rows: biases, ALiBi, lse, and what masks exclude.
//
// A lane owns neighbouring keys of each part of a tile. Biases whose rows move in pieces are read by runs of them, one part
// ahead, where RUNS says that no run crosses the end of the keys.
//
// Two ways, both in base 2: those of key_logits.cuh.
#pragma once

#include "query_products.cuh"

// A bias of a lane's queries and keys, one part of a tile at a time; or, where it stays in registers from term to term, of all
// its parts.
template <int index, bool may_stay> struct QueryBias {
    using T = typename Bias<index>::T;
    static constexpr int kind = Bias<index>::kind;
    static constexpr bool ahead = kind >= PIECES && RUNS;
    static constexpr bool by_query = kind == PIECES;
    static constexpr bool stays = may_stay && ahead && by_query && sizeof(T) == 2;
    static constexpr int queries = ahead && by_query ? LANE_QUERIES : 1;
    const T* data;
    const char* rows[queries];  // at the lane's first key
    Run<T, RUN_KEYS> runs[stays ? PARTS : 1][queries][LANE_RUNS];

    // From the lane's first key on. Queries that do not exist read the last one that does.
    DEVICE void start(const AttentionInputs& in, const Position& at, i64 query, i64 key) {
        if constexpr (kind == ABSENT) return;
        data = bias_data<index>(in, at);
        if constexpr (ahead) {
#pragma unroll
            for (int i = 0; i < queries; i++) {
                const i64 row = by_query ? least(query + Lane::further_query(i), in.seqlen_q - 1) * in.biases[index].strides[3] : 0;
                rows[i] = (const char*)opaque((i64)(data + row + key));
            }
        }
    }
    // To other rows of the batch, and to other keys.
    DEVICE void shift(i64 of_rows, i64 keys) {
        if constexpr (kind == ABSENT || stays) return;
        data += of_rows;
        if constexpr (ahead) {
#pragma unroll
            for (int i = 0; i < queries; i++) rows[i] = (const char*)opaque((i64)(rows[i] + (of_rows + keys) * (i64)sizeof(T)));
        }
    }
    // To the next row of the batch, or to none.
    DEVICE void next_row(const AttentionInputs& in, bool more) {
        if constexpr (kind != ABSENT) shift(!more ? 0 : sizeof(ELEMENT) == 4 ? opaque(in.biases[index].strides[1]) : in.biases[index].strides[1], 0);
    }
    DEVICE void load(int part, int keys, int last) {
#pragma unroll
        for (int i = 0; i < queries; i++) {
#pragma unroll
            for (int run = 0; run < LANE_RUNS; run++)
                load_words(runs[stays ? part : 0][i][run].words, rows[i] + least_int(keys + run * RUN_KEYS, last) * (int)sizeof(T));
        }
    }
    // Reads what stays of a part whose keys begin `keys` after the lane's first; runs beyond `last` read the one there.
    DEVICE void fetch_once(int part, int keys, int last) {
        if constexpr (stays) load(part, keys, last);
    }
    // Hides from the compiler what stays: nothing is computed from it ahead of time.
    DEVICE void hide() {
        if constexpr (stays) {
#pragma unroll
            for (int part = 0; part < PARTS; part++)
#pragma unroll
                for (int i = 0; i < queries; i++)
#pragma unroll
                    for (int run = 0; run < LANE_RUNS; run++)
#pragma unroll
                        for (u32& word : runs[part][i][run].words) word = (u32)opaque((int)word);
        }
    }
    // Reads what does not.
    DEVICE void fetch(int keys, int last) {
        if constexpr (ahead && !stays) load(0, keys, last);
    }
    // Of the lane's query `i` and key `j` of a part, which begins at `key`.
    template <bool plain> DEVICE float add(float sum, const AttentionInputs& in, i64 query, i64 key, int part, int i, int j) const {
        if constexpr (kind == ABSENT) return sum;
        if constexpr (ahead) return with_bias<plain>(sum, runs[stays ? part : 0][by_query ? i : 0][j / RUN_KEYS][j % RUN_KEYS]);
        const Operand& bias = in.biases[index];
        const i64 row = least(query, in.seqlen_q - 1), column = least(key + j, in.seqlen_k - 1);
        return with_bias<plain>(sum, to_f32(data[row * bias.strides[3] + column * bias.strides[4]]));
    }
};

// Every bias of a lane's tile.
template <bool may_stay> struct QueryBiases {
    QueryBias<0, may_stay> bias0;
    QueryBias<1, may_stay> bias1;
    QueryBias<2, may_stay> bias2;
    QueryBias<3, may_stay> bias3;
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
    DEVICE void fetch_once(int part, int keys, int last) {
        bias0.fetch_once(part, keys, last);
        bias1.fetch_once(part, keys, last);
        bias2.fetch_once(part, keys, last);
        bias3.fetch_once(part, keys, last);
    }
    DEVICE void hide() {
        bias0.hide();
        bias1.hide();
        bias2.hide();
        bias3.hide();
    }
    DEVICE void fetch(int keys, int last) {
        bias0.fetch(keys, last);
        bias1.fetch(keys, last);
        bias2.fetch(keys, last);
        bias3.fetch(keys, last);
    }
    // s = scale s + biases - lse, of the lane's keys of a part, from `key` on.
    template <bool plain>
    DEVICE void take(Scores& s, const AttentionInputs& in, i64 key, int part, const float (&lse)[LANE_QUERIES], const float (&low)[LANE_QUERIES]) const {
        for_pairs([&](int i, int j) {
            const i64 row = query + Lane::further_query(i);
            const auto biases = [&](int j) {
                float sum = plain ? NOTHING : 0.0f;
                sum = bias0.template add<plain>(sum, in, row, key, part, i, j);
                sum = bias1.template add<plain>(sum, in, row, key, part, i, j);
                sum = bias2.template add<plain>(sum, in, row, key, part, i, j);
                return bias3.template add<plain>(sum, in, row, key, part, i, j);
            };
            const auto alibi = [&](int j) { return ALIBI ? alibi_base2(slope, distance(in, row, key + j)) : 0.0f; };
            const Pair sums = {biases(j), biases(j + 1)}, alibis = {alibi(j), alibi(j + 1)};
            const Pair products = {score(s, i, j), score(s, i, j + 1)};
            const Pair of_query = {lse[i], lse[i]}, lows = {low[i], low[i]};
            const Pair logits = logits_of<plain>(products, in.scale_base2, sums, alibis, of_query, lows);
            score(s, i, j) = logits.x;
            score(s, i, j + 1) = logits.y;
        });
    }
};

// Whether some number of a logit follows from its key: those are opaque, so that addresses of elements are computed where they
// are used, not ahead of all tiles.
template <int index> constexpr bool BIAS_BY_ELEMENT = Bias<index>::kind != ABSENT && !QueryBias<index, false>::ahead;
constexpr bool BIASES_BY_ELEMENT = BIAS_BY_ELEMENT<0> || BIAS_BY_ELEMENT<1> || BIAS_BY_ELEMENT<2> || BIAS_BY_ELEMENT<3>;
constexpr bool BY_ELEMENT = ALIBI || BIASES_BY_ELEMENT;

// How many of the keys from `first_key` on lie within the length.
DEVICE i64 keys_left(const AttentionInputs& in, const Position& at, i64 first_key) { return greatest(kv_length(in, at) - first_key, 0); }
constexpr u32 ALL_OF_LANE = (u32)((1ull << LANE_KEYS) - 1);
// Bit j: mask and length keep the lane's key j of a part, which begins at key `first`; the lane's keys begin `own` further on.
// All lanes together: each looks at one key.
DEVICE u32 kept_keys(const AttentionInputs& in, const Position& at, i64 first, int own) {
    static_assert(PART_KEYS <= WARP_THREADS, "a key for each lane");
    const int key = thread_index_again() % PART_KEYS;
    bool keeps = key < (int)least(keys_left(in, at, first), PART_KEYS);
    if (KEY_MASK && keeps) keeps = key_mask_keeps(in, at, first + key);
    return (u32)(warp_ballot(keeps) >> own) & ALL_OF_LANE;
}

// P = 0 and dS = 0 for pairs that segments, positions or `kept` exclude; the lane's keys of the part begin at `key` of the tile.
DEVICE void exclude(Scores& s, Scores& dp, const AttentionInputs& in, const Position& at, const Lane& lane, i64 first_query, i64 first_key, int key, u32 kept) {
    const Band bounds = POSITIONS ? band(in, first_query, first_key) : Band{0, 0};
    const bool cut = POSITIONS && cuts(bounds, TILE_Q, TILE_K);
    if (!SEGMENTS && !cut && warp_all(kept == ALL_OF_LANE)) return;
#pragma unroll
    for (int j = 0; j < LANE_KEYS; j++) {
        const int offset = key + j;
        const i32 of_key = SEGMENTS ? segment(in.k_segments, at, least(first_key + offset, in.seqlen_k - 1)) : 0;
#pragma unroll
        for (int i = 0; i < LANE_QUERIES; i++) {
            const int query = lane.query + Lane::further_query(i), distance = offset - query;
            bool keep = (kept >> j & 1) != 0 && (!cut || (distance >= bounds.low && distance <= bounds.high));
            if (SEGMENTS) keep = keep && segment(in.q_segments, at, least(first_query + query, in.seqlen_q - 1)) == of_key;
            score(s, i, j) = keep ? score(s, i, j) : -INFINITE;
            score(dp, i, j) = keep ? score(dp, i, j) : 0.0f;
        }
    }
}

// Logits of a part from products, less lse, whatever its keys are: the tile's first is `first_key`, the lane's first of the part
// is `key` of the tile. `all`: mask and length keep every key.
template <class Biases>
DEVICE void general_logits(Scores& s, Scores& dp, const QueryRows& rows, const Biases& biases, const AttentionInputs& in, const Position& at,
                           const Lane& lane, i64 first_query, i64 first_key, int key, int part, bool plain, bool all) {
    const i64 first = BY_ELEMENT ? opaque(first_key + key) : 0;
    if (plain) {
        biases.template take<true>(s, in, first, part, rows.lse, rows.lse);
    } else {
        float low[LANE_QUERIES];
        rows.load_low(low, lane);
        biases.template take<false>(s, in, first, part, rows.lse, low);
    }
    if (SEGMENTS || POSITIONS || !all) {
        const u32 kept = all ? ALL_OF_LANE : kept_keys(in, at, first_key + part * PART_KEYS, key - part * PART_KEYS);
        exclude(s, dp, in, at, lane, first_query, first_key, key, kept);
    }
}

// dS = 2^S dP.
DEVICE void weigh(Scores& dp, Scores& s) {
    for_scores([&](int i, int j) { score(dp, i, j) *= exp2(score(s, i, j)); });
}

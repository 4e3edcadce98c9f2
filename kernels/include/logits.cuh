// Logits of the backward passes from products of q and k, lse subtracted, and what masks exclude.
//
// In the pass by keys the rows of an accumulator are keys, of which a lane owns a run of 2 m; in the pass by queries the
// columns are, and a run has 2 n. Biases whose rows move in pieces are read by such runs, where RUNS says that no run
// crosses the end of the keys.
//
// Two ways, both in base 2. The plain one, (scale (q k) - lse) + log2(e) (sum of biases), holds while lse is small; biases are
// added to each other first, so that large ones that cancel leave what forward had. The other does what forward's general
// path does, with biases rounded and saturated one by one, and subtracts both parts of lse (9).
#pragma once

#include "attention.cuh"
#include "stage.cuh"

// Neighbouring words of shared memory, a multiple of four.
template <int count> DEVICE void load_shared_run(float (&to)[count], u32 address) {
    static_assert(count % 4 == 0, "pieces");
#pragma unroll
    for (int i = 0; i < count; i += 4) {
        const Piece piece = load_shared_piece(address + 4 * i);
#pragma unroll
        for (int x = 0; x < 4; x++) to[i + x] = float_of(piece.words[x]);
    }
}

// Half-open.
struct Range {
    i64 begin;
    i64 end;
};

DEVICE i64 least(i64 a, i64 b) { return a < b ? a : b; }
DEVICE int least_int(int a, int b) { return a < b ? a : b; }
DEVICE i64 greatest(i64 a, i64 b) { return a > b ? a : b; }
DEVICE i64 divided_up(i64 a, i64 b) { return (a + b - 1) / b; }

// a - b, or the nearest number there is.
DEVICE i64 saturating_subtract(i64 a, i64 b) {
    const i64 difference = (i64)((u64)a - (u64)b);
    if (b >= 0) return difference <= a ? difference : (i64)0x8000000000000000ll;
    return difference > a ? difference : 0x7fffffffffffffffll;
}

// Offset of an element of an operand with the axes batch, row, position, head, channel, and of one without the last two.
DEVICE i64 offset_of(const Operand& x, const Position& at, i64 position, i64 head) {
    return at.batch * x.strides[0] + at.row * x.strides[1] + position * x.strides[2] + head * x.strides[3];
}

// Queries that see some of the keys [begin, end), by position.
DEVICE Range visible_queries(const AttentionInputs& in, i64 begin, i64 end) {
    const i64 first = saturating_subtract(in.first_distance + begin, in.highest_distance);
    const i64 last = saturating_subtract(in.first_distance + end - 1, in.lowest_distance);
    return {greatest(first, 0), last < in.seqlen_q ? greatest(last + 1, 0) : in.seqlen_q};
}
// Keys that some of the queries [begin, end) see, by position.
DEVICE Range visible_keys(const AttentionInputs& in, i64 begin, i64 end) {
    const i64 first = saturating_subtract(in.lowest_distance, in.first_distance - begin);
    const i64 last = saturating_subtract(in.highest_distance, in.first_distance - (end - 1));
    return {greatest(first, 0), last < in.seqlen_k ? greatest(last + 1, 0) : in.seqlen_k};
}

// Offset of the statistics of one (batch, row, head).
DEVICE i64 statistics_row(const BackwardParams& params, const Position& at) {
    return ((at.batch * params.inputs.rows + at.row) * params.inputs.heads + at.head) * params.padded_queries;
}
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

// Whether the plain way may be taken next to this lse, whose low part it leaves out: at most 2^-24 of it, an error that all of
// a row has. Half types round their results to 2^-11, and it may be 2^-14; tf32 rounds factors alone to that, at random,
// which in sums is less: 2^-18. Exact f32 never takes it.
constexpr bool MAY_BE_PLAIN = !SPLIT<ELEMENT>;
constexpr float PLAIN_LIMIT = sizeof(ELEMENT) == 4 ? 64.0f : 1024.0f;
constexpr bool HAS_BIAS = BIAS_0 != ABSENT;
DEVICE bool allows_plain(float lse) { return MAY_BE_PLAIN && (magnitude(lse) <= PLAIN_LIMIT || lse == INFINITE); }

// The sum so far and one more bias: in base 2, but on the plain way.
template <bool plain> DEVICE float with_bias(float sum, float bias) { return sum + (plain ? bias : bias_base2(bias)); }

// -0: what is added to it stays what it is, which the compiler knows.
constexpr float NOTHING = -0.0f;

// The logit of a product, with the biases added up by `with_bias`, and in base 2 what ALiBi adds.
template <bool plain> DEVICE float logit_of(float product, float scale_base2, float biases, float alibi, float lse, float low) {
    if constexpr (plain) {
        const float rest = fused_multiply_add(product, scale_base2, -lse);
        if constexpr (ALIBI) return rest + (HAS_BIAS ? fused_multiply_add(biases, LOG2_E, alibi) : alibi);
        return HAS_BIAS ? fused_multiply_add(biases, LOG2_E, rest) : rest;
    } else {
        if constexpr (ALIBI) biases += alibi;
        return add(add(fused_multiply_add(product, scale_base2, biases), -lse), -low);
    }
}

// Whether dO v starts from -delta, which saves additions. What the matrix unit cuts off is then of delta's size: not where
// products are exact to f32.
constexpr bool STARTS_FROM_DELTA = !SPLIT<ELEMENT>;
template <int m, int n, class Term> DEVICE void add_to_all(Accumulator (&acc)[m][n], Term term) {
#pragma unroll
    for (int i = 0; i < m; i++)
#pragma unroll
        for (int j = 0; j < n; j++)
#pragma unroll
            for (int x = 0; x < 4; x++) acc[i][j][x] += term(i, j, x);
}

// Neighbouring numbers that are read at once; an even number of halves.
template <class T, int count> struct alignas(count * sizeof(T) < 16 ? count * sizeof(T) : 16) Run {
    u32 words[count * (int)sizeof(T) / 4];
    DEVICE float operator[](int i) const {
        if constexpr (sizeof(T) == 4) {
            return float_of(words[i]);
        } else {
            return i % 2 == 0 ? unpack_low<T>(words[i / 2]) : unpack_high<T>(words[i / 2]);
        }
    }
};

// A lane's columns of n accumulators stand for 2 n neighbours, of which this is the first: column 2 i + e of accumulator j
// is number 2 j + e of lane i's.
template <int n> DEVICE int first_of_lane() { return lane_index() % 4 * 2 * n; }

// A bias of a lane's keys (rows of the accumulators) and queries (columns), one tile of queries at a time.
template <int index, int m, int n> struct KeyBias {
    using T = typename Bias<index>::T;
    static constexpr int kind = Bias<index>::kind;
    static constexpr bool ahead = kind == PIECES && RUNS;
    const char* data;
    int stride;  // from query to query, in bytes
    int first;   // the lane's first query
    Run<T, 2 * m> runs[ahead ? n : 1][2];
    float of_keys[m][2];

    // A head, from `first_query` on.
    DEVICE void start_head(const AttentionInputs& in, const Position& at, i64 key, i64 first_query) {
        if constexpr (kind == ABSENT) return;
        const T* const start = bias_data<index>(in, at);
        data = (const char*)start;
        if constexpr (kind == KEYS) {
#pragma unroll
            for (int i = 0; i < m; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) of_keys[i][half] = to_f32(start[least(key + 2 * i + half, in.seqlen_k - 1)]);
            }
        } else if constexpr (ahead) {
            first = opaque(first_of_lane<n>());
            stride = opaque((int)(in.biases[index].strides[3] * (i64)sizeof(T)));
            data = (const char*)opaque((i64)(start + least(key, in.seqlen_k - 2 * m) + first_query * in.biases[index].strides[3]));
        }
    }
    // Reads what the tile of queries needs, of which those to `last` exist; a lane reads others' instead of those that do not.
    DEVICE void fetch(int last) {
        if constexpr (ahead) {
            if constexpr (QUERY_EIGHTS) {
                // A lane's queries exist all or none.
                const char* const from = data + (i64)least_int(first, last + 1 - 2 * n) * stride;
#pragma unroll
                for (int x = 0; x < 2 * n; x++) load_words(runs[x / 2][x % 2].words, from + (i64)x * stride);
            } else {
#pragma unroll
                for (int x = 0; x < 2 * n; x++) load_words(runs[x / 2][x % 2].words, data + (i64)least_int(first + x, last) * stride);
            }
        }
    }
    // To the next tile.
    DEVICE void advance() {
        if constexpr (ahead) data = (const char*)opaque((i64)(data + (i64)(8 * n) * stride));
    }
    template <bool plain> DEVICE float add(float sum, const AttentionInputs& in, i64 key, i64 first, int i, int half, int j, int e) const {
        if constexpr (kind == ABSENT) return sum;
        if constexpr (ahead) return with_bias<plain>(sum, runs[j][e][2 * i + half]);
        if constexpr (kind == KEYS) return with_bias<plain>(sum, of_keys[i][half]);
        const Operand& bias = in.biases[index];
        const i64 query = least(first + first_of_lane<n>() + 2 * j + e, in.seqlen_q - 1);
        return with_bias<plain>(sum, to_f32(((const T*)data)[query * bias.strides[3] + least(key + 2 * i + half, in.seqlen_k - 1) * bias.strides[4]]));
    }
};

// Every bias of a lane's tile with keys for rows.
template <int m, int n> struct KeyBiases {
    KeyBias<0, m, n> bias0;
    KeyBias<1, m, n> bias1;
    KeyBias<2, m, n> bias2;
    KeyBias<3, m, n> bias3;
    i64 key;
    float slope;

    DEVICE void start_head(const AttentionInputs& in, const Position& at, i64 first_key, i64 first) {
        key = first_key;
        if (ALIBI) slope = ((const float*)in.alibi_slopes)[at.head];
        bias0.start_head(in, at, key, first);
        bias1.start_head(in, at, key, first);
        bias2.start_head(in, at, key, first);
        bias3.start_head(in, at, key, first);
    }
    DEVICE void fetch(int last) {
        bias0.fetch(last);
        bias1.fetch(last);
        bias2.fetch(last);
        bias3.fetch(last);
    }
    DEVICE void advance() {
        bias0.advance();
        bias1.advance();
        bias2.advance();
        bias3.advance();
    }
    // s = scale s + biases - lse
    template <bool plain>
    DEVICE void take(Accumulator (&s)[m][n], const AttentionInputs& in, i64 first, const float (&lse)[2 * n], const float (&low)[2 * n]) const {
#pragma unroll
        for (int i = 0; i < m; i++) {
#pragma unroll
            for (int j = 0; j < n; j++) {
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const int half = x / 2, e = x % 2;
                    float sum = plain ? NOTHING : 0.0f;
                    sum = bias0.template add<plain>(sum, in, key, first, i, half, j, e);
                    sum = bias1.template add<plain>(sum, in, key, first, i, half, j, e);
                    sum = bias2.template add<plain>(sum, in, key, first, i, half, j, e);
                    sum = bias3.template add<plain>(sum, in, key, first, i, half, j, e);
                    const i64 query = first + first_of_lane<n>() + 2 * j + e;
                    const float alibi = ALIBI ? alibi_base2(slope, distance(in, query, key + 2 * i + half)) : 0.0f;
                    s[i][j][x] = logit_of<plain>(s[i][j][x], in.scale_base2, sum, alibi, lse[2 * j + e], low[2 * j + e]);
                }
            }
        }
    }
};

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

// Bounds of key position minus query position in a tile, as offsets inside the tile.
struct Band {
    int low;
    int high;
};
DEVICE int as_offset(i64 x) { return (int)least(greatest(x, -(1 << 20)), 1 << 20); }
DEVICE Band band(const AttentionInputs& in, i64 first_query, i64 first_key) {
    const i64 distance = in.first_distance + first_key - first_query;
    return {as_offset(saturating_subtract(in.lowest_distance, distance)),
            as_offset(saturating_subtract(in.highest_distance, distance))};
}
// Whether some pair of a tile lies outside.
DEVICE bool cuts(const Band& band, int queries, int keys) { return band.low > 1 - queries || band.high < keys - 1; }

// P = 0 and dS = 0 for pairs that segments or positions exclude; keys are rows, the lane's from `key` on.
template <int m, int n>
DEVICE void exclude_by_key(Accumulator (&s)[m][n], Accumulator (&dp)[m][n], const AttentionInputs& in, const Position& at,
                           i64 key, i64 first_query, i64 first_key, int tile_k) {
    const Band bounds = POSITIONS ? band(in, first_query, first_key) : Band{0, 0};
    const bool cut = POSITIONS && cuts(bounds, 8 * n, tile_k);
    if (!SEGMENTS && !cut) return;
    const int first_offset = (int)(key - first_key);
#pragma unroll
    for (int j = 0; j < n; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int query = first_of_lane<n>() + 2 * j + e;
            const i32 of_query = SEGMENTS ? segment(in.q_segments, at, least(first_query + query, in.seqlen_q - 1)) : 0;
#pragma unroll
            for (int i = 0; i < m; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int offset = first_offset + 2 * i + half, distance = offset - query;
                    bool keep = !cut || (distance >= bounds.low && distance <= bounds.high);
                    if (SEGMENTS) keep = keep && segment(in.k_segments, at, least(first_key + offset, in.seqlen_k - 1)) == of_query;
                    s[i][j][2 * half + e] = keep ? s[i][j][2 * half + e] : -INFINITE;
                    dp[i][j][2 * half + e] = keep ? dp[i][j][2 * half + e] : 0.0f;
                }
            }
        }
    }
}

// The same with queries for rows, the lane's from `row` of the tile on; bit 2 j + e of `kept` says whether mask and length keep
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

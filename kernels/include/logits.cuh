// What the backward passes add to products of q and k, and what they exclude: biases, ALiBi, lse; key mask, lengths,
// segments, positions.
//
// BIAS_LIST(X) names every bias of the problem: X(index, type, along_queries, along_keys, in_runs), where `in_runs` says
// that eight neighbouring keys may be read at once. Where the product of 16 keys and 8 queries has keys for rows, a lane
// owns a run of 2 m keys; where it has queries for rows, a run of 2 n keys: see `KeyOrder` of either pass.
#pragma once

#include "params.h"
#include "stage.cuh"

// Half-open.
struct Range {
    i64 begin;
    i64 end;
};

DEVICE i64 least(i64 a, i64 b) { return a < b ? a : b; }
DEVICE i64 greatest(i64 a, i64 b) { return a > b ? a : b; }
DEVICE i64 divided_up(i64 a, i64 b) { return (a + b - 1) / b; }

// a - b, or the nearest number there is.
DEVICE i64 saturating_subtract(i64 a, i64 b) {
    const i64 difference = (i64)((u64)a - (u64)b);
    if (b >= 0) return difference <= a ? difference : (i64)0x8000000000000000ll;
    return difference > a ? difference : 0x7fffffffffffffffll;
}

// Offset of an element, for operands of five and of three axes.
DEVICE i64 at(const Operand& x, i64 batch, i64 row, i64 position, i64 head) {
    return batch * x.strides[0] + row * x.strides[1] + position * x.strides[2] + head * x.strides[3];
}
DEVICE i64 at(const Operand& x, i64 batch, i64 row, i64 position) {
    return batch * x.strides[0] + row * x.strides[1] + position * x.strides[2];
}

// Keys that count for a row.
DEVICE i64 kv_length(const AttentionInputs& in, i64 batch, i64 row) {
    return ((const i64*)in.kv_lengths.data)[batch * in.kv_lengths.strides[0] + row * in.kv_lengths.strides[1]];
}
DEVICE bool keeps_key(const AttentionInputs& in, i64 batch, i64 row, i64 key) {
    return ((const u8*)in.key_mask.data)[at(in.key_mask, batch, row, key)] != 0;
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
DEVICE i64 statistics_row(const BackwardParams& params, i64 batch, i64 row, i64 head) {
    return ((batch * params.inputs.rows + row) * params.inputs.heads + head) * params.padded_queries;
}
// Starts the copy of lse, its low part and -delta of `queries` queries from `first` on; those beyond the padded end are 0.
template <int queries, int threads>
DEVICE void fetch_statistics(u32 to, const BackwardParams& params, i64 row, i64 first) {
    const i64 plane = params.inputs.batch * params.inputs.rows * params.inputs.heads * params.padded_queries;
#pragma unroll
    for (int turn = 0; turn < (3 * queries / 4 + threads - 1) / threads; turn++) {
        const int index = thread_index() + turn * threads;
        if (index >= 3 * queries / 4) break;
        const int kind = index / (queries / 4), piece = index % (queries / 4);
        const bool inside = first + 4 * piece < params.padded_queries;
        const float* from = (const float*)params.statistics + kind * plane + row + (inside ? first + 4 * piece : 0);
        copy_async(to + (kind * queries + 4 * piece) * 4, from, inside ? 16 : 0);
    }
}

// Neighbouring numbers that are read at once.
template <class T, int count> struct alignas(count * sizeof(T) < 16 ? count * sizeof(T) : 16) Run {
    T elements[count];
};

// A bias of a lane's keys (rows of the accumulators) and queries (columns), one tile of queries at a time.
template <class T, bool along_queries, bool along_keys, bool in_runs, int m, int n> struct KeyBias {
    static constexpr bool ahead = along_queries && along_keys && in_runs;
    const T* data;
    i64 keys[m][2];
    Run<T, 2 * m> runs[ahead ? n : 1][2];
    float of_keys[m][2];

    DEVICE void start(const Operand& bias, i64 batch, i64 row, i64 key, i64 seqlen_k) {
        data = (const T*)bias.data + batch * bias.strides[0] + row * bias.strides[1];
        if constexpr (ahead) {
            data += least(key, seqlen_k - 2 * m) * bias.strides[4];
        } else {
#pragma unroll
            for (int i = 0; i < m; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    keys[i][half] = along_keys ? least(key + 2 * i + half, seqlen_k - 1) * bias.strides[4] : 0;
                }
            }
        }
    }
    DEVICE void start_head(const Operand& bias, i64 head) {
        if (along_queries || !along_keys) return;
        const T* from = data + head * bias.strides[2];
#pragma unroll
        for (int i = 0; i < m; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) of_keys[i][half] = to_f32(from[keys[i][half]]);
        }
    }
    // Reads what the tile of queries from `first` on needs.
    DEVICE void fetch(const Operand& bias, i64 head, i64 first, i64 seqlen_q) {
        if (!ahead) return;
        const T* from = data + head * bias.strides[2];
#pragma unroll
        for (int j = 0; j < n; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const i64 query = least(first + 8 * j + 2 * (lane_index() % 4) + e, seqlen_q - 1);
                runs[j][e] = *(const Run<T, 2 * m>*)(from + query * bias.strides[3]);
            }
        }
    }
    // The bias of one key and query.
    DEVICE float of(const Operand& bias, i64 head, i64 first, i64 seqlen_q, int i, int half, int j, int e) const {
        if (ahead) return to_f32(runs[j][e].elements[2 * i + half]);
        if (!along_queries && along_keys) return of_keys[i][half];
        const i64 query = along_queries ? least(first + 8 * j + 2 * (lane_index() % 4) + e, seqlen_q - 1) : 0;
        return to_f32(data[head * bias.strides[2] + query * bias.strides[3] + keys[i][half]]);
    }
};

// Finite biases beyond this count as this: what is farther cannot be told from it, and lse still holds ln of a row sum.
constexpr float LARGEST_BIAS = 5954088944.0f;
DEVICE float clamped(float bias) {
    const float y = minimum(maximum(bias, -LARGEST_BIAS), LARGEST_BIAS);
    // Infinities and NaN stay what they are.
    return fabsf(bias) < INFINITE ? y : bias;
}

// Numbers of f16 are below it.
template <class T> DEVICE float clamped_if(float bias) { return clamped(bias); }
template <> DEVICE float clamped_if<f16>(float bias) { return bias; }

DEVICE float alibi(const AttentionInputs& in, float slope, i64 query, i64 key) {
    const i64 distance = in.first_distance + key - query;
    return slope * (float)(distance < 0 ? -distance : distance);
}

#ifdef BIAS_LIST
// Every bias of a lane's tile with keys for rows.
template <int m, int n> struct KeyBiases {
#define MEMBER(index, T, along_queries, along_keys, in_runs) KeyBias<T, along_queries, along_keys, in_runs, m, n> bias##index;
    BIAS_LIST(MEMBER)
#undef MEMBER
    i64 head;
    i64 key;
    float slope;

    DEVICE void start(const AttentionInputs& in, i64 batch, i64 row, i64 first_key) {
        key = first_key;
#define START(index, T, along_queries, along_keys, in_runs) bias##index.start(in.biases[index], batch, row, first_key, in.seqlen_k);
        BIAS_LIST(START)
#undef START
    }
    DEVICE void start_head(const AttentionInputs& in, i64 to) {
        head = to;
        if (ALIBI) slope = ((const float*)in.alibi_slopes)[head];
#define START(index, T, along_queries, along_keys, in_runs) bias##index.start_head(in.biases[index], head);
        BIAS_LIST(START)
#undef START
    }
    DEVICE void fetch(const AttentionInputs& in, i64 first) {
#define FETCH(index, T, along_queries, along_keys, in_runs) bias##index.fetch(in.biases[index], head, first, in.seqlen_q);
        BIAS_LIST(FETCH)
#undef FETCH
    }
    // s = biases - lse
    DEVICE void take(Accumulator (&s)[m][n], const AttentionInputs& in, i64 first, const float (&lse)[n][2]) const {
#pragma unroll
        for (int i = 0; i < m; i++) {
#pragma unroll
            for (int j = 0; j < n; j++) {
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const int half = x / 2, e = x % 2;
                    float sum = -0.0f;
#define ADD(index, T, along_queries, along_keys, in_runs) sum += clamped_if<T>(bias##index.of(in.biases[index], head, first, in.seqlen_q, i, half, j, e));
                    BIAS_LIST(ADD)
#undef ADD
                    if (ALIBI) sum -= alibi(in, slope, first + 8 * j + 2 * (lane_index() % 4) + e, key + 2 * i + half);
                    s[i][j][x] = sum - lse[j][e];
                }
            }
        }
    }
};

// A bias of a lane's queries (rows of the accumulators) and keys (columns), one tile of keys at a time.
template <class T, bool along_queries, bool along_keys, bool in_runs, int m, int n> struct QueryBias {
    static constexpr bool ahead = along_keys && in_runs;
    const T* data;
    i64 queries[m][2];
    Run<T, 2 * n> runs[ahead && along_queries ? m : 1][ahead && along_queries ? 2 : 1];
    float of_queries[m][2];

    DEVICE void start(const Operand& bias, i64 batch, i64 row, i64 head, i64 query, i64 seqlen_q) {
        data = (const T*)bias.data + at(bias, batch, row, head);
#pragma unroll
        for (int i = 0; i < m; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                queries[i][half] = along_queries ? least(query + 16 * i + 8 * half, seqlen_q - 1) * bias.strides[3] : 0;
                if (!along_keys) of_queries[i][half] = to_f32(data[queries[i][half]]);
            }
        }
    }
    // Reads what the lane's run of keys from `key` on needs.
    DEVICE void fetch(const Operand& bias, i64 key, i64 seqlen_k) {
        if (!ahead) return;
        const i64 first = least(key, seqlen_k - 2 * n);
#pragma unroll
        for (int i = 0; i < (along_queries ? m : 1); i++) {
#pragma unroll
            for (int half = 0; half < (along_queries ? 2 : 1); half++) runs[i][half] = *(const Run<T, 2 * n>*)(data + queries[i][half] + first);
        }
    }
    DEVICE float of(const Operand& bias, i64 key, i64 seqlen_k, int i, int half, int j, int e) const {
        if (ahead) return to_f32(runs[along_queries ? i : 0][along_queries ? half : 0].elements[2 * j + e]);
        if (!along_keys) return of_queries[i][half];
        return to_f32(data[queries[i][half] + least(key + 2 * j + e, seqlen_k - 1) * bias.strides[4]]);
    }
};

// Every bias of a lane's tile with queries for rows.
template <int m, int n> struct QueryBiases {
#define MEMBER(index, T, along_queries, along_keys, in_runs) QueryBias<T, along_queries, along_keys, in_runs, m, n> bias##index;
    BIAS_LIST(MEMBER)
#undef MEMBER
    i64 query;
    float slope;

    DEVICE void start(const AttentionInputs& in, i64 batch, i64 row, i64 head, i64 first_query) {
        query = first_query;
        if (ALIBI) slope = ((const float*)in.alibi_slopes)[head];
#define START(index, T, along_queries, along_keys, in_runs) bias##index.start(in.biases[index], batch, row, head, first_query, in.seqlen_q);
        BIAS_LIST(START)
#undef START
    }
    DEVICE void fetch(const AttentionInputs& in, i64 key) {
#define FETCH(index, T, along_queries, along_keys, in_runs) bias##index.fetch(in.biases[index], key, in.seqlen_k);
        BIAS_LIST(FETCH)
#undef FETCH
    }
    // s = biases - lse
    DEVICE void take(Accumulator (&s)[m][n], const AttentionInputs& in, i64 key, const float (&lse)[m][2]) const {
#pragma unroll
        for (int i = 0; i < m; i++) {
#pragma unroll
            for (int j = 0; j < n; j++) {
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const int half = x / 2, e = x % 2;
                    float sum = -0.0f;
#define ADD(index, T, along_queries, along_keys, in_runs) sum += clamped_if<T>(bias##index.of(in.biases[index], key, in.seqlen_k, i, half, j, e));
                    BIAS_LIST(ADD)
#undef ADD
                    if (ALIBI) sum -= alibi(in, slope, query + 16 * i + 8 * half, key + 2 * j + e);
                    s[i][j][x] = sum - lse[i][half];
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

DEVICE i32 segment(const Operand& segments, i64 batch, i64 row, i64 position) {
    return ((const i32*)segments.data)[at(segments, batch, row, position)];
}

// P = 0 and dS = 0 for pairs that segments or positions exclude; keys are rows, the lane's from `key` on.
template <int m, int n>
DEVICE void exclude_by_key(Accumulator (&s)[m][n], Accumulator (&dp)[m][n], const AttentionInputs& in, i64 batch, i64 row,
                           i64 key, i64 first_query, i64 first_key, int tile_k) {
    const Band bounds = POSITIONS ? band(in, first_query, first_key) : Band{0, 0};
    const bool cut = POSITIONS && cuts(bounds, 8 * n, tile_k);
    if (!SEGMENTS && !cut) return;
    const int first_offset = (int)(key - first_key);
#pragma unroll
    for (int j = 0; j < n; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int query = 8 * j + 2 * (lane_index() % 4) + e;
            const i32 of_query = SEGMENTS ? segment(in.q_segments, batch, row, least(first_query + query, in.seqlen_q - 1)) : 0;
#pragma unroll
            for (int i = 0; i < m; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int offset = first_offset + 2 * i + half, distance = offset - query;
                    bool keep = !cut || (distance >= bounds.low && distance <= bounds.high);
                    if (SEGMENTS) keep = keep && segment(in.k_segments, batch, row, least(first_key + offset, in.seqlen_k - 1)) == of_query;
                    s[i][j][2 * half + e] = keep ? s[i][j][2 * half + e] : -INFINITE;
                    dp[i][j][2 * half + e] = keep ? dp[i][j][2 * half + e] : 0.0f;
                }
            }
        }
    }
}

// The same with queries for rows, the lane's from `query` on; bit 2 j + e of `kept` says whether mask and length keep
// the key of that column, the lane's from `key` on.
template <int m, int n>
DEVICE void exclude_by_query(Accumulator (&s)[m][n], Accumulator (&dp)[m][n], const AttentionInputs& in, i64 batch, i64 row,
                             i64 query, i64 key, i64 first_query, i64 first_key, int tile_q, int tile_k, u32 kept) {
    const Band bounds = POSITIONS ? band(in, first_query, first_key) : Band{0, 0};
    const bool cut = POSITIONS && cuts(bounds, tile_q, tile_k);
    const u32 all = (u32)((1ull << 2 * n) - 1);
    if (!SEGMENTS && !cut && warp_all(kept == all)) return;
    const int first_offset = (int)(key - first_key), first_row = (int)(query - first_query);
#pragma unroll
    for (int j = 0; j < n; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int offset = first_offset + 2 * j + e;
            const i32 of_key = SEGMENTS ? segment(in.k_segments, batch, row, least(first_key + offset, in.seqlen_k - 1)) : 0;
#pragma unroll
            for (int i = 0; i < m; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int distance = offset - (first_row + 16 * i + 8 * half);
                    bool keep = (kept >> (2 * j + e) & 1) != 0 && (!cut || (distance >= bounds.low && distance <= bounds.high));
                    if (SEGMENTS) keep = keep && segment(in.q_segments, batch, row, least(query + 16 * i + 8 * half, in.seqlen_q - 1)) == of_key;
                    s[i][j][2 * half + e] = keep ? s[i][j][2 * half + e] : -INFINITE;
                    dp[i][j][2 * half + e] = keep ? dp[i][j][2 * half + e] : 0.0f;
                }
            }
        }
    }
}
#endif

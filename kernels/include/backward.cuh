// What the backward passes share, whichever way their products go: ranges and offsets, logits, what positions exclude.
#pragma once

#include "attention.cuh"
#include "rows.cuh"

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
DEVICE int greatest_int(int a, int b) { return a > b ? a : b; }
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

// The rows of one head.
DEVICE Rows<ELEMENT> rows_of(const Operand& x, const Position& at, i64 head) {
    return {(const ELEMENT*)x.data + offset_of(x, at, 0, head), x.strides[2], x.strides[4]};
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
// Whether the plain way may be taken next to this lse, whose low part it leaves out: at most 2^-24 of it, an error that all of
// a row has. Half types round their results to 2^-11, and it may be 2^-14; tf32 rounds factors alone to that, at random,
// which in sums is less: 2^-18. Exact f32 never takes it.
constexpr bool MAY_BE_PLAIN = sizeof(ELEMENT) == 2 || TF32;
constexpr float PLAIN_LIMIT = sizeof(ELEMENT) == 4 ? 64.0f : 1024.0f;
constexpr bool HAS_BIAS = BIAS_0 != ABSENT;
DEVICE bool allows_plain(float lse) { return MAY_BE_PLAIN && (magnitude(lse) <= PLAIN_LIMIT || lse == INFINITE); }
// The same of `count` queries from `first` on, whose statistics are padded: all lanes together.
DEVICE bool allows_plain_of_all(const BackwardParams& params, const Position& at, i64 first, int count) {
    if (!MAY_BE_PLAIN) return false;
    const float* const lse = (const float*)params.statistics + statistics_row(params, at) + first;
    bool plain = true;
    for (int query = 4 * lane_index(); query < count; query += 4 * WARP_THREADS) {
        const Piece piece = load_piece(lse + query);
#pragma unroll
        for (const u32 word : piece.words) plain = plain && allows_plain(float_of(word));
    }
    return warp_all(plain);
}

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

// Those of two products, for which there may be instructions.
template <bool plain> DEVICE Pair logits_of(Pair products, float scale_base2, Pair biases, Pair alibis, Pair lse, Pair low) {
    if constexpr (plain && !ALIBI) {
        // Negative, since lse would be negated by instructions of its own.
        const Pair rest = fused_multiply_add(products, -scale_base2, lse), logits = {-rest.x, -rest.y};
        return HAS_BIAS ? fused_multiply_add(biases, LOG2_E, logits) : logits;
    } else {
        return {logit_of<plain>(products.x, scale_base2, biases.x, alibis.x, lse.x, low.x),
                logit_of<plain>(products.y, scale_base2, biases.y, alibis.y, lse.y, low.y)};
    }
}

// Whether dO v starts from -delta, which saves additions. What the matrix unit cuts off is then of delta's size: not where
// products are exact to f32.
constexpr bool STARTS_FROM_DELTA = MAY_BE_PLAIN;

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

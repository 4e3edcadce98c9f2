// What attention adds to a tile of logits: biases, ALiBi, masks. Shared by the forward and the backward pass.
//
// Constants, all of them defined: ELEMENT (float, f16, bf16), HEAD_DIM, HEAD_DIM_V; BIAS_0 .. BIAS_3 (a kind below) and
// BIAS_0_ELEMENT .. BIAS_3_ELEMENT; 0 or 1: TF32 (factors in float are rounded to that), KEY_MASK, KV_LENGTHS, SEGMENTS,
// POSITIONS, ALIBI, GATE, UNIFORM_ROWS.
#pragma once

#include "gpu.h"
#include "params.h"

// Kinds of a bias.
constexpr int ABSENT = 0;    // there is none
constexpr int STRIDED = 1;   // any strides: read element by element
constexpr int PIECES = 2;    // neighbouring keys are neighbours, rows start at multiples of 16 bytes
constexpr int KEYS = 3;      // as PIECES, and the same for all queries

template <int index> struct Bias;
template <> struct Bias<0> {
    using T = BIAS_0_ELEMENT;
    static constexpr int kind = BIAS_0;
};
template <> struct Bias<1> {
    using T = BIAS_1_ELEMENT;
    static constexpr int kind = BIAS_1;
};
template <> struct Bias<2> {
    using T = BIAS_2_ELEMENT;
    static constexpr int kind = BIAS_2;
};
template <> struct Bias<3> {
    using T = BIAS_3_ELEMENT;
    static constexpr int kind = BIAS_3;
};

// One attention: the owner of a matrix of logits.
struct Position {
    i64 batch;
    i64 row;
    i64 head;
};

// Remainder of `index` by `size`; `index` becomes the quotient. Both are not negative. 32-bit division is many times cheaper;
// beyond it bits are subtracted one by one, since the compiler's division is a call, around which registers are spilled.
DEVICE i64 split_index(i64& index, i64 size) {
    if (((u64)index | (u64)size) >> 32 == 0) {
        const u32 dividend = (u32)index, divisor = (u32)size;
        index = dividend / divisor;
        return dividend - (u32)index * divisor;
    }
    u64 quotient = 0, remainder = 0;
#pragma unroll 1
    for (int bit = 63; bit >= 0; bit--) {
        remainder = remainder << 1 | ((u64)index >> bit & 1);
        const bool fits = remainder >= (u64)size;
        remainder -= fits ? (u64)size : 0;
        quotient |= (u64)fits << bit;
    }
    index = (i64)quotient;
    return (i64)remainder;
}

// Element of a bias at query 0 and key 0.
template <int index> DEVICE const typename Bias<index>::T* bias_data(const AttentionInputs& inputs, const Position& at) {
    const Operand& bias = inputs.biases[index];
    return (const typename Bias<index>::T*)bias.data + at.batch * bias.strides[0] + at.row * bias.strides[1] +
           at.head * bias.strides[2];
}

// Finite biases saturate here, in base 2: a sum of five stays finite, and lse, which is carried to 48 bits, still tells how
// many keys share such a bias.
constexpr float LARGEST_BIAS = 8589934592.0f;  // 2^33

// A bias for base-2 exponentials: finite values stay finite, infinities and NaN pass.
DEVICE float bias_base2(float bias) {
    const float scaled = bias * LOG2_E;
    const float clamped = minimum(maximum(scaled, -LARGEST_BIAS), LARGEST_BIAS);
    const bool finite = (bits_of(bias) & 0x7f800000u) != 0x7f800000u;
    return finite ? clamped : bias;
}

template <int index>
DEVICE float add_bias_base2(float sum, const AttentionInputs& inputs, const Position& at, i64 query, i64 key) {
    if constexpr (Bias<index>::kind != ABSENT) {
        const Operand& bias = inputs.biases[index];
        const auto* data = bias_data<index>(inputs, at);
        sum += bias_base2(to_f32(data[query * bias.strides[3] + key * bias.strides[4]]));
    }
    return sum;
}

// The sum of all biases of one logit, in base 2; both indices exist.
DEVICE float biases_base2(const AttentionInputs& inputs, const Position& at, i64 query, i64 key) {
    float sum = add_bias_base2<0>(0.0f, inputs, at, query, key);
    sum = add_bias_base2<1>(sum, inputs, at, query, key);
    sum = add_bias_base2<2>(sum, inputs, at, query, key);
    return add_bias_base2<3>(sum, inputs, at, query, key);
}

// Position of a key minus position of a query, with offsets.
DEVICE i64 distance(const AttentionInputs& inputs, i64 query, i64 key) { return inputs.first_distance + key - query; }

// -slope |distance|, in base 2.
DEVICE float alibi_base2(float slope, i64 distance) {
    const float length = (float)(u64)(distance < 0 ? -distance : distance);
    const float scaled = minimum(maximum(slope * LOG2_E, -LARGEST_BIAS), LARGEST_BIAS) * length;
    return -minimum(maximum(scaled, -LARGEST_BIAS), LARGEST_BIAS);
}

// Whether causality and window let a query see a key.
DEVICE bool position_keeps(const AttentionInputs& inputs, i64 query, i64 key) {
    const i64 far = distance(inputs, query, key);
    return far >= inputs.lowest_distance && far <= inputs.highest_distance;
}

// How far a mask covers a tile.
constexpr int EMPTY = 0;
constexpr int PARTIAL = 1;
constexpr int FULL = 2;

// Cover of queries `query .. query + queries` and keys `key .. key + keys`: the distance is lowest at (last query, first
// key), highest at (first query, last key).
DEVICE int position_cover(const AttentionInputs& inputs, i64 query, int queries, i64 key, int keys) {
    const i64 nearest = distance(inputs, query + queries - 1, key), farthest = distance(inputs, query, key + keys - 1);
    if (farthest < inputs.lowest_distance || nearest > inputs.highest_distance) return EMPTY;
    return nearest >= inputs.lowest_distance && farthest <= inputs.highest_distance ? FULL : PARTIAL;
}

// Keys of this batch and row that key lengths leave.
DEVICE i64 kv_length(const AttentionInputs& inputs, const Position& at) {
    if constexpr (KV_LENGTHS) {
        const Operand& lengths = inputs.kv_lengths;
        return ((const i64*)lengths.data)[at.batch * lengths.strides[0] + at.row * lengths.strides[1]];
    } else {
        return inputs.seqlen_k;
    }
}

// Id of a query or key.
DEVICE i32 segment(const Operand& ids, const Position& at, i64 index) {
    return ((const i32*)ids.data)[at.batch * ids.strides[0] + at.row * ids.strides[1] + index * ids.strides[2]];
}

DEVICE bool key_mask_keeps(const AttentionInputs& inputs, const Position& at, i64 key) {
    const Operand& mask = inputs.key_mask;
    return ((const u8*)mask.data)[at.batch * mask.strides[0] + at.row * mask.strides[1] + key * mask.strides[2]] != 0;
}

// 1 / (1 + e^-x) from e^-|x|, which does not overflow.
DEVICE float sigmoid(float x) {
    const float e = exp2(-(x < 0.0f ? -x : x) * LOG2_E);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

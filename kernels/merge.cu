// Adds (out, lse) over some keys into (acc_out, acc_lse) over others: docs/mathematics.md, equations (17) and (18).
//
// A row is one (batch, row, query, head). CHANNEL_LANES neighbouring lanes share it: each computes the weights, and every
// CHANNEL_LANES-th channel.
//
// Constants: OUT, ACC (float, f16, bf16), CHANNEL_LANES (a power of two, at most 32), BLOCK_THREADS.
#include "include/axes.cuh"
#include "include/gpu.h"
#include "include/params.h"

// e^x for x <= 0: relative error of a few 2^-23 down to 2^-126, 0 below.
DEVICE float exp_of_negative(float x) {
    const float log2_e_low = 1.925963033500116e-8f;  // log2(e) - LOG2_E
    const float whole = multiply(x, LOG2_E);
    // What the product lost; e^x would be off by |x| 2^-24 without.
    const float lost = fused_multiply_add(x, LOG2_E, -whole) + x * log2_e_low;
    const float power = exp2(whole);
    return power == 0.0f ? 0.0f : fused_multiply_add(power, multiply(lost, LN_2), power);
}

// ln(1 + x) for 0 <= x <= 1: 2 artanh(x / (2 + x)), whose series ends after s^15 since s <= 1/3.
DEVICE float log_of_one_plus(float x) {
    const float s = x * reciprocal(add(2.0f, x));
    const float square = s * s;
    float sum = 1.0f / 15.0f;
    sum = fused_multiply_add(sum, square, 1.0f / 13.0f);
    sum = fused_multiply_add(sum, square, 1.0f / 11.0f);
    sum = fused_multiply_add(sum, square, 1.0f / 9.0f);
    sum = fused_multiply_add(sum, square, 1.0f / 7.0f);
    sum = fused_multiply_add(sum, square, 1.0f / 5.0f);
    sum = fused_multiply_add(sum, square, 1.0f / 3.0f);
    return fused_multiply_add(multiply(sum, square), 2.0f * s, 2.0f * s);
}

// A log-sum-exp in two parts.
struct LogSum {
    float high;
    float low;
};

// Shares of accumulator and part in their union, and the union's log-sum-exp.
struct Weights {
    float acc;
    float part;
    LogSum lse;
};

DEVICE Weights weigh(LogSum acc, LogSum part) {
    const float acc_sum = acc.high + acc.low, part_sum = part.high + part.low;
    const float not_a_number = float_of(0x7fc00000u);
    // NaN spreads, and so does +inf, which no sum of finite logits gives.
    if (!(acc_sum < INFINITE) || !(part_sum < INFINITE)) {
        return {not_a_number, not_a_number, {not_a_number, 0.0f}};
    }
    // Without keys on one side the other stays as it is.
    if (part_sum == -INFINITE) return {1.0f, 0.0f, acc_sum == -INFINITE ? LogSum{-INFINITE, 0.0f} : acc};
    if (acc_sum == -INFINITE) return {0.0f, 1.0f, part};
    // The sides are ordered by the whole difference: large low parts can outweigh the high ones.
    float difference = add(add(part.high, -acc.high), add(part.low, -acc.low));
    const bool part_is_larger = difference > 0.0f;
    const LogSum larger = part_is_larger ? part : acc;
    const float ratio = exp_of_negative(part_is_larger ? -difference : difference);
    const float larger_weight = reciprocal(add(1.0f, ratio));
    const float smaller_weight = ratio * larger_weight;
    // Two-sum: equation (5a).
    const float m = larger.high, t = add(larger.low, log_of_one_plus(ratio));
    const float lse = add(m, t);
    const float u = add(lse, -m);
    const float low = add(add(m, -add(lse, -u)), add(t, -u));
    return {
        part_is_larger ? smaller_weight : larger_weight,
        part_is_larger ? larger_weight : smaller_weight,
        {lse, low},
    };
}

// A side without weight has no say, whatever it holds; where both are empty the accumulator stays.
DEVICE float mix(const Weights& weights, float acc, float part) {
    if (weights.part == 0.0f) return acc;
    if (weights.acc == 0.0f) return part;
    return fused_multiply_add(weights.part, part, weights.acc * acc);
}

template <class T> DEVICE T* at(const Operand& operand, i64 a, i64 b, i64 c, i64 d) {
    const i64* strides = operand.strides;
    return (T*)operand.data + a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3];
}

KERNEL(BLOCK_THREADS) merge(const MergeParams params) {
    constexpr int rows_per_block = BLOCK_THREADS / CHANNEL_LANES;
    const i64 block = params.first_block + block_index();
    u64 rest = (u64)(block * rows_per_block + thread_index() / CHANNEL_LANES), head, query, row;
    divide(rest, (u64)params.heads, rest, head);
    divide(rest, (u64)params.seqlen_q, rest, query);
    divide(rest, (u64)params.rows, rest, row);
    const i64 batch = (i64)rest, r = (i64)row, q = (i64)query, h = (i64)head;
    const int first = thread_index() % CHANNEL_LANES;

    const bool inside = batch < params.batch;
    float *acc_lse = nullptr, *acc_lse_low = nullptr;
    Weights weights = {};
    if (inside) {
        acc_lse = at<float>(params.acc_lse, batch, r, h, q);
        acc_lse_low = at<float>(params.acc_lse_low, batch, r, h, q);
        const LogSum part = {*at<float>(params.lse, batch, r, h, q), *at<float>(params.lse_low, batch, r, h, q)};
        weights = weigh({*acc_lse, *acc_lse_low}, part);
        const OUT* out = at<OUT>(params.out, batch, r, q, h);
        ACC* acc = at<ACC>(params.acc_out, batch, r, q, h);
        const i64 out_stride = params.out.strides[4], acc_stride = params.acc_out.strides[4];
        for (i64 channel = first; channel < params.head_dim_v; channel += CHANNEL_LANES) {
            ACC* to = acc + channel * acc_stride;
            *to = from_f32<ACC>(mix(weights, to_f32(*to), to_f32(out[channel * out_stride])));
        }
    }
    // The row's lanes have read its old log-sum-exp.
    warp_barrier();
    if (inside && first == 0) {
        *acc_lse = weights.lse.high;
        *acc_lse_low = weights.lse.low;
    }
}

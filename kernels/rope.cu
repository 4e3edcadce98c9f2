// Rotary position embedding: docs/mathematics.md, equations (19)-(21).
//
// A thread has one slot of one position, for all heads: a pair of channels that is turned, or a channel that is copied. So
// each angle is computed once.
//
// Constants: ELEMENT (float, f16, bf16), INTERLEAVED (pairs 2i, 2i + 1; otherwise i, i + pairs), BLOCK_THREADS.
#include "include/axes.cuh"
#include "include/gpu.h"
#include "include/params.h"

struct Rotation {
    float sine;
    float cosine;
};

// Sine and cosine of an angle in 2^32ths of a turn, within 2^-23.
//
// The nearest quarter turn exchanges and negates them; what is left, up to an eighth of a turn t, goes into
// sin 2 pi t = t (2 pi + P(t^2)) and cos 2 pi t = 1 + t^2 Q(t^2), Chebyshev interpolations.
DEVICE Rotation rotation_of(u32 turn) {
    const float tau = 6.2831854820251465f, tau_low = -1.7484556e-7f;
    const u32 quarter = (turn + (1u << 29)) >> 30;
    const float t = multiply((float)(i32)(turn - (quarter << 30)), 1.0f / 4294967296.0f);
    const float square = multiply(t, t);
    float p = fused_multiply_add(41.589542f, square, -76.70129f);
    p = fused_multiply_add(p, square, 81.60523f);
    p = fused_multiply_add(p, square, -41.3417f);
    p = fused_multiply_add(p, square, tau_low);
    float q = fused_multiply_add(59.424107f, square, -85.44882f);
    q = fused_multiply_add(q, square, 64.93937f);
    q = fused_multiply_add(q, square, -19.739208f);
    const float sine = fused_multiply_add(t, tau, multiply(t, p)), cosine = fused_multiply_add(q, square, 1.0f);
    const bool exchanged = quarter & 1;
    const float sine_of = exchanged ? cosine : sine, cosine_of = exchanged ? sine : cosine;
    return {
        float_of(bits_of(sine_of) ^ ((quarter >> 1) << 31)),
        float_of(bits_of(cosine_of) ^ (((quarter + 1) >> 1) << 31)),
    };
}

KERNEL(BLOCK_THREADS) rope(const RopeParams params) {
    const i64 block = params.first_block + block_index();
    const i64 index = block * BLOCK_THREADS + thread_index();
    const i64 slots = params.head_dim - params.pairs;
    u64 rest = (u64)index, slot, position, row;
    divide(rest, (u64)slots, rest, slot);
    divide(rest, (u64)params.seqlen, rest, position);
    divide(rest, (u64)params.rows, rest, row);
    const i64 batch = (i64)rest;
    if (batch >= params.batch) return;

    const i64* from_strides = params.source.strides;
    const i64* to_strides = params.destination.strides;
    const ELEMENT* from = (const ELEMENT*)params.source.data + batch * from_strides[0] + (i64)row * from_strides[1] +
                          (i64)position * from_strides[2];
    ELEMENT* to = (ELEMENT*)params.destination.data + batch * to_strides[0] + (i64)row * to_strides[1] +
                  (i64)position * to_strides[2];
    if ((i64)slot >= params.pairs) {
        const i64 channel = params.pairs + (i64)slot;
        from += channel * from_strides[4];
        to += channel * to_strides[4];
        for (i64 head = 0; head < params.heads; head++) to[head * to_strides[3]] = from[head * from_strides[3]];
        return;
    }
    const RopeAngle angle = params.angles[slot];
    // Wraps as angles do.
    const Rotation rotation = rotation_of((u32)((angle.first + angle.step * position) >> 32));
    const i64 first = INTERLEAVED ? 2 * (i64)slot : (i64)slot;
    const i64 apart = INTERLEAVED ? 1 : params.pairs;
    from += first * from_strides[4];
    to += first * to_strides[4];
    const i64 from_apart = apart * from_strides[4], to_apart = apart * to_strides[4];
    for (i64 head = 0; head < params.heads; head++) {
        const ELEMENT* pair = from + head * from_strides[3];
        ELEMENT* turned = to + head * to_strides[3];
        const float x = to_f32(pair[0]), y = to_f32(pair[from_apart]);
        turned[0] = from_f32<ELEMENT>(fused_multiply_add(x, rotation.cosine, -multiply(y, rotation.sine)));
        turned[to_apart] = from_f32<ELEMENT>(fused_multiply_add(x, rotation.sine, multiply(y, rotation.cosine)));
    }
}

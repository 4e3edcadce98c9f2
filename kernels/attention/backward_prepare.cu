// What the passes of the backward pass need of every query: lse in the form they subtract it, delta (8), the gradient of
// the output before the gate (7), and the gradient of the gate (16).
//
// LANES threads share a query. Queries without keys, and those that pad the statistics, get lse = +inf: their P is 0.
//
// Constants: ELEMENT, HEAD_DIM_V, LANES (a power of two, at most a warp), BLOCK_THREADS, WANT_D_O and
// WANT_D_GATE (with a gate alone), D_O_CHANNELS (HEAD_DIM_V padded).
#include "../include/gpu.h"
#include "../include/params.h"

DEVICE float sigmoid(float x) {
    const float e = exp2(-magnitude(x) * LOG2_E), r = 1.0f / (1.0f + e);
    return x >= 0.0f ? r : e * r;
}

DEVICE i64 offset(const Operand& x, i64 batch, i64 row, i64 third, i64 fourth) {
    return batch * x.strides[0] + row * x.strides[1] + third * x.strides[2] + fourth * x.strides[3];
}

KERNEL(BLOCK_THREADS) backward_prepare(const BackwardParams params) {
    const AttentionInputs& in = params.inputs;
    const i64 block = params.first_block + block_index();
    const i64 all = in.batch * in.rows * in.heads * params.padded_queries;
    const i64 index = block * (BLOCK_THREADS / LANES) + thread_index() / LANES;
    const bool exists = index < all;
    i64 rest = exists ? index : 0;
    const i64 query = rest % params.padded_queries;
    rest /= params.padded_queries;
    const i64 head = rest % in.heads;
    rest /= in.heads;
    const i64 row = rest % in.rows, batch = rest / in.rows;
    const bool inside = exists && query < in.seqlen_q;

    float delta = 0.0f;
    if (inside) {
        const ELEMENT* d_out = (const ELEMENT*)params.d_out.data + offset(params.d_out, batch, row, query, head);
        const ELEMENT* out = (const ELEMENT*)params.out.data + offset(params.out, batch, row, query, head);
        if (WANT_D_O) {
            // Channels that pad a row of the workspace.
            ELEMENT* d_o = (ELEMENT*)params.d_o.data + offset(params.d_o, batch, row, query, head);
            for (int channel = HEAD_DIM_V + thread_index() % LANES; channel < D_O_CHANNELS; channel += LANES) {
                d_o[channel] = from_f32<ELEMENT>(0.0f);
            }
        }
        for (int channel = thread_index() % LANES; channel < HEAD_DIM_V; channel += LANES) {
            const float gradient = to_f32(d_out[channel * params.d_out.strides[4]]);
            const float product = gradient * to_f32(out[channel * params.out.strides[4]]);
            delta += product;
            if (WANT_D_O || WANT_D_GATE) {
                const ELEMENT* gates = (const ELEMENT*)in.gate.data + offset(in.gate, batch, row, query, head);
                const float gate = to_f32(gates[channel * in.gate.strides[4]]);
                if (WANT_D_O) {
                    ELEMENT* d_o = (ELEMENT*)params.d_o.data + offset(params.d_o, batch, row, query, head);
                    d_o[channel * params.d_o.strides[4]] = from_f32<ELEMENT>(gradient * sigmoid(gate));
                }
                if (WANT_D_GATE) {
                    ELEMENT* d_gate = (ELEMENT*)params.d_gate.data + offset(params.d_gate, batch, row, query, head);
                    d_gate[channel * params.d_gate.strides[4]] = from_f32<ELEMENT>(product * sigmoid(-gate));
                }
            }
        }
    }
    // The same order of additions for every query.
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
    if (!exists || thread_index() % LANES != 0) return;

    float lse = INFINITE, low = 0.0f;
    if (inside) {
        // To base 2, both parts: the product needs more bits than f32 has (5b).
        const float high = ((const float*)params.lse.data)[offset(params.lse, batch, row, head, query)];
        const double natural = (double)high + ((const float*)params.lse_low.data)[offset(params.lse_low, batch, row, head, query)];
        const double base2 = natural * 1.4426950408889634;
        if (high != -INFINITE) {
            lse = (float)base2;
            low = (float)(base2 - lse);
        }
    }
    float* to = (float*)params.statistics + index;
    to[0] = lse;
    to[all] = low;
    to[2 * all] = -delta;
}

// What rows without keys give every dV when they are the mean of v: the sum of dO / seqlen_k over such queries of a
// (batch, row, key head), queries in order inside heads in order.
//
// A block owns one (batch, row, key head), a thread its channels.
//
// Constants: ELEMENT, HEAD_DIM_V, BLOCK_THREADS.
#include "../include/gpu.h"
#include "../include/params.h"

KERNEL(BLOCK_THREADS) backward_uniform(const BackwardParams params) {
    const AttentionInputs& in = params.inputs;
    const i64 owner = params.first_block + block_index();
    const i64 key_heads = in.heads / in.group, key_head = owner % key_heads;
    const i64 row = owner / key_heads % in.rows, batch = owner / key_heads / in.rows;
    for (int channel = thread_index(); channel < HEAD_DIM_V; channel += BLOCK_THREADS) {
        float sum = 0.0f;
        for (i64 head = key_head * in.group; head < (key_head + 1) * in.group; head++) {
            const float* lse = (const float*)params.lse.data + batch * params.lse.strides[0] + row * params.lse.strides[1] +
                               head * params.lse.strides[2];
            const ELEMENT* d_o = (const ELEMENT*)params.d_o.data + batch * params.d_o.strides[0] + row * params.d_o.strides[1] +
                                 head * params.d_o.strides[3] + channel * params.d_o.strides[4];
            for (i64 query = 0; query < in.seqlen_q; query++) {
                if (lse[query * params.lse.strides[3]] == -INFINITE) sum += to_f32(d_o[query * params.d_o.strides[2]]);
            }
        }
        ((float*)params.uniform_sums)[owner * HEAD_DIM_V + channel] = sum / (float)in.seqlen_k;
    }
}

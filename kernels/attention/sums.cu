// Sums of f32 partials: to[i] = factor * sum over r of from[i, r], the terms in a fixed order.
//
// LANES threads share a result: each adds every LANES-th term, in order; then their sums are added pairwise.
//
// Constants: ELEMENT (of the result), LANES (a power of two, at most a warp), BLOCK_THREADS.
#include "../include/gpu.h"
#include "../include/params.h"

KERNEL(BLOCK_THREADS) sums(const SumParams params) {
    const i64 block = params.first_block + block_index();
    i64 rest = block * (BLOCK_THREADS / LANES) + thread_index() / LANES;
    i64 to = 0, from = 0;
#pragma unroll
    for (int axis = 4; axis >= 0; axis--) {
        const i64 index = rest % params.sizes[axis];
        rest /= params.sizes[axis];
        to += index * params.to.strides[axis];
        from += index * params.from_strides[axis];
    }
    // Beyond the last result `rest` is left over.
    const bool exists = rest == 0;
    float sum = 0.0f;
    if (exists) {
        i64 lane = thread_index() % LANES;
        for (i64 a = 0; a < params.summed[0]; a++) {
            for (i64 b = 0; b < params.summed[1]; b++) {
                for (i64 c = 0; c < params.summed[2]; c++) {
                    const i64 start = from + a * params.summed_strides[0] + b * params.summed_strides[1] + c * params.summed_strides[2];
                    float part = 0.0f;
                    for (i64 d = lane; d < params.summed[3]; d += LANES) {
                        part += ((const float*)params.from)[start + d * params.summed_strides[3]];
                    }
                    sum += part;
                }
            }
        }
    }
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (exists && thread_index() % LANES == 0) ((ELEMENT*)params.to.data)[to] = from_f32<ELEMENT>(sum * params.factor);
}

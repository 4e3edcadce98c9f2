// destination += source, element by element: two strided tensors of one shape, added in f32 and rounded to nearest even.
//
// Constants: SOURCE, DESTINATION (float, f16, bf16), AXES (1 to MAX_LAYOUT_AXES), BLOCK_THREADS, ELEMENTS_PER_THREAD.
#include "include/axes.cuh"
#include "include/gpu.h"
#include "include/params.h"

KERNEL(BLOCK_THREADS) accumulate(const RelayoutParams params) {
    const SOURCE* source = (const SOURCE*)params.source;
    DESTINATION* destination = (DESTINATION*)params.destination;
    const i64 block = params.first_block + block_index();
    const i64 first = block * BLOCK_THREADS * ELEMENTS_PER_THREAD + thread_index();
    // All loads before the first store: none waits for another.
    SOURCE parts[ELEMENTS_PER_THREAD];
    DESTINATION sums[ELEMENTS_PER_THREAD];
    i64 places[ELEMENTS_PER_THREAD];
#pragma unroll
    for (int step = 0; step < ELEMENTS_PER_THREAD; step++) {
        const i64 index = first + step * BLOCK_THREADS;
        if (index >= params.count) continue;
        i64 from;
        offsets_of<AXES>(
            index, params.sizes, params.source_strides, params.destination_strides, from, places[step]);
        parts[step] = source[from];
        sums[step] = destination[places[step]];
    }
#pragma unroll
    for (int step = 0; step < ELEMENTS_PER_THREAD; step++) {
        const i64 index = first + step * BLOCK_THREADS;
        if (index >= params.count) continue;
        destination[places[step]] = from_f32<DESTINATION>(add(to_f32(sums[step]), to_f32(parts[step])));
    }
}

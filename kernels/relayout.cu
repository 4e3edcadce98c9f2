// Copies between two strided tensors of one shape, rounding to nearest even where their types differ.
//
// Constants: SOURCE, DESTINATION (float, f16, bf16; or u8, u16, u32 in both to keep bits), AXES (1 to MAX_LAYOUT_AXES),
// BLOCK_THREADS, ELEMENTS_PER_THREAD.
#include "include/axes.cuh"
#include "include/gpu.h"
#include "include/params.h"

template <class To, class From> struct Cast {
    static DEVICE To of(From x) { return from_f32<To>(to_f32(x)); }
};
template <class Same> struct Cast<Same, Same> {
    static DEVICE Same of(Same x) { return x; }
};

KERNEL(BLOCK_THREADS) relayout(const RelayoutParams params) {
    const SOURCE* source = (const SOURCE*)params.source;
    DESTINATION* destination = (DESTINATION*)params.destination;
    const i64 block = params.first_block + block_index();
    const i64 first = block * BLOCK_THREADS * ELEMENTS_PER_THREAD + thread_index();
    // All loads before the first store: none waits for another.
    SOURCE values[ELEMENTS_PER_THREAD];
    i64 places[ELEMENTS_PER_THREAD];
#pragma unroll
    for (int step = 0; step < ELEMENTS_PER_THREAD; step++) {
        const i64 index = first + step * BLOCK_THREADS;
        if (index >= params.count) continue;
        i64 from;
        offsets_of<AXES>(
            index, params.sizes, params.source_strides, params.destination_strides, from, places[step]);
        values[step] = source[from];
    }
#pragma unroll
    for (int step = 0; step < ELEMENTS_PER_THREAD; step++) {
        const i64 index = first + step * BLOCK_THREADS;
        if (index < params.count) destination[places[step]] = Cast<DESTINATION, SOURCE>::of(values[step]);
    }
}

// Sets every element of a strided tensor to one value.
//
// Constants: ELEMENT_BYTES (1, 2, 4 or 8), AXES (1 to MAX_LAYOUT_AXES), SERIAL (one thread writes all: elements may share a
// place), BLOCK_THREADS, ELEMENTS_PER_THREAD.
#include "include/axes.cuh"
#include "include/gpu.h"
#include "include/params.h"

template <int bytes> struct Unsigned;
template <> struct Unsigned<1> {
    using type = u8;
};
template <> struct Unsigned<2> {
    using type = u16;
};
template <> struct Unsigned<4> {
    using type = u32;
};
template <> struct Unsigned<8> {
    using type = u64;
};

KERNEL(BLOCK_THREADS) fill(const FillParams params) {
    using Element = Unsigned<ELEMENT_BYTES>::type;
    Element* data = (Element*)params.data;
    const i64 block = params.first_block + block_index();
    const i64 first = block * BLOCK_THREADS * ELEMENTS_PER_THREAD + thread_index();
    const i64 steps = SERIAL ? params.count : ELEMENTS_PER_THREAD;
    // Neighbouring threads write neighbouring elements in each step.
    for (i64 step = 0; step < steps; step++) {
        const i64 index = first + step * BLOCK_THREADS;
        if (index >= params.count) break;
        // In a long loop, what the divisions need of the sizes would take registers from step to step.
        i64 sizes[AXES];
#pragma unroll
        for (int axis = 0; axis < AXES; axis++) sizes[axis] = SERIAL ? opaque(params.sizes[axis]) : params.sizes[axis];
        data[offset_of<AXES>(index, sizes, params.strides)] = (Element)params.value;
    }
}

// Fills contiguous elements with one value.
//
// Constants: ELEMENT_BYTES (1, 2, 4 or 8), BLOCK_THREADS, ELEMENTS_PER_THREAD.
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
    for (int step = 0; step < ELEMENTS_PER_THREAD; step++) {
        const i64 index = first + (i64)step * BLOCK_THREADS;
        if (index < params.count) data[index] = (Element)params.value;
    }
}

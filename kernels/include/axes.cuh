// From a flat index to positions in strided tensors.
#pragma once

#include "gpu.h"

// Quotient and remainder; 64-bit divisions take some hundred instructions, so they are left to numbers that need them.
DEVICE void divide(u64 dividend, u64 divisor, u64& quotient, u64& remainder) {
    if (((dividend | divisor) >> 32) == 0) {
        quotient = (u32)dividend / (u32)divisor;
        remainder = (u32)dividend % (u32)divisor;
    } else {
        quotient = dividend / divisor;
        remainder = dividend % divisor;
    }
}

// Element offset of row-major index `index` in a tensor of `axes` axes.
template <int axes> DEVICE i64 offset_of(i64 index, const i64* sizes, const i64* strides) {
    i64 offset = 0;
    u64 rest = (u64)index;
#pragma unroll
    for (int axis = axes - 1; axis > 0; axis--) {
        u64 entry;
        divide(rest, (u64)sizes[axis], rest, entry);
        offset += (i64)entry * strides[axis];
    }
    return offset + (i64)rest * strides[0];
}

// The same of two tensors of one shape.
template <int axes>
DEVICE void offsets_of(
    i64 index, const i64* sizes, const i64* first_strides, const i64* second_strides, i64& first, i64& second) {
    first = second = 0;
    u64 rest = (u64)index;
#pragma unroll
    for (int axis = axes - 1; axis > 0; axis--) {
        u64 entry;
        divide(rest, (u64)sizes[axis], rest, entry);
        first += (i64)entry * first_strides[axis];
        second += (i64)entry * second_strides[axis];
    }
    first += (i64)rest * first_strides[0];
    second += (i64)rest * second_strides[0];
}

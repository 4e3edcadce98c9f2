// Rows of channels: where they are, and how many pieces of 16 bytes they have.
#pragma once

#include "gpu.h"

template <class T> constexpr int PIECE_ELEMENTS = 16 / (int)sizeof(T);

// Pieces of a row of channels: whole steps of f32, half steps of the half types.
template <class T> DEVICE constexpr int pieces_of(int channels) { return (channels + 7) / 8 * 8 / PIECE_ELEMENTS<T>; }

// Threads that share a row of pieces: a power of two, at most 64.
DEVICE constexpr int threads_of_row(int pieces) {
    return pieces <= 2 ? pieces : pieces <= 4 ? 4 : pieces <= 8 ? 8 : pieces <= 16 ? 16 : pieces <= 32 ? 32 : 64;
}

// A strided matrix in global memory: address of its first element, strides in elements.
template <class T> struct Rows {
    const T* data;
    i64 row_stride;
    i64 channel_stride;
};

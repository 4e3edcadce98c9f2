// What differs between CUDA and HIP, under one name each: types, thread ids, barriers, shuffles, conversions, memory spaces.
//
// Kernels and tiles include this file and use these names alone; the names' two sides are gpu_cuda.h and gpu_hip.h. No
// header of a vendor is needed or included: run-time compilers come without them.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "sizes of integers");

// Numbers in half precision are storage: they are widened to f32 before any arithmetic outside a matrix product.
struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

// 16 bytes that move at once.
struct alignas(16) Piece {
    u32 words[4];
};

#if defined(__HIP__)
#include "gpu_hip.h"
#else
#include "gpu_cuda.h"
#endif

#define NOT_A_NUMBER float_of(0x7fc00000u)
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

DEVICE bool warp_any(bool predicate) { return warp_ballot(predicate) != 0; }
DEVICE bool warp_all(bool predicate) { return warp_ballot(!predicate) == 0; }

DEVICE float to_f32(float x) { return x; }
DEVICE float to_f32(bf16 x) { return float_of((u32)x.bits << 16); }

// Round to nearest, ties to even.
template <class T> DEVICE T from_f32(float x) {
    T y;
    round_to(y, x);
    return y;
}
template <> DEVICE float from_f32<float>(float x) { return x; }

// Two numbers in one word, the first in the low half.
template <class T> DEVICE u32 pack(float low, float high) { return pack(low, high, T()); }
template <class T> DEVICE float unpack_low(u32 word);
template <class T> DEVICE float unpack_high(u32 word);
template <> DEVICE float unpack_low<f16>(u32 word) { return to_f32(f16{(u16)word}); }
template <> DEVICE float unpack_high<f16>(u32 word) { return to_f32(f16{(u16)(word >> 16)}); }
template <> DEVICE float unpack_low<bf16>(u32 word) { return float_of(low_half_up(word)); }
template <> DEVICE float unpack_high<bf16>(u32 word) { return float_of(word & 0xffff0000u); }

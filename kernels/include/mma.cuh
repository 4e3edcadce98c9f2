// Matrix products of one warp on tensor cores: C[16][8] += A[16][k] B[k][8], sums in f32.
//
// A step of k is two pieces of 16 bytes of a row: 16 channels of f16 or bf16, 8 of f32. A half step is one piece. Lane l
// with g = l / 4 and t = l % 4 holds, in steps of words (two halves, or one f32):
//
//   A   a[0] row g, word t of the first piece      a[2] row g, word t of the second piece
//       a[1] row g + 8, as a[0]                    a[3] row g + 8, as a[2]
//   B   b[0] column g, word t of the first piece   b[1] column g, word t of the second piece
//   C   c[0], c[1] row g, columns 2t, 2t + 1       c[2], c[3] row g + 8, the same columns
//
// A half step has a[0], a[1] and b[0] alone. Which k a word stands for does not matter as long as A and B agree.
//
// f32 is multiplied as three products of tf32 (11 significant bits): x = h + l with h and l rounded to tf32, and
// A B = Ah Bh + Ah Bl + Al Bh. |l| <= 2^-11 |x|, so rounding l and leaving out Al Bl cost at most 2^-22 each of a
// product, and at random: over a sum that is what rounding in f32 (2^-24 of every partial sum) costs too. The matrix unit
// cuts off what does not fit its sums, always towards 0. That adds up, so the two small terms of all steps come first, when
// the sum is small, and long sums are cut into short ones that are added in f32.
//
// With the constant TF32, f32 is multiplied as Ah Bh alone.
#pragma once

#include "gpu.h"

// Whether numbers are split in two, so that products are exact to f32.
template <class T> constexpr bool SPLIT = sizeof(T) == 4 && !TF32;

// A factor of a product as the matrix unit takes it.
template <class T, int words, bool split = SPLIT<T>> struct Factor {
    u32 high[words];
};
template <class T, int words> struct Factor<T, words, true> {
    u32 high[words];
    u32 low[words];
};

template <class T, int words> DEVICE Factor<T, words> factor(const u32 (&raw)[words]) {
    Factor<T, words> f;
    for (int i = 0; i < words; i++) {
        f.high[i] = sizeof(T) == 4 ? to_tf32(float_of(raw[i])) : raw[i];
        if constexpr (SPLIT<T>) f.low[i] = to_tf32(float_of(raw[i]) - float_of(f.high[i]));
    }
    return f;
}

// The words of a half step: the first ones of a step.
template <class T, int words> DEVICE Factor<T, words / 2> half_of(const Factor<T, words>& whole) {
    Factor<T, words / 2> half;
    for (int i = 0; i < words / 2; i++) {
        half.high[i] = whole.high[i];
        if constexpr (SPLIT<T>) half.low[i] = whole.low[i];
    }
    return half;
}

// Which terms of a product are added: what is not split has a large one only.
constexpr int SMALL_TERMS = 0;  // Ah Bl + Al Bh
constexpr int LARGE_TERMS = 1;  // Ah Bh

DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], f16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], float) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Half a step.
DEVICE void mma(float (&c)[4], const u32 (&a)[2], const u32 (&b)[1], f16) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
DEVICE void mma(float (&c)[4], const u32 (&a)[2], const u32 (&b)[1], bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
DEVICE void mma(float (&c)[4], const u32 (&a)[2], const u32 (&b)[1], float) {
    asm volatile(
        "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// C += A B for one step, or half a step with half as many words.
template <int terms, class T, int words>
DEVICE void mma_step(float (&c)[4], const Factor<T, words>& a, const Factor<T, words / 2>& b) {
    if constexpr (terms == LARGE_TERMS) {
        mma(c, a.high, b.high, T());
    } else {
        static_assert(SPLIT<T>, "what is not split has no small terms");
        mma(c, a.low, b.high, T());
        mma(c, a.high, b.low, T());
    }
}

// Reductions over the four lanes that share a row of C.
DEVICE float quad_maximum(float x) {
    x = maximum(x, shuffle_xor(x, 1));
    return maximum(x, shuffle_xor(x, 2));
}
DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// Fragments of matrix products: 16 x 8 accumulators, and factors read from tiles in shared memory.
//
// Lane l holds of an accumulator the rows l / 4 and l / 4 + 8 and the columns 2 (l % 4) and 2 (l % 4) + 1:
// acc[2 * half + e] is row l / 4 + 8 * half, column 2 (l % 4) + e.
//
// A step of a product sums 32 bytes of channels: 16 numbers in half precision, 8 in f32. Half-precision tiles may end in
// half a step.
#pragma once

#include "mma.cuh"

typedef float Accumulator[4];

// The factor with 16 rows, and the one with 8 columns.
struct FragmentA {
    u32 words[4];
};
struct FragmentB {
    u32 words[2];
};

// A tile in shared memory: rows of channels, padded to an odd number of 16-byte pieces so that eight rows never meet in a
// bank.
template <class T, int channels> struct Tile {
    // Accumulators that its channels fill, which are padded to eight.
    static constexpr int columns = (channels + 7) / 8;
    static constexpr int padded_channels = columns * 8;
    static constexpr int pieces = padded_channels * (int)sizeof(T) / 16;
    static constexpr int pitch = (pieces | 1) * 16;
    static constexpr int steps = (pieces + 1) / 2;
    static constexpr bool half_step = pieces % 2 != 0;
    static DEVICE constexpr int bytes(int rows) { return rows * pitch; }
};

// d = a b + c over one whole step of a half type. Unlike `mma`, d need not be c: a sum that starts from numbers needed
// again, or from 0, takes no copies.
#define PRODUCT_FROM(T, name)                                                                                               \
    DEVICE void mma_from(Accumulator& d, const u32 (&a)[4], const u32 (&b)[2], const float (&c)[4], T) {                    \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                                 \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                             \
                     : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),   \
                       "f"(c[3]));                                                                                          \
    }                                                                                                                       \
    DEVICE void mma_half_from(Accumulator& d, const u32 (&a)[4], const u32 (&b)[2], const float (&c)[4], T) {               \
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." name "." name                                                  \
                     ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"                                            \
                     : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));                        \
    }
PRODUCT_FROM(f16, "f16")
PRODUCT_FROM(bf16, "bf16")
#undef PRODUCT_FROM

// Whether a step waits for the one before. The compiler would begin with the loads of all, for which registers have no room
// beside the two terms of f32, or the sums of many channels.
template <class T, int channels> constexpr bool STEP_BY_STEP = sizeof(T) == 4 || channels > 64;

// Passes over the steps of one sum: where numbers are split the small terms of all steps come first (mma.cuh).
template <class T> constexpr int PASSES = SPLIT<T> ? 2 : 1;

// d = a b + c over one whole step, in the pass `pass`.
template <class T> DEVICE void multiply_step(Accumulator& d, const FragmentA& a, const FragmentB& b, const float (&c)[4], int pass) {
    if constexpr (sizeof(T) == 4) {
        const Factor<T, 4> left = factor<T>(a.words);
        const Factor<T, 2> right = factor<T>(b.words);
#pragma unroll
        for (int x = 0; x < 4; x++) d[x] = c[x];
        if constexpr (SPLIT<T>) {
            if (pass == 0) {
                mma_step<SMALL_TERMS>(d, left, right);
                return;
            }
        }
        mma_step<LARGE_TERMS>(d, left, right);
    } else {
        mma_from(d, a.words, b.words, c, T());
    }
}
// d = a b + c over half a step, which f32 does not have.
template <class T> DEVICE void multiply_half_step(Accumulator& d, const FragmentA& a, const FragmentB& b, const float (&c)[4]) {
    if constexpr (sizeof(T) == 2) mma_half_from(d, a.words, b.words, c, T());
}

// What a lane adds to the address of a row to load factors that begin there: written apart from the row, so that rows that are
// known when compiling become part of the instructions.
template <class T, int channels> struct LaneOffsets {
    static constexpr int pitch = Tile<T, channels>::pitch;
    // Sixteen rows as the left factor, or to be summed over; all of a step, and its first half.
    int sixteen = lane_index() % 16 * pitch + lane_index() / 16 * 16;
    int sixteen_half = lane_index() % 16 * pitch;
    // Pairs of eight rows as the right factor, and as many eights as there are, four at most.
    int eights = (lane_index() / 16 * 8 + lane_index() % 8) * pitch + lane_index() / 8 % 2 * 16;
    template <int n> DEVICE int eights_half() const { return lane_index() % (8 * (n < 4 ? n : 4)) * pitch; }
    // Twice sixteen rows to be summed over.
    int thirty_two = lane_index() * pitch;
};

// Rows first_row .. first_row + 15 and one step of channels, as the left factor.
template <class T, int channels>
DEVICE FragmentA load_a(u32 tile, int first_row, int step, const LaneOffsets<T, channels>& lane = LaneOffsets<T, channels>()) {
    using Rows = Tile<T, channels>;
    const bool half = Rows::half_step && step == Rows::steps - 1;
    FragmentA a;
    load_matrices(a.words, tile + (half ? lane.sixteen_half : lane.sixteen) + first_row * Rows::pitch + 2 * step * 16);
    return a;
}

// acc[i][j] += a[i] (rows 8 j .. 8 j + 7 of the tile, transposed) over one step of channels; the first step of the first pass
// starts from `start(i, j, x)` instead.
template <class T, int channels, int m, int n, class Start>
DEVICE void multiply_rows(Accumulator (&acc)[m][n], const FragmentA (&a)[m], u32 tile, int first_row, int pass, int step, Start start,
                          const LaneOffsets<T, channels>& lane = LaneOffsets<T, channels>()) {
    using Rows = Tile<T, channels>;
    u32 words[4];
    if constexpr (STEP_BY_STEP<T, channels>) one_by_one();
    if (Rows::half_step && step == Rows::steps - 1) {
        static_assert(n % 4 == 0 || n < 4, "as many eights in each load");
#pragma unroll
        for (int j = 0; j < n; j += 4) {
            load_matrices(words, tile + lane.template eights_half<n>() + (first_row + 8 * j) * Rows::pitch + 2 * step * 16);
#pragma unroll
            for (int part = 0; part < 4 && j + part < n; part++) {
                const FragmentB b = {{words[part], 0}};
#pragma unroll
                for (int i = 0; i < m; i++) {
                    float c[4];
#pragma unroll
                    for (int x = 0; x < 4; x++) c[x] = pass == 0 && step == 0 ? start(i, j + part, x) : acc[i][j + part][x];
                    multiply_half_step<T>(acc[i][j + part], a[i], b, c);
                }
            }
        }
        return;
    }
    static_assert(n % 2 == 0, "pairs of accumulators");
#pragma unroll
    for (int j = 0; j < n; j += 2) {
        load_matrices(words, tile + lane.eights + (first_row + 8 * j) * Rows::pitch + 2 * step * 16);
        const FragmentB b[2] = {{{words[0], words[1]}}, {{words[2], words[3]}}};
#pragma unroll
        for (int part = 0; part < 2; part++) {
#pragma unroll
            for (int i = 0; i < m; i++) {
                float c[4];
#pragma unroll
                for (int x = 0; x < 4; x++) c[x] = pass == 0 && step == 0 ? start(i, j + part, x) : acc[i][j + part][x];
                multiply_step<T>(acc[i][j + part], a[i], b[part], c, pass);
            }
        }
    }
}

// acc[i][j][x] += term(i, j, x)
template <int m, int n, class Term> DEVICE void add_to_all(Accumulator (&acc)[m][n], Term term) {
#pragma unroll
    for (int i = 0; i < m; i++)
#pragma unroll
        for (int j = 0; j < n; j++)
#pragma unroll
            for (int x = 0; x < 4; x++) acc[i][j][x] += term(i, j, x);
}

// Rows of a tile that one step of a product over rows sums.
template <class T> constexpr int row_step = sizeof(T) == 4 ? 8 : 16;

// Accumulators as the left factor of a product over their columns: rounded to T. With f32, column 2 i of eight becomes
// entry i, and column 2 i + 1 entry 4 + i.
template <class T> DEVICE FragmentA as_factor(const Accumulator& first, const Accumulator& second) {
    return {{pack<T>(first[0], first[1]), pack<T>(first[2], first[3]), pack<T>(second[0], second[1]),
             pack<T>(second[2], second[3])}};
}
template <> DEVICE FragmentA as_factor<float>(const Accumulator& first, const Accumulator&) {
    return {{bits_of(first[0]), bits_of(first[2]), bits_of(first[1]), bits_of(first[3])}};
}

// acc[i][c] += a[i][s] (channels 8 c .. 8 c + 7 of the rows of step s); the sum starts from 0 instead where `starts`.
template <class T> DEVICE void multiply(Accumulator& d, const FragmentA& a, const FragmentB& b, bool starts) {
    float c[4];
#pragma unroll
    for (int x = 0; x < 4; x++) c[x] = starts ? 0.0f : d[x];
    multiply_step<T>(d, a, b, c, 0);
}
template <class T, int channels, int m, int steps> struct ProductOverRows {
    static DEVICE void run(Accumulator (&acc)[m][Tile<T, channels>::columns], const FragmentA (&a)[m][steps], u32 tile,
                           int first_row, bool starts = false, const LaneOffsets<T, channels>& lane = LaneOffsets<T, channels>()) {
        using Rows = Tile<T, channels>;
        constexpr int columns = Rows::columns;
        u32 words[4];
#pragma unroll
        for (int s = 0; s < steps; s++) {
#pragma unroll
            for (int c = 0; c + 1 < columns; c += 2) {
                if constexpr (STEP_BY_STEP<T, channels>) one_by_one();
                load_matrices_transposed(words, tile + lane.sixteen + (first_row + 16 * s) * Rows::pitch + c * 16);
                const FragmentB b[2] = {{{words[0], words[1]}}, {{words[2], words[3]}}};
#pragma unroll
                for (int part = 0; part < 2; part++) {
#pragma unroll
                    for (int i = 0; i < m; i++) multiply<T>(acc[i][c + part], a[i][s], b[part], starts && s == 0);
                }
            }
            if (columns % 2 != 0 && s % 2 == 0) {
                // The last eight channels, of two steps at once where there are two.
                const int second = s + 1 < steps ? 1 : 0;
                const int of_lane = second == 1 ? lane.thirty_two : lane.sixteen_half;
                load_matrices_transposed(words, tile + of_lane + (first_row + 16 * s) * Rows::pitch + (columns - 1) * 16);
#pragma unroll
                for (int part = 0; part <= second; part++) {
                    const FragmentB b = {{words[2 * part], words[2 * part + 1]}};
#pragma unroll
                    for (int i = 0; i < m; i++) multiply<T>(acc[i][columns - 1], a[i][s + part], b, starts && s + part == 0);
                }
            }
        }
    }
};
// With f32 the rows stand in the order in which `as_factor` has the columns.
template <int channels, int m, int steps> struct ProductOverRows<float, channels, m, steps> {
    static DEVICE void run(Accumulator (&acc)[m][Tile<float, channels>::columns], const FragmentA (&a)[m][steps],
                           u32 tile, int first_row, bool starts = false, const LaneOffsets<float, channels>& = LaneOffsets<float, channels>()) {
        using Rows = Tile<float, channels>;
        const int lane = lane_index();
#pragma unroll
        for (int c = 0; c < Rows::columns; c++) {
            // The matrix unit cuts sums off towards 0: a long one is added from short ones in f32.
            Accumulator sum[m] = {};
            one_by_one();
#pragma unroll
            for (int pass = 0; pass < PASSES<float>; pass++) {
#pragma unroll
                for (int s = 0; s < steps; s++) {
                    const int row = 2 * (lane % 4), column = lane / 4;
                    const u32 at = tile + row * Rows::pitch + column * 4 + (first_row + 8 * s) * Rows::pitch + 8 * c * 4;
                    const FragmentB b = {{load_shared(at), load_shared(at + Rows::pitch)}};
#pragma unroll
                    for (int i = 0; i < m; i++) multiply_step<float>(sum[i], a[i][s], b, sum[i], pass);
                }
            }
#pragma unroll
            for (int i = 0; i < m; i++) {
#pragma unroll
                for (int x = 0; x < 4; x++) acc[i][c][x] = starts ? sum[i][x] : add_here(acc[i][c][x], sum[i][x]);
            }
        }
    }
};

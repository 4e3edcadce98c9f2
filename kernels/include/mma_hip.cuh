// Matrix products of one wave on AMD's matrix cores, `v_mfma` of 32 rows and 32 columns: C[32][32] += A[32][k] B[k][32], sums in
// f32. Lane l with c = l % 32 and h = l / 32 holds
//
//   A   row c; of a step of 8 (half types) numbers 4 h .. 4 h + 3, of a step of 2 (f32) number h
//   B   column c, the same numbers
//   C   column c, rows 8 g + 4 h + i as number 4 g + i (g, i below 4)
//
// So C is B of a product whose k are its rows, as it lies. Rows are dealt to what they stand for so that a lane's are neighbours.
#pragma once

#include "gpu.h"
#include "rows.cuh"

constexpr bool HALF_TYPE = sizeof(ELEMENT) == 2;

typedef float ProductVector __attribute__((ext_vector_type(16)));
// C of one product: a lane's numbers together, and one by one.
union Product {
    ProductVector all;
    float each[16];
};

// Two words: four halves of one row.
typedef u32 FourHalves __attribute__((ext_vector_type(2)));
typedef short Bf16Factor __attribute__((ext_vector_type(4)));
typedef _Float16 F16Factor __attribute__((ext_vector_type(4)));

// The half type; where there is none, one that branches for halves compile with.
template <class T> struct HalfOf {
    using Type = T;
};
template <> struct HalfOf<float> {
    using Type = bf16;
};
using Half = HalfOf<ELEMENT>::Type;

// C += A B, a step of 8.
DEVICE void multiply_add(Product& c, FourHalves a, FourHalves b, bf16) {
    c.all = __builtin_amdgcn_mfma_f32_32x32x8bf16_1k(__builtin_bit_cast(Bf16Factor, a), __builtin_bit_cast(Bf16Factor, b), c.all, 0, 0, 0);
}
DEVICE void multiply_add(Product& c, FourHalves a, FourHalves b, f16) {
    c.all = __builtin_amdgcn_mfma_f32_32x32x8f16(__builtin_bit_cast(F16Factor, a), __builtin_bit_cast(F16Factor, b), c.all, 0, 0, 0);
}
// C += A B, a step of 2.
DEVICE void multiply_add(Product& c, float a, float b) {
    c.all = __builtin_amdgcn_mfma_f32_32x32x2f32(a, b, c.all, 0, 0, 0);
}
// The numbers of one piece: two steps of halves, four of f32.
DEVICE void multiply_add_pieces(Product& c, const FourWords& a, const FourWords& b) {
    if constexpr (HALF_TYPE) {
        multiply_add(c, a.xy, b.xy, Half());
        multiply_add(c, a.zw, b.zw, Half());
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) multiply_add(c, float_of(a[i]), float_of(b[i]));
    }
}

// Two numbers, rounded to nearest (ties away from 0). A NaN of nothing but ones gets lost.
DEVICE u32 pack_rounded(Pair p, bf16) {
#if defined(__gfx942__)
    // One addition for both: that of the low number carries nothing over, unless it is such a NaN.
    const u64 added = __builtin_bit_cast(u64, p) + 0x0000800000008000;
    return __builtin_amdgcn_perm((u32)(added >> 32), (u32)added, 0x07060302);
#else
    return __builtin_amdgcn_perm(bits_of(p.y) + 0x8000, bits_of(p.x) + 0x8000, 0x07060302);
#endif
}
DEVICE u32 pack_rounded(Pair p, f16) {
    // The conversion cuts off what is added half of.
    const u32 low = bits_of(p.x) + 0x1000, high = bits_of(p.y) + 0x1000;
    return __builtin_bit_cast(u32, __builtin_amdgcn_cvt_pkrtz(float_of(low), float_of(high)));
}

// Neighbouring channels of a row, in words; channels that do not exist are 0. In pieces where rows hold whole ones.
template <int words, int channels, bool in_pieces> struct RowPart {
    static constexpr int elements = 4 * words / (int)sizeof(ELEMENT);
    typedef u32 Words __attribute__((ext_vector_type(words)));

    // `address` is that of channel `channel`.
    static DEVICE Words load(const ELEMENT* address, int channel, i64 channel_stride) {
        if constexpr (in_pieces) {
            if (channels % 8 != 0 && channel >= channels) return 0;
            return load_global<Words>(address);
        } else {
            Words loaded = 0;
#pragma unroll
            for (int i = 0; i < elements; i++) {
                if (channel + i >= channels) continue;
                if constexpr (HALF_TYPE) {
                    loaded[i / 2] |= (u32)load_global<u16>(address + i * channel_stride) << 16 * (i % 2);
                } else {
                    loaded[i] = load_global<u32>(address + i * channel_stride);
                }
            }
            return loaded;
        }
    }
};

// A row of channels as a column of the right factor: of each pair of pieces one for each of its two lanes, of an odd piece half.
// In registers, or read once more for each product.
template <int channels, bool in_pieces, bool in_registers> struct Column {
    static constexpr int pieces = pieces_of<ELEMENT>(channels), pairs = pieces / 2;
    static constexpr bool odd = pieces % 2 == 1;
    static constexpr int kept = in_registers && pairs > 0 ? pairs : 1;
    const ELEMENT* row;
    i64 channel_stride;
    FourWords words[kept];
    FourHalves last;

    template <int count> DEVICE auto part(int channel) const {
        // In pieces channels are neighbours: what is known of a channel when compiling becomes part of the load.
        return RowPart<count, channels, in_pieces>::load(row + channel * (in_pieces ? 1 : channel_stride), channel, channel_stride);
    }
    DEVICE FourWords load_pair(int p, int half) const { return part<4>((2 * p + half) * PIECE_ELEMENTS<ELEMENT>); }

    DEVICE void start(const ELEMENT* from, i64 stride, int half) {
        row = from;
        channel_stride = stride;
        if constexpr (in_registers) {
#pragma unroll
            for (int p = 0; p < pairs; p++) words[p] = load_pair(p, half);
        }
        if constexpr (odd) last = part<2>(2 * pairs * PIECE_ELEMENTS<ELEMENT> + 4 * half);
    }
    DEVICE FourWords pair(int p, int half) const {
        if constexpr (in_registers) return words[p];
        return load_pair(p, half);
    }
};

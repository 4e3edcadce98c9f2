// The HIP side of gpu.h: gfx90a and gfx942, whose waves have 64 lanes. Builtins of clang alone: run-time compilers come
// without headers, and a host compiler that is given these builtins runs the same source (tests/amd).
#pragma once

#define DEVICE __attribute__((device)) __attribute__((always_inline)) inline
#if defined(__AMDGCN__)
#define KERNEL(threads) \
    extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(threads, threads))) void
// As KERNEL, with the number of waves that registers must leave room for on one SIMD.
#define KERNEL_WITH_WAVES(threads, waves)                                                            \
    extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(threads, threads), \
                                                      amdgpu_waves_per_eu(waves))) void
#else
#define KERNEL(threads) extern "C" void
#define KERNEL_WITH_WAVES(threads, waves) KERNEL(threads)
#endif
// As KERNEL, with the number of blocks that registers must leave room for on one compute unit, which has four SIMDs.
#define KERNEL_WITH_BLOCKS(threads, blocks) KERNEL_WITH_WAVES(threads, ((blocks) * (threads) + 255) / 256)
#define SHARED __attribute__((shared))
// Shared memory whose size the launch gives.
#define DYNAMIC_SHARED(name) extern SHARED Piece name[]
// The same, by its name.
extern "C" SHARED Piece shared[];

constexpr int WARP_THREADS = 64;

// ------------------------------------------------------------------------------------------------ threads and blocks

DEVICE int thread_index() { return (int)__builtin_amdgcn_workitem_id_x(); }
DEVICE int lane_index() { return thread_index() % WARP_THREADS; }
// The same in all lanes, which the compiler cannot see by itself.
DEVICE int warp_index() { return (int)__builtin_amdgcn_readfirstlane((u32)thread_index() / WARP_THREADS); }
DEVICE u32 block_index() { return __builtin_amdgcn_workgroup_id_x(); }

DEVICE void block_barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
DEVICE void warp_barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

// Value of one lane.
DEVICE u32 shuffle(u32 x, int lane) { return (u32)__builtin_amdgcn_ds_bpermute(4 * lane, (int)x); }
DEVICE float shuffle(float x, int lane) {
    return __builtin_bit_cast(float, shuffle(__builtin_bit_cast(u32, x), lane));
}
// Value of the lane whose index differs in `mask`.
DEVICE u32 shuffle_xor(u32 x, int mask) { return shuffle(x, lane_index() ^ mask); }
DEVICE float shuffle_xor(float x, int mask) { return shuffle(x, lane_index() ^ mask); }

// One bit per lane of the wave.
using LaneBits = u64;
DEVICE LaneBits warp_ballot(bool predicate) { return __builtin_amdgcn_ballot_w64(predicate); }

// ------------------------------------------------------------------------------------------------------- arithmetic

constexpr float INFINITE = __builtin_inff();

DEVICE u32 bits_of(float x) { return __builtin_bit_cast(u32, x); }
DEVICE float float_of(u32 bits) { return __builtin_bit_cast(float, bits); }

// Fused, and not fused: written out where an error analysis depends on it.
DEVICE float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float multiply(float a, float b) {
#pragma clang fp contract(off)
    return a * b;
}
DEVICE float add(float a, float b) {
#pragma clang fp contract(off)
    return a + b;
}

// Two numbers, for which there are instructions.
typedef float Pair __attribute__((ext_vector_type(2)));
DEVICE Pair fused_multiply_add(Pair a, float b, float c) { return __builtin_elementwise_fma(a, (Pair)b, (Pair)c); }
DEVICE Pair fused_multiply_add(Pair a, float b, Pair c) { return __builtin_elementwise_fma(a, (Pair)b, c); }

// A sum of numbers that come in pairs.
struct PairSum {
    Pair sums;
    DEVICE void start(Pair x) { sums = x; }
    DEVICE void add(Pair x) { sums += x; }
    DEVICE float total() const { return sums.x + sums.y; }
};

// The greater of two; a NaN loses.
DEVICE float maximum(float a, float b) { return __builtin_fmaxf(a, b); }
DEVICE float minimum(float a, float b) { return __builtin_fminf(a, b); }
DEVICE float magnitude(float x) { return __builtin_fabsf(x); }
// The greater of two; a NaN wins.
DEVICE float maximum_or_nan(float a, float b) { return a != a || b != b ? a + b : __builtin_fmaxf(a, b); }

// 2^x: relative error below 2^-22, 0 below 2^-126, NaN for NaN. In a namespace, since the compiler takes a global function of
// this name for a library's, and replaces it by one that keeps subnormal results.
namespace approximate {
DEVICE float exp2(float x) { return __builtin_amdgcn_exp2f(x); }
}  // namespace approximate
using approximate::exp2;
// 1/x: relative error below 2^-22.
DEVICE float reciprocal(float x) { return __builtin_amdgcn_rcpf(x); }

// ------------------------------------------------------------------------------------------------------ conversions

DEVICE float to_f32(f16 x) { return (float)__builtin_bit_cast(_Float16, x.bits); }

// The low half of a word as its high one.
DEVICE u32 low_half_up(u32 word) { return word << 16; }

// Round to nearest, ties to even.
DEVICE void round_to(f16& y, float x) { y.bits = __builtin_bit_cast(u16, (_Float16)x); }
DEVICE void round_to(bf16& y, float x) {
    const u32 bits = bits_of(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
    // Rounding would carry a NaN of many ones into the sign.
    y.bits = (u16)((x != x ? bits | 0x400000 : rounded) >> 16);
}
template <class T> DEVICE u32 pack(float low, float high, T) {
    T first, second;
    round_to(first, low);
    round_to(second, high);
    return first.bits | (u32)second.bits << 16;
}

// The same number, of which the compiler knows nothing: what is computed from it stays where it is written, and does not
// take registers through a loop. Nor does it know any more that all lanes have the same number.
DEVICE int opaque(int x) {
#if defined(__AMDGCN__)
    asm volatile("" : "+v"(x));
#endif
    return x;
}
DEVICE i64 opaque(i64 x) {
#if defined(__AMDGCN__)
    asm volatile("" : "+v"(x));
#endif
    return x;
}

// An offset that is added to an address which all lanes have alike, opaque where that is done: the load itself adds 32 bits, but
// not those that the compiler has made 64 of elsewhere.
DEVICE u32 opaque_offset(u32 x) { return (u32)opaque((int)x); }

// The index of the thread, of which the compiler knows nothing.
DEVICE int thread_index_again() { return opaque(thread_index()); }

// What all lanes have alike, told to the compiler: branches by it are branches of the wave, addresses are scalar.
DEVICE bool same_in_warp(bool x) { return warp_ballot(x) != 0; }
DEVICE int same_in_warp(int x) { return (int)__builtin_amdgcn_readfirstlane((u32)x); }
DEVICE i64 same_in_warp(i64 x) {
    const u64 low = (u32)same_in_warp((int)x), high = (u32)same_in_warp((int)(x >> 32));
    return (i64)(high << 32 | low);
}

// Between steps of long code: keeps the compiler from beginning with the loads of all of them.
DEVICE void one_by_one() { asm volatile("" ::: "memory"); }
// At the end of a branch: keeps the compiler from merging it with the end of the other branch, which would move registers.
DEVICE void keep_apart() { asm volatile(""); }

// The block's index, of which the compiler knows nothing but that all lanes have it alike.
DEVICE u32 block_index_again() { return (u32)same_in_warp(opaque((int)block_index())); }

// The kernel's argument, or what it begins with, of which the compiler knows nothing: numbers that are read from it are read
// where they are used.
template <class Params> DEVICE const Params& read_again(const Params&) {
    const u64 address = (u64)same_in_warp(opaque((i64)__builtin_amdgcn_kernarg_segment_ptr()));
    return *(const Params*)(const __attribute__((address_space(4))) Params*)address;
}

// ----------------------------------------------------------------------------------------------------------- memory

// Four words that one instruction moves.
typedef u32 FourWords __attribute__((ext_vector_type(4)));

// Something in global memory, a number or a vector. Addresses come as integers: that they are global, no compiler can see.
template <class T> DEVICE T load_global(const void* from) { return *(const __attribute__((address_space(1))) T*)from; }
template <class T> DEVICE void store_global(void* to, const T& x) { *(__attribute__((address_space(1))) T*)to = x; }
// Words of global memory, a multiple of four.
template <int count> DEVICE void load_words(u32 (&to)[count], const void* from) {
    static_assert(count % 4 == 0, "pieces");
#pragma unroll
    for (int i = 0; i < count; i += 4) {
        const FourWords words = load_global<FourWords>((const char*)from + 4 * i);
#pragma unroll
        for (int x = 0; x < 4; x++) to[i + x] = words[x];
    }
}
// 16 bytes of read-only global memory.
DEVICE Piece load_piece(const void* from) { return __builtin_bit_cast(Piece, load_global<FourWords>(from)); }
// A byte of read-only global memory, or 0 without a look at it.
DEVICE u32 load_byte_or_zero(const u8* from, bool there) { return there ? load_global<u8>(from) : 0; }

// Shared memory whose size the launch gives, by bytes from its start.
DEVICE u32 shared_address(const void* pointer) { return (u32)((const char*)pointer - (const char*)shared); }
template <class T> DEVICE T load_shared(u32 address) { return *(const T*)((const char*)shared + address); }
template <class T> DEVICE void store_shared(u32 address, const T& x) { *(T*)((char*)shared + address) = x; }
DEVICE u32 load_shared(u32 address) { return load_shared<u32>(address); }
DEVICE Piece load_shared_piece(u32 address) { return __builtin_bit_cast(Piece, load_shared<FourWords>(address)); }

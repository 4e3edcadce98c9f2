// The CUDA side of gpu.h.
#pragma once

// Constants and functions are for whichever kernel wants them.
#pragma nv_diag_suppress 177

#define DEVICE __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
// As KERNEL, with the number of blocks that registers must leave room for on one multiprocessor.
#define KERNEL_WITH_BLOCKS(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
// As KERNEL; how many warps of it are to fit, other vendors' compilers are told.
#define KERNEL_WITH_WAVES(threads, waves) KERNEL_WITH_BLOCKS(threads, (waves) * 128 / (threads))
#define SHARED __shared__
// Shared memory whose size the launch gives; it starts at a multiple of eight pieces.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) Piece name[]

constexpr int WARP_THREADS = 32;

// ------------------------------------------------------------------------------------------------ threads and blocks

DEVICE int thread_index() { return threadIdx.x; }
// The same, read again: what is computed from it does not take registers from before.
DEVICE int thread_index_again() {
    int x;
    asm volatile("mov.u32 %0, %tid.x;" : "=r"(x));
    return x;
}
DEVICE int lane_index() { return threadIdx.x % WARP_THREADS; }
DEVICE int warp_index() { return threadIdx.x / WARP_THREADS; }
DEVICE u32 block_index() { return blockIdx.x; }
DEVICE u32 block_index_again() {
    u32 x;
    asm volatile("mov.u32 %0, %ctaid.x;" : "=r"(x));
    return x;
}
DEVICE u32 block_threads() { return blockDim.x; }

DEVICE void block_barrier() { asm volatile("bar.sync 0;" ::: "memory"); }
DEVICE void warp_barrier() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

// Value of the lane whose index differs in `mask`.
DEVICE float shuffle_xor(float x, int mask) {
    float y;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(y) : "f"(x), "r"(mask));
    return y;
}
DEVICE u32 shuffle_xor(u32 x, int mask) {
    u32 y;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(y) : "r"(x), "r"(mask));
    return y;
}
// Value of one lane.
DEVICE u32 shuffle(u32 x, int lane) {
    u32 y;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(y) : "r"(x), "r"(lane));
    return y;
}
DEVICE float shuffle(float x, int lane) {
    float y;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(y) : "f"(x), "r"(lane));
    return y;
}

// One bit per lane of the warp.
using LaneBits = u32;
DEVICE LaneBits warp_ballot(bool predicate) {
    u32 votes;
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %1, 0;\n\tvote.sync.ballot.b32 %0, p, 0xffffffff;\n\t}"
        : "=r"(votes)
        : "r"((u32)predicate));
    return votes;
}

// ------------------------------------------------------------------------------------------------------- arithmetic

constexpr float INFINITE = 1.0f / 0.0f;

DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }

// Fused, and not fused: written out where an error analysis depends on it.
DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
// The same where it is written: of two branches that end alike, the compiler would keep all sums until they have met.
DEVICE float add_here(float a, float b) {
    float y;
    asm volatile("add.rn.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// Two numbers, for which other vendors have instructions.
struct Pair {
    float x;
    float y;
};
DEVICE Pair fused_multiply_add(Pair a, float b, float c) {
    return {fused_multiply_add(a.x, b, c), fused_multiply_add(a.y, b, c)};
}
DEVICE Pair fused_multiply_add(Pair a, float b, Pair c) {
    return {fused_multiply_add(a.x, b, c.x), fused_multiply_add(a.y, b, c.y)};
}

// A sum of numbers that come in pairs.
struct PairSum {
    float sum;
    DEVICE void start(Pair x) { sum = x.x + x.y; }
    DEVICE void add(Pair x) { sum = sum + x.x + x.y; }
    DEVICE float total() const { return sum; }
};

// The greater of two; a NaN loses.
DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
DEVICE float minimum(float a, float b) { return fminf(a, b); }
DEVICE float magnitude(float x) { return fabsf(x); }
// The greater of two; a NaN wins.
DEVICE float maximum_or_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// 2^x: relative error below 2^-22, 0 below 2^-126, NaN for NaN.
DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1/x: relative error below 2^-23.
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ------------------------------------------------------------------------------------------------------ conversions

DEVICE float to_f32(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Round to nearest, ties to even.
DEVICE void round_to(f16& y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
DEVICE void round_to(bf16& y, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
DEVICE u32 pack(float low, float high, f16) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
DEVICE u32 pack(float low, float high, bf16) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// The low half of a word as its high one. Not a shift, which the compiler would turn into a multiplication, of which there
// are enough.
DEVICE u32 low_half_up(u32 word) {
    u32 y;
    asm("prmt.b32 %0, %1, 0, 0x1044;" : "=r"(y) : "r"(word));
    return y;
}

// f32 rounded to tf32 (10 bits of mantissa), kept in 32 bits.
DEVICE u32 to_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// The same number, of which the compiler knows nothing: what is computed from it stays where it is written, and does not
// take registers through a loop.
DEVICE int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
DEVICE i64 opaque(i64 x) {
    asm volatile("" : "+l"(x));
    return x;
}

// The same number, but not before `known` is. Grids have one axis: blockIdx.y is 0, which the compiler does not know.
DEVICE int after(int x, float known) { return x | (int)(__float_as_uint(known) & blockIdx.y); }

// What all lanes have alike, told to compilers of other vendors.
template <class T> DEVICE T same_in_warp(T x) { return x; }

// Between steps of long code: keeps the compiler from beginning with the loads of all of them.
DEVICE void one_by_one() { warp_barrier(); }
// At the end of a branch: other vendors' compilers would merge it with the end of the other branch, and move registers.
DEVICE void keep_apart() {}

// The kernel's argument, or what it begins with, where its numbers are not to take registers before they are used: here they
// never do.
template <class Params> DEVICE const Params& read_again(const Params& params) { return params; }

// ----------------------------------------------------------------------------------------------------------- memory

// Address of shared memory as its own instructions take it.
DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// 16 bytes of read-only global memory.
DEVICE Piece load_piece(const void* from) {
    Piece y;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(y.words[0]), "=r"(y.words[1]), "=r"(y.words[2]), "=r"(y.words[3])
                 : "l"(from));
    return y;
}

// Words of read-only global memory: 1, 2, or a multiple of 4.
template <int count> DEVICE void load_words(u32 (&to)[count], const void* from) {
    if constexpr (count == 1) {
        asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
    } else if constexpr (count == 2) {
        asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
    } else {
        static_assert(count % 4 == 0, "pieces");
#pragma unroll
        for (int i = 0; i < count; i += 4) {
            const Piece piece = load_piece((const char*)from + 4 * i);
#pragma unroll
            for (int x = 0; x < 4; x++) to[i + x] = piece.words[x];
        }
    }
}

// A byte of read-only global memory, or 0 without a look at it. Opaque, so that the wait for it is where it is used.
DEVICE u32 load_byte_or_zero(const u8* from, bool there) {
    u32 y;
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %2, 0;\n\tmov.u32 %0, 0;\n\t@p ld.global.nc.u8 %0, [%1];\n\t}"
        : "=r"(y)
        : "l"(from), "r"((u32)there));
    return y;
}

// Starts a copy of 16 bytes from global to shared memory; only `bytes` (0 or 16) of them are read, the rest become 0.
DEVICE void copy_async(u32 to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// Ends a group of copies.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of the latest groups are unfinished; other threads see them after a barrier.
template <int pending> DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8. Lane l receives of each
// matrix elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
DEVICE void load_matrices(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}
// As above, each matrix transposed.
DEVICE void load_matrices_transposed(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// Words of shared memory.
DEVICE u32 load_shared(u32 address) {
    u32 y;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(y) : "r"(address) : "memory");
    return y;
}
// Two neighbouring words, which the compiler takes for others each time.
DEVICE void load_shared_pair_again(float& x, float& y, u32 address) {
    asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(address) : "memory");
}
// Never from registers: what was stored may be forgotten meanwhile.
DEVICE i64 load_shared_i64(u32 address) {
    i64 y;
    asm volatile("ld.volatile.shared.s64 %0, [%1];" : "=l"(y) : "r"(address) : "memory");
    return y;
}
DEVICE void store_shared_i64(u32 address, i64 x) { asm volatile("st.volatile.shared.s64 [%0], %1;" ::"r"(address), "l"(x) : "memory"); }
// A number of shared memory, which the compiler takes for another one each time.
DEVICE float load_shared_again(u32 address) {
    float y;
    asm volatile("ld.volatile.shared.f32 %0, [%1];" : "=f"(y) : "r"(address) : "memory");
    return y;
}
DEVICE Piece load_shared_piece(u32 address) {
    Piece y;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(y.words[0]), "=r"(y.words[1]), "=r"(y.words[2]), "=r"(y.words[3])
                 : "r"(address)
                 : "memory");
    return y;
}
DEVICE void store_shared(u32 address, u32 x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory"); }
DEVICE void store_shared_piece(u32 address, const Piece& x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.words[0]), "r"(x.words[1]),
                 "r"(x.words[2]), "r"(x.words[3])
                 : "memory");
}

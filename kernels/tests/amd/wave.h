// AMD's waves on the host, in front of a kernel's source: the builtins that gpu_hip.h and products_hip.cuh use.
//
// A lane is a fiber. It runs until an operation of all lanes of its wave, or a barrier of the block, leaves what it brings in
// its slot and waits; `launch.h` does the operation once all lanes are there, and refuses lanes that wait for different ones.
#pragma once

#define __HIP__ 1

namespace host {

constexpr int WAVE = 64;

enum Operation { RUN, BLOCK_BARRIER, WAVE_BARRIER, PERMUTE, BALLOT, PRODUCT_OF_2, PRODUCT_OF_8, FINISHED };

// What a lane brings to an operation and takes from it.
struct Slot {
    Operation operation;
    void* stack;
    int from;                  // lane whose word it wants
    unsigned word;
    unsigned long long votes;
    float a[4];
    float b[4];
    float c[16];
};

extern Slot* lane;             // the one that runs
extern int thread;             // its index in the block
extern unsigned block;
extern const void* argument;
void wait(Operation operation);

// The value of 16 bits of a half type.
inline float of_bf16(short bits) { return __builtin_bit_cast(float, (unsigned)(unsigned short)bits << 16); }

typedef float Product __attribute__((ext_vector_type(16)));

inline Product multiply(Operation operation, const Product& c) {
    for (int i = 0; i < 16; i++) lane->c[i] = c[i];
    wait(operation);
    Product sum;
    for (int i = 0; i < 16; i++) sum[i] = lane->c[i];
    return sum;
}

// Toward zero, as `v_cvt_pkrtz` rounds.
inline _Float16 cut_off(float x) {
    const _Float16 nearest = (_Float16)x;
    if (x != x || (float)nearest == x) return nearest;
    const bool beyond = __builtin_fabsf((float)nearest) > __builtin_fabsf(x);
    return __builtin_bit_cast(_Float16, (unsigned short)(__builtin_bit_cast(unsigned short, nearest) - beyond));
}

}  // namespace host

inline unsigned __builtin_amdgcn_workitem_id_x() { return (unsigned)host::thread; }
inline unsigned __builtin_amdgcn_workgroup_id_x() { return host::block; }
inline const void* __builtin_amdgcn_kernarg_segment_ptr() { return host::argument; }
// Kernels ask for it where all lanes have the same number alone.
inline unsigned __builtin_amdgcn_readfirstlane(unsigned x) { return x; }
inline void __builtin_amdgcn_fence(int, const char*) {}
inline void __builtin_amdgcn_s_barrier() { host::wait(host::BLOCK_BARRIER); }
inline void __builtin_amdgcn_wave_barrier() { host::wait(host::WAVE_BARRIER); }

inline int __builtin_amdgcn_ds_bpermute(int address, int x) {
    host::lane->from = address / 4 % host::WAVE;
    host::lane->word = (unsigned)x;
    host::wait(host::PERMUTE);
    return (int)host::lane->word;
}
inline unsigned long long __builtin_amdgcn_ballot_w64(bool vote) {
    host::lane->word = vote;
    host::wait(host::BALLOT);
    return host::lane->votes;
}

// Subnormal results are 0.
inline float __builtin_amdgcn_exp2f(float x) {
    const float y = __builtin_exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline float __builtin_amdgcn_rcpf(float x) { return 1.0f / x; }

// Bytes 0 to 3 are those of `low`, 4 to 7 those of `high`.
inline unsigned __builtin_amdgcn_perm(unsigned high, unsigned low, unsigned selector) {
    const unsigned long long both = (unsigned long long)high << 32 | low;
    unsigned y = 0;
    for (int i = 0; i < 4; i++) y |= (unsigned)(both >> 8 * (selector >> 8 * i & 7) & 0xff) << 8 * i;
    return y;
}
typedef _Float16 TwoHalves __attribute__((ext_vector_type(2)));
inline TwoHalves __builtin_amdgcn_cvt_pkrtz(float x, float y) { return TwoHalves{host::cut_off(x), host::cut_off(y)}; }

typedef short FourBf16 __attribute__((ext_vector_type(4)));
typedef _Float16 FourF16 __attribute__((ext_vector_type(4)));
inline host::Product __builtin_amdgcn_mfma_f32_32x32x8bf16_1k(FourBf16 a, FourBf16 b, host::Product c, int, int, int) {
    for (int i = 0; i < 4; i++) {
        host::lane->a[i] = host::of_bf16(a[i]);
        host::lane->b[i] = host::of_bf16(b[i]);
    }
    return host::multiply(host::PRODUCT_OF_8, c);
}
inline host::Product __builtin_amdgcn_mfma_f32_32x32x8f16(FourF16 a, FourF16 b, host::Product c, int, int, int) {
    for (int i = 0; i < 4; i++) {
        host::lane->a[i] = (float)a[i];
        host::lane->b[i] = (float)b[i];
    }
    return host::multiply(host::PRODUCT_OF_8, c);
}
inline host::Product __builtin_amdgcn_mfma_f32_32x32x2f32(float a, float b, host::Product c, int, int, int) {
    host::lane->a[0] = a;
    host::lane->b[0] = b;
    return host::multiply(host::PRODUCT_OF_2, c);
}

// A small attention kernel for the interpreter's own tests: bf16, head_dim 16, 16 query rows a warp, 32 a block, tiles of
// 16 keys in two buffers. attention.ptx is what NVRTC 13.5 writes of it with `--gpu-architecture=compute_80 --std=c++17`.
typedef unsigned short bf16;
typedef unsigned int u32;

__device__ __forceinline__ u32 place(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ void mma(float* c, const u32* a, const u32* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

extern "C" __global__ void __launch_bounds__(64)
    attention(const bf16* q, const bf16* k, const bf16* v, const float* bias, bf16* out, int length, float scale) {
  __shared__ __align__(16) bf16 keys[2][16 * 16], values[2][16 * 16];
  const int thread = threadIdx.x, lane = thread & 31, group = lane >> 2, pair = 2 * (lane & 3);
  const int row = blockIdx.x * 32 + (thread >> 5) * 16 + group;
  const bool second = thread >= 32;
  u32 a[4];
  for (int i = 0; i < 4; i++) a[i] = *(const u32*)(q + (long long)(row + 8 * (i & 1)) * 16 + pair + 8 * (i >> 1));
  const bf16* from = (second ? v : k) + lane * 8;
  const u32 into = place(second ? values[0] : keys[0]) + lane * 16;
  auto copy = [&](int tile) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\ncp.async.commit_group;" ::"r"(into + (tile & 1) * 512),
                 "l"(from + (long long)tile * 256) : "memory");
  };
  copy(0);
  float sum[2] = {}, most[2] = {-1e30f, -1e30f}, o[2][4] = {};
  const int tiles = length / 16, matrix = lane >> 3, line = lane & 7;
  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) {
      copy(tile + 1);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    float s[2][4] = {};
    u32 b[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(place(keys[tile & 1]) + ((matrix >> 1) * 8 + line) * 32 + (matrix & 1) * 16));
    mma(s[0], a, b);
    mma(s[1], a, b + 2);
    for (int r = 0; r < 2; r++) {
      float top = most[r];
      for (int n = 0; n < 2; n++) {
        const float2 add = *(const float2*)(bias + (long long)(row + 8 * r) * length + tile * 16 + n * 8 + pair);
        s[n][2 * r] = s[n][2 * r] * scale + add.x;
        s[n][2 * r + 1] = s[n][2 * r + 1] * scale + add.y;
        top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float keep = power((most[r] - top) * 1.44269504f);
      most[r] = top;
      sum[r] *= keep;
      for (int n = 0; n < 2; n++)
        for (int e = 2 * r; e < 2 * r + 2; e++) {
          s[n][e] = power((s[n][e] - top) * 1.44269504f);
          sum[r] += s[n][e];
          o[n][e] *= keep;
        }
    }
    const u32 p[4] = {pack(s[0][0], s[0][1]), pack(s[0][2], s[0][3]), pack(s[1][0], s[1][1]), pack(s[1][2], s[1][3])};
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(place(values[tile & 1]) + ((matrix & 1) * 8 + line) * 32 + (matrix >> 1) * 16));
    mma(o[0], p, b);
    mma(o[1], p, b + 2);
    __syncthreads();
  }
  for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    const float inverse = 1.f / sum[r];
    for (int n = 0; n < 2; n++)
      *(u32*)(out + (long long)(row + 8 * r) * 16 + n * 8 + pair) = pack(o[n][2 * r] * inverse, o[n][2 * r + 1] * inverse);
  }
}

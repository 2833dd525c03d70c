// What two or more kernels share: the float types as bits, Philox, the rounding rule, block reductions.
#pragma once

#include "device.cuh"
#include "launchers.h"

namespace pykernels::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(Half v) { return half_to_float(v.bits); }
__device__ __forceinline__ float to_float(BFloat16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }

// The 16-byte vector as floats, lowest address first.
__device__ __forceinline__ void unpack(const Vec16& v, float (&out)[4], float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = bits_to_float(v.word[i]);
}

template <typename T>
__device__ __forceinline__ void unpack(const Vec16& v, float (&out)[8], T) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = to_float(T{static_cast<uint16_t>(v.word[i] & 0xffffu)});
    out[2 * i + 1] = to_float(T{static_cast<uint16_t>(v.word[i] >> 16)});
  }
}

__device__ __forceinline__ float load_float(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[i];
  if (dtype == DType::f16) return to_float(static_cast<const Half*>(p)[i]);
  return to_float(static_cast<const BFloat16*>(p)[i]);
}

__device__ __forceinline__ void store_float(void* p, DType dtype, int64_t i, float v) {
  if (dtype == DType::f32) {
    static_cast<float*>(p)[i] = v;
  } else {
    static_cast<uint16_t*>(p)[i] = dtype == DType::f16 ? float_to_half(v) : float_to_bfloat16(v);
  }
}

// Sixteen consecutive int8 of a row of length k, from position at; zeros beyond the row.
// kAligned promises that row + at lies on 16 bytes and that k is a multiple of 16.
template <bool kAligned, bool kStreaming>
__device__ __forceinline__ Vec16 load_row_chunk(const int8_t* row, int at, int k) {
  Vec16 v = {{0, 0, 0, 0}};
  if constexpr (kAligned) {
    if (at < k) v = kStreaming ? load16_streaming(row + at) : load16(row + at);
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (at + i < k) v.word[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(row[at + i])) << (8 * (i % 4));
    }
  }
  return v;
}

// Four int8 to float, exact: the byte, offset by 128, becomes the low mantissa bits of 2^23.
__device__ __forceinline__ void int8_to_float(uint32_t word, float (&out)[4]) {
  const uint32_t offset = word ^ 0x80808080u;
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = bits_to_float(byte_permute(offset, 0x4b000000u, 0x7440u | i)) - 8388736.0f;
}

// Philox 4x32-10 (Salmon et al., 2011).
struct Philox4 {
  uint32_t word[4];
};

__device__ __forceinline__ Philox4 philox(uint64_t index, uint32_t stream_word, uint64_t seed, uint32_t last_word = 0) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = stream_word, c3 = last_word;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xd2511f53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xcd9e8d57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ float uniform(uint32_t random) { return static_cast<float>(random >> 8) * 0x1p-24f; }

__device__ __forceinline__ int clamp_int8(int v) { return max(-127, min(127, v)); }

// NaN rounds to 0 and infinities saturate: what __float2int does, and what the row rules rely on.
__device__ __forceinline__ int quantize_nearest(float x, float inv) {
  return clamp_int8(__float2int_rn(__fmul_rn(x, inv)));
}
__device__ __forceinline__ int quantize_stochastic(float x, float inv, float u) {
  return clamp_int8(__float2int_rd(__fadd_rn(__fmul_rn(x, inv), u)));
}

__device__ __forceinline__ uint32_t pack_int8(int a, int b, int c, int d) {
  return (static_cast<uint32_t>(a) & 0xffu) | (static_cast<uint32_t>(b) & 0xffu) << 8 |
         (static_cast<uint32_t>(c) & 0xffu) << 16 | static_cast<uint32_t>(d) << 24;
}

// Every thread of the block gets the maximum. The block is a multiple of 32 threads.
__device__ __forceinline__ uint32_t block_max(uint32_t v) {
  __shared__ uint32_t warps[32];
  v = warp_max(v);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  return warp_max(threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : 0u);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

inline int64_t element_size(DType dtype) {
  return dtype == DType::f32 || dtype == DType::i32 ? 4 : dtype == DType::i8 ? 1 : 2;
}

// Calls f with a value of the type that dtype names.
template <typename F>
const char* with_float_type(DType dtype, F f) {
  if (dtype == DType::f32) return f(float{});
  if (dtype == DType::f16) return f(Half{});
  if (dtype == DType::bf16) return f(BFloat16{});
  return "x is not float32, float16 or bfloat16";
}

}  // namespace pykernels::cuda

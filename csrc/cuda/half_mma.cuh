// int8 weights as operands of the half-precision tensor cores: exact in both half and bfloat16.
#pragma once

#include "common.cuh"

namespace pykernels::cuda {

__device__ __forceinline__ uint32_t pack(float low, float high, Half) {
  return static_cast<uint32_t>(float_to_half(low)) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
// Exact here, so the upper halves are the bfloat16 values.
__device__ __forceinline__ uint32_t pack(float low, float high, BFloat16) {
  return (float_to_bits(low) >> 16) | (float_to_bits(high) & 0xffff0000u);
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  mma_f16(d, a, b);
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  mma_bf16(d, a, b);
}

// Four int8 as two registers of two.
template <typename T>
__device__ __forceinline__ void int8_to_pairs(uint32_t word, uint32_t (&pairs)[2], T type) {
  float v[4];
  int8_to_float(word, v);
  pairs[0] = pack(v[0], v[1], type);
  pairs[1] = pack(v[2], v[3], type);
}

}  // namespace pykernels::cuda

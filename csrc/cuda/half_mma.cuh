// int8 weights as operands of the half-precision tensor cores: exact in both half and bfloat16.
#pragma once

#include "common.cuh"

namespace pykernels::cuda {

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  mma_f16(d, a, b);
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  mma_bf16(d, a, b);
}

// Four int8 as two registers of two, without a conversion: a permutation places them in mantissas.
__device__ __forceinline__ void int8_to_pairs(uint32_t word, uint32_t (&pairs)[2], Half) {
  const uint32_t offset = word ^ 0x80808080u;  // v + 128, which becomes 1024 + v + 128
  pairs[0] = subtract_half2(byte_permute(offset, 0x64646464u, 0x4140u), 0x64806480u);
  pairs[1] = subtract_half2(byte_permute(offset, 0x64646464u, 0x4342u), 0x64806480u);
}

// bfloat16 has room for seven bits: 128 and those below the sign, less 128 or, where the sign is set, 256.
__device__ __forceinline__ void int8_to_pairs(uint32_t word, uint32_t (&pairs)[2], BFloat16) {
  const uint32_t low = byte_permute(word, 0x43434343u, 0x4140u), high = byte_permute(word, 0x43434343u, 0x4342u);
  pairs[0] = subtract_bfloat2(low & 0xff7fff7fu, low & 0xff80ff80u);
  pairs[1] = subtract_bfloat2(high & 0xff7fff7fu, high & 0xff80ff80u);
}

}  // namespace pykernels::cuda
